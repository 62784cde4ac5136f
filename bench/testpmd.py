"""DPDK's testpmd, driven at its prompt: here as a switch, in the tests as a guest."""

import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Final, Self

from bench import daemon
from bench.daemon import START_S, DaemonError

COMMAND: Final = "dpdk-testpmd"
PACKAGE: Final = "dpdk-dev"
HEADROOM: Final = 128  # of a buffer, before a frame
ROOM: Final = 2048  # for a frame of usual length
_PROMPT: Final = b"testpmd> "
# As root, DPDK's place for what a process needs while it runs.
_RUN_DIR: Final = "/var/run/dpdk"


def missing() -> str:
    """Why there is none here, or nothing."""
    return daemon.missing([COMMAND], PACKAGE)


class Testpmd:
    """One testpmd, until the `with` or `close` ends it."""

    __test__ = False  # not a test, whatever its name looks like to pytest

    def __init__(
        self, name: str, eal: Sequence[str], application: Sequence[str]
    ) -> None:
        """Start it with options of DPDK's and its own, and wait for its prompt.

        Its files are named after `name`, which need not be unique.
        """
        self._prefix = f"vswitch-{os.getpid()}-{name}-{time.monotonic_ns()}"
        command = [
            # It buffers what it prints into a pipe, but not its prompt.
            *("stdbuf", "-oL", COMMAND, "--no-pci", "--no-telemetry", *eal),
            *(f"--file-prefix={self._prefix}", "--", "-i", *application),
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._said = b""
        try:
            self.banner = self._read_prompt(START_S)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def ask(self, command: str, timeout: float = 30.0) -> str:
        """Type a command; return what it printed."""
        stdin = _present(self._process.stdin)
        stdin.write(command.encode() + b"\n")
        stdin.flush()
        return self._read_prompt(timeout)

    def start(self) -> None:
        """Let it forward."""
        self.ask("start")

    def stop(self) -> None:
        """Let it forward no more; its core sleeps."""
        self.ask("stop")

    def kill(self) -> None:
        """End it without warning; harmless when it has ended."""
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # what it never read
            _present(self._process.stdin).close()
        _present(self._process.stdout).close()
        shutil.rmtree(f"{_RUN_DIR}/{self._prefix}", ignore_errors=True)

    def close(self) -> None:
        """End it as a user does."""
        if self._process.poll() is None:
            with suppress(OSError, subprocess.TimeoutExpired):
                stdin = _present(self._process.stdin)
                stdin.write(b"quit\n")
                stdin.flush()
                self._process.wait(timeout=10)
        self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_prompt(self, timeout: float) -> str:
        """What it says up to its next prompt; log lines may follow that at any time."""
        deadline = time.monotonic() + timeout
        stdout = _present(self._process.stdout)
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while _PROMPT not in self._said:
                left = deadline - time.monotonic()
                data = b""
                if left > 0 and selector.select(left):
                    data = os.read(stdout.fileno(), 1 << 16)
                if not data:
                    last = self._said[-1000:].decode(errors="replace")
                    message = f"testpmd went silent, having said: {last}"
                    raise DaemonError(message)
                self._said += data
        said, _, self._said = self._said.partition(_PROMPT)
        return said.decode()


def _present(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
