"""A shell in a guest: one line in, its output and exit status out.

The guest's side is the end of the init script in `image.py`: it says `@@ ready`, then
runs each line and says `@@ status N`.
"""

import os
import re
import selectors
import time
from typing import IO, Final, NamedTuple

from vswitch.errors import VswitchError

_READY: Final = re.compile(rb"@@ ready\n")
_STATUS: Final = re.compile(rb"(?s)(.*?)\n@@ status (\d+)\n")


class Result(NamedTuple):
    """What a command in a guest said and how it ended."""

    output: str
    status: int


class Shell:
    """Both ends of a guest's second serial line.

    Args:
        name: The guest's name, for errors.
        to_guest: A pipe into the serial line.
        from_guest: A pipe out of it.
    """

    def __init__(self, name: str, to_guest: IO[bytes], from_guest: IO[bytes]) -> None:
        self._name = name
        self._to_guest = to_guest
        self._from_guest = from_guest
        self._received = b""

    def wait_ready(self, timeout: float) -> None:
        """Wait until the guest has booted; call again after each reboot.

        Raises:
            VswitchError: It has not by the deadline, or QEMU has ended.
        """
        self._await(_READY, timeout, "boot")

    def run(self, command: str, timeout: float) -> Result:
        """Run one line of shell in the guest.

        Raises:
            VswitchError: It does not end by the deadline, or QEMU has ended.
        """
        self._to_guest.write(command.encode() + b"\n")
        self._to_guest.flush()
        found = self._await(_STATUS, timeout, f"run {command!r}")
        output = found[1].decode(errors="replace").replace("\r", "")
        return Result(output.strip("\n"), int(found[2]))

    def _await(
        self, pattern: re.Pattern[bytes], timeout: float, what: str
    ) -> re.Match[bytes]:
        deadline = time.monotonic() + timeout
        while (found := pattern.search(self._received)) is None:
            left = deadline - time.monotonic()
            if left <= 0 or not self._receive(left):
                self._give_up(what, timeout, ended=left > 0)
        self._received = self._received[found.end() :]
        return found

    def _receive(self, timeout: float) -> bool:
        """Take in what the guest says within the time; False when it will say no more."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._from_guest, selectors.EVENT_READ)
            if not selector.select(timeout):
                return True
        data = os.read(self._from_guest.fileno(), 1 << 16)
        self._received += data
        return bool(data)

    def _give_up(self, what: str, timeout: float, *, ended: bool) -> None:
        reason = "QEMU ended" if ended else f"nothing within {timeout:g} s"
        said = self._received[-200:].decode(errors="replace").strip()
        text = f"guest {self._name}: cannot {what}: {reason}"
        raise VswitchError(f"{text}; last it said {said!r}" if said else text)
