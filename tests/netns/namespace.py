"""A network namespace of a test's own, so that taps and addresses touch nobody."""

import ctypes
import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

_OURS = Path("/proc/thread-self/ns/net")
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """Exists as long as a process lives in it; use as a context manager.

    `prefix` before a command runs that command inside.
    """

    def __init__(self):
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--", "sh", "-c", "ip link set lo up; echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._holder.stdout.readline()  # it is there
        self.pid = self._holder.pid
        self._path = Path(f"/proc/{self.pid}/ns/net")
        self.prefix = ["nsenter", f"--net={self._path}", "--"]

    def run(self, *command, timeout=30):
        """Run a command inside that must succeed; return what it printed."""
        return subprocess.run(
            [*self.prefix, *command],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout,
        ).stdout

    @contextmanager
    def start(self, *command):
        """Start a command inside that prints text; at the end it is gone."""
        with subprocess.Popen(
            [*self.prefix, *command], stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def ip(self, command):
        """Run `ip` inside."""
        return self.run("ip", *command.split())

    def link(self, name):
        """What the kernel says of an interface inside, or None."""
        links = json.loads(self.ip("-json -statistics -details link show"))
        return next((link for link in links if link["ifname"] == name), None)

    @contextmanager
    def inside(self):
        """This thread is inside: sockets that it opens stay there."""
        with _OURS.open() as ours, self._path.open() as theirs:
            _enter(theirs.fileno())
            try:
                yield
            finally:
                _enter(ours.fileno())

    def close(self):
        self._holder.stdin.close()
        self._holder.wait(timeout=10)
        self._holder.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _enter(fd):
    if _libc.setns(fd, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
