"""DPDK's testpmd with one virtio-user port: a front-end and driver that we did not write."""

import os
import re
import selectors
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

TESTPMD = "dpdk-testpmd"
_EAL_OPTIONS = (
    # Its own memory, no devices, and both threads where they leave a core to a worker.
    *("--no-pci", "--no-huge", "--no-telemetry", "-m", "256"),
    *("-l", "0,1", "--main-lcore=1"),
    # Say which paths the driver takes, and take those with the widest vectors too.
    *("--log-level=pmd.net.virtio.init:info", "--force-max-simd-bitwidth=512"),
)
_PROMPT = b"testpmd> "
_START_S = 30.0
_STATISTIC = re.compile(r"([RT]X-(?:packets|bytes|errors|dropped|missed)): +(\d+)")


def is_installed():
    return shutil.which(TESTPMD) is not None


class Testpmd:
    """One testpmd, driven at its prompt; use as a context manager.

    Its `name` is the port's. `options` are those of the virtual device: `server=1`,
    `queues=2`, `mrg_rxbuf=0`. `forward` is testpmd's forwarding mode: rxonly, txonly,
    io, macswap.
    """

    __test__ = False  # not a test, whatever its name looks like to pytest

    def __init__(self, path, *options, forward="rxonly", mac=None, arguments=()):
        device = [f"net_virtio_user0,path={path}", *options]
        if mac:
            device.append(f"mac={mac}")
        self.name = Path(path).stem
        # Its files are named after the prefix; it must differ between processes.
        self._prefix = f"vswitch-{os.getpid()}-{self.name}-{time.monotonic_ns()}"
        command = [
            # It buffers what it prints into a pipe, but not its prompt.
            *("stdbuf", "-oL", TESTPMD, *_EAL_OPTIONS),
            *(f"--file-prefix={self._prefix}", f"--vdev={','.join(device)}", "--"),
            *("-i", "--total-num-mbufs=4096", f"--forward-mode={forward}", *arguments),
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
            self.banner = self._read_prompt(_START_S)
        except BaseException:
            self.kill()
            raise

    def ask(self, command, timeout=30.0):
        """Type a command; return what it printed."""
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()
        return self._read_prompt(timeout)

    def start(self):
        self.ask("start")

    def stop(self):
        self.ask("stop")

    def statistics(self):
        """The port's own counters: RX-packets, TX-packets, TX-errors ..."""
        return {
            name: int(value)
            for name, value in _STATISTIC.findall(self.ask("show port stats 0"))
        }

    def wait_for(self, condition, timeout=30.0):
        """Ask for the counters until `condition` holds for them."""
        deadline = time.monotonic() + timeout
        while not condition(found := self.statistics()):
            assert time.monotonic() < deadline, f"still {found} after {timeout} s"
        return found

    def kill(self):
        """End it without warning; harmless when it has ended."""
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # what it never read
            self._process.stdin.close()
        self._process.stdout.close()
        shutil.rmtree(f"/var/run/dpdk/{self._prefix}", ignore_errors=True)

    def close(self):
        if self._process.poll() is None:
            with suppress(OSError, subprocess.TimeoutExpired):
                self._process.stdin.write(b"quit\n")
                self._process.stdin.flush()
                self._process.wait(timeout=10)
        self.kill()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _read_prompt(self, timeout):
        """What it says up to its next prompt; log lines may follow that at any time."""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while _PROMPT not in self._said:
                left = deadline - time.monotonic()
                data = b""
                if left > 0 and selector.select(left):
                    data = os.read(self._process.stdout.fileno(), 1 << 16)
                assert data, f"testpmd went silent: {self._said[-1000:].decode()}"
                self._said += data
        said, _, self._said = self._said.partition(_PROMPT)
        return said.decode()
