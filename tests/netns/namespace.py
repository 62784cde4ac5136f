"""A network namespace of a test's own, so that taps and addresses touch nobody."""

import subprocess


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
        self.prefix = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", "--"]

    def run(self, *command, timeout=30):
        """Run a command inside that must succeed; return what it printed."""
        return subprocess.run(
            [*self.prefix, *command],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout,
        ).stdout

    def close(self):
        self._holder.stdin.close()
        self._holder.wait(timeout=10)
        self._holder.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
