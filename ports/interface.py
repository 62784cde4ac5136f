"""An existing interface as an uplink: what is the same however its frames come and go.

Life cycle: `open` attaches to the interface, which is its owner's and stays as it is, but
for being promiscuous as long as we are attached. A keeper follows the link: up and down
are shown, and an interface that comes back under the same name is attached to anew.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ports import links
from ports.aio import unbroken
from ports.base import (
    KIND_NONE,
    NO_FD,
    RING_STARTING,
    RING_STOPPED,
    RINGS_PER_PORT,
)
from ports.errors import PortError
from ports.host import NO_CHOICE, Host, State
from ports.links import Link, LinkMonitor
from ports.packet_socket import is_wireless
from ports.vhost.channel import close_fds

ETHERNET: Final = 14  # bytes of a header without a tag
_LOOK_AGAIN_S: Final = 1.0
# linux/if_arp.h
_ARPHRD_ETHER: Final = 1
_HARDWARE: Final = {
    772: "it is the loopback",
    65534: "it carries IP without Ethernet, as tun and WireGuard do",
}

_log = logging.getLogger(__name__)


class InterfacePort:
    """Control half of a port on an interface; what a kind adds is at the end."""

    kind = ""
    mode = ""
    backend = NO_CHOICE

    def __init__(self, host: Host, slot: int, name: str, interface: str) -> None:
        self.name = name
        self.interface = interface
        self.warnings: Sequence[str] = ()
        self._host = host
        self._slot = slot
        self._index = 0  # of the interface that we are attached to
        self._link = "down"
        self._trouble = ""
        self._changed = asyncio.Event()
        self._monitor = LinkMonitor(interface, self._on_link, returns=True)
        self._keeper: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Attach to the interface and start its rings.

        Raises:
            PortError: There is none, it is not for us, or we lack the right.
        """
        await self._attach()
        await self._monitor.start()
        await self._warn()
        self._keeper = asyncio.create_task(self._keep())

    async def resume(self, kept: dict[str, Any], fds: Sequence[int]) -> None:
        """Attach anew in place of a manager that was killed; no ring is in use.

        Raises:
            PortError: As `open` does.
        """
        self._host.keep(self._slot, kept, [])
        close_fds(fds)
        self._host.settle()  # what the interface ran is gone with its last descriptor
        self._inherit(kept)
        await self.open()

    async def close(self) -> None:
        """Detach; the interface is as it was."""
        if self._keeper:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        await self._monitor.stop()
        await self._detach()

    def state(self) -> State:
        """The port's state and its reason."""
        if self._trouble:
            return State("down", self._trouble)
        name, link = self.interface, self._monitor.link
        carried = link is not None and link.has_carrier
        found = (
            (self._link == "gone", "gone (it may return)"),
            (self._link == "moved", "in another network namespace (it may return)"),
            (not self._host.ports[self._slot]["up"], "there and being attached to"),
            (self._link == "down", f"down (ip link set {name} up)"),
            (not carried, "without a carrier (look at its cable, or set its peer up)"),
        )
        for holds, what in found:
            if holds:
                return State("down", f"interface {name} is {what}")
        return State("up", f"interface {name} is up{self._how()}")

    # --- attached ---

    async def _attach(self) -> None:
        link = await links.look_up(self.interface)
        check(self.interface, link)
        self._index = link.ifindex
        await self._take(link)
        record = self._host.ports[self._slot]
        record["max_frame"] = link.mtu + ETHERNET
        await self._host.sync()
        record["up"] = 1

    async def _detach(self) -> None:
        record = self._host.ports[self._slot]
        record["up"] = 0
        self._rings()["state"] = RING_STOPPED
        await self._host.sync()
        record["kind"], record["pairs"] = KIND_NONE, 0
        self._rings()["kick_fd"] = NO_FD
        self._count_missed()
        await self._let_go()
        self._index = 0

    async def _warn(self) -> None:
        """Say what whoever added the port should know."""
        self.warnings = ()
        with contextlib.suppress(OSError):  # it is gone, or nobody may ask
            self.warnings = self._find_warnings(await links.addresses(self._index))
        for warning in self.warnings:
            _log.warning("port %s: %s", self.name, warning)

    # --- the keeper ---

    def _on_link(self, state: str) -> None:
        if state in {"gone", "moved"}:
            self._index = 0  # an interface that comes back may have the same
            self._trouble = ""
        self._link = state
        self._note_link()
        self._changed.set()

    async def _keep(self) -> None:
        """Follow the link and, every second, what it lost."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await self._changed.wait()
            self._changed.clear()
            await unbroken(self._follow())

    async def _follow(self) -> None:
        self._count_missed()
        link = self._monitor.link
        if link is None:
            if self._host.ports[self._slot]["kind"] != KIND_NONE:
                await self._detach()
            return
        if link.ifindex == self._index and self._serves(link):
            self._host.ports[self._slot]["max_frame"] = link.mtu + ETHERNET
            return
        try:
            await self._detach()
            await self._attach()
        except (PortError, OSError, MemoryError) as error:
            await self._detach()
            if str(error) != self._trouble:
                self._trouble = str(error)
                _log.warning("port %s: %s", self.name, self._trouble)
        else:
            self._trouble = ""
            await self._warn()
            _log.info("port %s: attached to %s again", self.name, self.interface)

    def _rings(self) -> NDArray[np.void]:
        first = self._slot * RINGS_PER_PORT
        return self._host.rings[first : first + RINGS_PER_PORT]

    def _start(self, pair: int, fields: Mapping[str, object]) -> None:
        """Have a worker serve a pair from the next sync on; `fields` are RING's.

        A value for each of the two rings is a tuple in their order, (TX, RX).
        """
        rings = self._rings()[2 * pair : 2 * pair + 2]
        rings["port"], rings["enabled"], rings["lock"] = self._slot, 1, 0
        rings["call_fd"] = rings["err_fd"] = NO_FD
        for name, value in fields.items():
            rings[name] = value
        rings["state"] = RING_STARTING

    # --- what a kind adds ---

    async def _take(self, link: Link) -> None:
        """Open what frames come and go by; have the rings STARTING. Raises PortError."""
        raise NotImplementedError

    async def _let_go(self) -> None:
        """Give all of that back, if there is any; no worker uses it."""
        raise NotImplementedError

    def _serves(self, _: Link) -> bool:
        """Whether what we have still serves the interface as it is now."""
        return True

    def _inherit(self, kept: dict[str, Any]) -> None:
        """Take up what was kept, but for descriptors."""

    def _note_link(self) -> None:
        """Look at the monitor's link, which may have changed."""

    def _count_missed(self) -> None:
        """Add what was lost before us to PORT.missed."""
        raise NotImplementedError

    def _find_warnings(self, addresses: Sequence[str]) -> Sequence[str]:
        """What there is to say of an interface with these addresses."""
        raise NotImplementedError

    def _how(self) -> str:
        """What to say of an interface that is up; begins with a space if anything."""
        return ""


