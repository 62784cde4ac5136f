"""A network namespace of our own, so that taps and addresses touch nobody."""

import ctypes
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, Self

_OURS: Final = Path("/proc/thread-self/ns/net")
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """Exists as long as a process lives in it; use as a context manager.

    `prefix` before a command runs that command inside.
    """

    def __init__(self) -> None:
        """Make one. Needs root."""
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--", "sh", "-c", "ip link set lo up; echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        _present(self._holder.stdout).readline()  # it is there
        self.pid = self._holder.pid
        self._path = Path(f"/proc/{self.pid}/ns/net")
        self.prefix = ["nsenter", f"--net={self._path}", "--"]

    def run(self, *command: str, timeout: float = 30) -> str:
        """Run a command inside that must succeed; return what it printed."""
        return subprocess.run(
            [*self.prefix, *command],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout,
        ).stdout

    @contextmanager
    def start(self, *command: str) -> "Iterator[subprocess.Popen[str]]":
        """Start a command inside that prints text; at the end it is gone."""
        with subprocess.Popen(
            [*self.prefix, *command], stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def ip(self, command: str) -> str:
        """Run `ip` inside."""
        return self.run("ip", *command.split())

    def link(self, name: str) -> dict[str, Any] | None:
        """What the kernel says of an interface inside, or None."""
        links = json.loads(self.ip("-json -statistics -details link show"))
        return next((link for link in links if link["ifname"] == name), None)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is inside: sockets that it opens stay there."""
        with _OURS.open() as ours, self._path.open() as theirs:
            _enter(theirs.fileno())
            try:
                yield
            finally:
                _enter(ours.fileno())

    def close(self) -> None:
        """End it, once nobody else lives in it."""
        _present(self._holder.stdin).close()
        self._holder.wait(timeout=10)
        _present(self._holder.stdout).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _present(stream: IO[bytes] | None) -> IO[bytes]:
    """A pipe that was asked for."""
    assert stream is not None
    return stream


def _enter(fd: int) -> None:
    if _libc.setns(fd, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
