"""The story's built-in guests: Python programs that speak vhost-user as drivers do."""

import secrets
import time
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Final

from vswitch.demo.screen import Screen
from vswitch.guest import Guest
from vswitch.guest.netstack import NetStack

_SIZE: Final = 1 << 20


class BuiltinGuests:
    """Two guests of `vswitch.guest` and what they do; they have no TCP.

    Args:
        directory: Where the switch's sockets are.
        screen: Where it is shown.
    """

    def __init__(self, directory: Path, screen: Screen) -> None:
        self._directory = directory
        self._screen = screen
        self._stacks: list[NetStack] = []
        self._owned = ExitStack()

    def start(self, addresses: list[str]) -> None:
        """Connect a guest to each of vm1.sock and vm2.sock."""
        self._screen.step("connecting two built-in guests")
        for number, address in enumerate(addresses, start=1):
            path = self._directory / f"vm{number}.sock"
            guest = Guest.connect(path, mac=f"52:54:00:00:00:0{number}")
            self._owned.enter_context(guest)
            with self._screen.waiting("compiling the guests' driver"):
                # Here and not within the time that a ping may take.
                guest.send_all(
                    [(b"\xff" * 6 + guest.mac + b"\x88\xb5").ljust(60, b"\0")]
                )
                guest.receive(timeout=0)
            stack = self._owned.enter_context(NetStack(guest, ip=address))
            self._stacks.append(stack)
        self._screen.check("vm1 and vm2 are up", ok=True)

    def ping(self, address: str) -> None:
        """Ping an address from vm1."""
        self._screen.command("vm1", f"ping {address}")
        times = self._stacks[0].ping(address, count=3)
        answers = ["lost" if ms is None else f"{ms:.3f} ms" for ms in times]
        self._screen.output("\n".join(answers))
        self._screen.check(f"vm1 reaches {address}", ok=None not in times)

    def transfer(self, address: str) -> None:
        """Send random bytes from vm1 to vm2 and compare their digests."""
        content = secrets.token_bytes(_SIZE)
        self._screen.command("vm1", f"send {_SIZE >> 20} MiB to {address}")
        began = time.monotonic()
        found = self._stacks[0].transfer(address, content)
        rate = _SIZE * 8 / 1e6 / (time.monotonic() - began)
        text = f"{_SIZE >> 20} MiB, {rate:.0f} Mb/s, same SHA-256"
        self._screen.check(text, ok=found == sha256(content).hexdigest())

    def transfer_from_host(self, address: str) -> None:
        """Nothing: what the host would send needs TCP."""
        self._screen.note(f"no TCP from {address}: built-in guests have none")

    def stop(self) -> None:
        """Disconnect the guests."""
        self._owned.close()
        self._stacks.clear()