def check(interface: str, link: Link) -> None:
    """Refuse an interface that cannot be an uplink.

    Raises:
        PortError: It is not Ethernet, a wireless station, or has a master.
    """
    cannot = f"cannot use interface {interface}"
    if link.hardware != _ARPHRD_ETHER:
        found = _HARDWARE.get(link.hardware, f"its hardware type is {link.hardware}")
        raise PortError(f"{cannot}: it is not Ethernet: {found} (choose another)")
    if is_wireless(interface, link.ifindex):
        found = "it is a wireless station, which sends from no address but its own"
        raise PortError(f"{cannot}: {found} (choose another, or route)")
    if link.master:
        master = _name_of(link.master)
        found = f"it belongs to {master} already"
        raise PortError(f"{cannot}: {found} (ip link set {interface} nomaster)")


def move_addresses(interface: str, addresses: Sequence[str], who: str) -> str:
    """What to say of addresses that are out of reach, and what to do about it."""
    tap = f"{interface[:10]}-host"
    moves = "; ".join(
        f"ip address del {address} dev {interface}"
        f" && ip address add {address} dev {tap}"
        for address in addresses
    )
    return (
        f"interface {interface} has {', '.join(addresses)}, where {who} reach this"
        f" machine (move to a tap port: vswitch add-port tap:{tap}; {moves})"
    )


def _name_of(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"interface {index}"
