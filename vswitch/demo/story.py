"""What the demo does, in its order; whatever happens, nothing stays behind."""

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, Protocol

from vswitch.demo import qemu
from vswitch.demo.builtin import BuiltinGuests
from vswitch.demo.real import RealGuests
from vswitch.demo.screen import Screen
from vswitch.demo.switch import Switch
from vswitch.demo.throughput import measure
from vswitch.errors import EXIT_DONE, EXIT_FAILED, VswitchError

_INTERRUPTED: Final = 130  # as a shell reports Ctrl-C
_TAP: Final = "uplink0"
_HOST: Final = "10.77.0.254"
_ADDRESSES: Final = ["10.77.0.1", "10.77.0.2"]
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Guests(Protocol):
    """Two guests, vm1 and vm2, on sockets of these names."""

    def start(self, addresses: list[str]) -> None:
        """Bring both up, with these addresses."""

    def ping(self, address: str) -> None:
        """Ping from vm1."""

    def transfer(self, address: str) -> None:
        """Move bytes between vm1 and the guest at the address and compare."""

    def transfer_from_host(self, address: str) -> None:
        """Move bytes from the host to vm1 and compare."""

    def stop(self) -> None:
        """Take both down; harmless when they are."""


def play(kind: str) -> int:
    """Play the story and return the exit code."""
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    screen = Screen()
    try:
        with _stage(screen) as switch:
            _perform(kind, switch, screen)
    except KeyboardInterrupt:
        screen.error("interrupted; everything has been taken down")
        return _INTERRUPTED
    except (VswitchError, OSError, subprocess.SubprocessError) as error:
        screen.error(str(error))
        return EXIT_FAILED
    screen.step(f"done: {screen.passed} checks passed, {screen.failed} failed")
    return EXIT_FAILED if screen.failed else EXIT_DONE


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler
    raise KeyboardInterrupt


@contextmanager
def _stage(screen: Screen) -> Iterator[Switch]:
    """A private directory with a switch in it, swept clean at the end."""
    directory = Path(tempfile.mkdtemp(prefix="vswitch-demo-"))
    switch = Switch(directory, screen)
    try:
        yield switch
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        switch.end()
        shutil.rmtree(directory, ignore_errors=True)


def _perform(kind: str, switch: Switch, screen: Screen) -> None:
    guests = _choose_guests(kind, switch.directory, screen)
    screen.step("starting the switch; the first time compiles its data path")
    switch.up()
    screen.step("adding ports: two guests and an uplink")
    for name in ("vm1", "vm2"):
        switch.show("add-port", f"{name}.sock")
    has_uplink = _add_uplink(switch, screen)
    try:
        guests.start(_ADDRESSES)
        _talk(guests, screen, has_uplink=has_uplink)
        screen.step("what the switch saw")
        for command in (("show",), ("fdb", "show"), ("stats",)):
            switch.show(*command)
        _check_ledger(switch, screen)
    finally:
        guests.stop()
    screen.step("throughput between two built-in guests, one worker")
    # An uplink's chatter would be flooded to the sink, and all frames are counted here.
    for name in ("vm1", "vm2", *([_TAP] if has_uplink else [])):
        switch.do("del-port", name)
    measure(switch, screen)
    screen.step("taking everything down")
    switch.down()


def _choose_guests(kind: str, directory: Path, screen: Screen) -> Guests:
    """The kind that was asked for, or that works here."""
    if kind == "auto" and not qemu.is_installed():
        screen.note(f"{qemu.QEMU} is not installed: using built-in guests instead")
        kind = "builtin"
    if kind == "builtin":
        return BuiltinGuests(directory, screen)
    return RealGuests(directory, screen)


def _add_uplink(switch: Switch, screen: Screen) -> bool:
    """Add a tap and give the host's end an address; False where we may not."""
    try:
        switch.show("add-port", f"tap:{_TAP}")
        address = ("ip", "address", "add", f"{_HOST}/24", "dev", _TAP)
        screen.command("host", " ".join(address))
        subprocess.run(address, check=True, capture_output=True)
    except (VswitchError, OSError, subprocess.CalledProcessError) as error:
        screen.note(f"no uplink: {error}")
        return False
    return True


def _talk(guests: Guests, screen: Screen, *, has_uplink: bool) -> None:
    screen.step("guest to guest")
    guests.ping(_ADDRESSES[1])
    guests.transfer(_ADDRESSES[1])
    if has_uplink:
        screen.step("guest to host, through the tap")
        guests.ping(_HOST)
        guests.transfer_from_host(_HOST)


def _check_ledger(switch: Switch, screen: Screen) -> None:
    """Each frame received is forwarded, flooded or dropped under one name."""
    ports = switch.ask("stats")["ports"].values()
    balanced = all(
        port["rx_frames"]
        == port["rx_forwarded"]
        + port["rx_flooded"]
        + sum(n for name, n in port.items() if name.startswith("rx_drop_"))
        for port in ports
    )
    screen.check("every frame is accounted for", ok=balanced)
