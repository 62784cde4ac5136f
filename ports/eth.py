"""An eth port: an existing interface as an uplink, through a packet socket.

Life cycle: `open` attaches to the interface, which is its owner's and stays as it is, but
for being promiscuous as long as we are attached. A keeper follows the link: up and down
are shown, and an interface that comes back under the same name is attached to anew.

Where several workers forward, each has a pair of its own, which is a socket and its ring;
the kernel spreads flows over them, and whoever sends does so by its own socket.

The kernel's own network stack goes on using the interface, and what it sends is not for
us. So this machine cannot be reached from a guest by addresses that the interface has;
`warnings` tells how to move them.

`eth_data` has the other half, `packet_socket` what is set on the socket.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ports import links, packet_socket
from ports.aio import unbroken
from ports.base import (
    KIND_ETH,
    KIND_NONE,
    MAX_PAIRS,
    NO_FD,
    RING_STARTING,
    RING_STOPPED,
    RINGS_PER_PORT,
    RX,
)
from ports.errors import PortError, errno_name
from ports.host import Host, Mapping, State
from ports.links import Link, LinkMonitor
from ports.packet_ring import RING_LEN, SLOTS, VNET_HDR_LEN
from ports.vhost.features import (
    RECEIVER,
    RECEIVER_USO,
    SENDER,
    SENDER_USO,
    feature_names,
)

_ETHERNET: Final = 14  # bytes of a header without a tag
_PAGE: Final = 4096
_LOOK_AGAIN_S: Final = 1.0
# linux/if_arp.h
_ARPHRD_ETHER: Final = 1
_HARDWARE: Final = {
    772: "it is the loopback",
    65534: "it carries IP without Ethernet, as tun and WireGuard do",
}

_log = logging.getLogger(__name__)


class EthPort:
    """Control half of an eth port."""

    kind = "eth"
    mode = ""

    def __init__(self, host: Host, slot: int, name: str, interface: str) -> None:
        self.name = name
        self.interface = interface
        self.warnings: Sequence[str] = ()
        self._host = host
        self._slot = slot
        self._sockets: list[socket.socket] = []
        self._mappings: list[Mapping] = []  # of their rings
        self._index = 0  # of the interface that we are attached to
        self._link = "down"
        self._trouble = ""
        self._receiver = self._sender = 0
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
        await self._look_for_addresses()
        self._keeper = asyncio.create_task(self._keep())

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
        return State("up", f"interface {name} is up")

    def features(self) -> list[str]:
        """What the kernel does and lets us do."""
        return feature_names(self._receiver | self._sender)

    def queues(self) -> dict[str, int]:
        """A pair for each worker; one as long as the interface has not been up."""
        return {"enabled": len(self._sockets), "max": self._most_pairs()}

    # --- the interface ---

    async def _attach(self) -> None:
        link = await links.look_up(self.interface)
        check(self.interface, link)
        self._sockets, segments_udp = packet_socket.open_sockets(
            self.interface, link.ifindex, self._most_pairs()
        )
        self._index = link.ifindex
        await self._map_rings()
        self._receiver, self._sender = RECEIVER, SENDER
        if not segments_udp:
            self._receiver &= ~RECEIVER_USO
            self._sender &= ~SENDER_USO
        record = self._host.ports[self._slot]
        record["kind"], record["pairs"] = KIND_ETH, len(self._sockets)
        record["max_frame"] = link.mtu + _ETHERNET
        record["offloads"] = self._receiver
        for pair, owner in enumerate(self._host.active[: len(self._sockets)]):
            self._start(pair, owner)
        await self._host.sync()
        record["up"] = 1

    async def _map_rings(self) -> None:
        """Give every worker the sockets and their rings.

        Raises:
            PortError: A worker could not map one.
        """
        try:
            for sock in self._sockets:
                mapping = await self._host.map(sock.fileno(), RING_LEN, 0, _PAGE)
                self._mappings.append(mapping)
        except OSError as error:
            text = f"cannot map the ring of {self.interface}: {errno_name(error)}"
            raise PortError(f"{text} (look at how much memory is free)") from error

    def _start(self, pair: int, owner: int) -> None:
        """Have a worker serve a pair from the next sync on."""
        mapping = self._mappings[pair]
        rings = self._rings()[2 * pair : 2 * pair + 2]
        rings["owner"], rings["port"], rings["enabled"] = owner, self._slot, 1
        rings["header_len"], rings["features"] = VNET_HDR_LEN, self._sender
        rings["shared"], rings["lock"], rings["next_avail"] = 0, 0, 0
        rings["kick_fd"] = mapping.number
        rings["call_fd"] = rings["err_fd"] = NO_FD
        rings["desc"][RX], rings["size"][RX] = mapping.addr, SLOTS
        rings["state"] = RING_STARTING

    async def _detach(self) -> None:
        record = self._host.ports[self._slot]
        record["up"] = 0
        self._rings()["state"] = RING_STOPPED
        await self._host.sync()
        record["kind"], record["pairs"] = KIND_NONE, 0
        self._rings()["kick_fd"] = NO_FD
        mappings, self._mappings = self._mappings, []
        if mappings:
            await self._host.unmap(mappings)
        self._count_missed()
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            sock.close()
        self._index = 0

    async def _look_for_addresses(self) -> None:
        """Warn of the interface's addresses, if it has any."""
        self.warnings = ()
        with contextlib.suppress(OSError):  # it is gone, or nobody may ask
            if found := await links.addresses(self._index):
                self.warnings = (move_addresses(self.interface, found),)
        for warning in self.warnings:
            _log.warning("port %s: %s", self.name, warning)

    # --- the keeper ---

    def _on_link(self, state: str) -> None:
        # Flows can be spread from the first time on that the interface is up.
        alone = len(self._sockets) < self._most_pairs()
        comes_up = state == "up" and self._link != "up"
        if state in {"gone", "moved"}:
            self._index = 0  # an interface that comes back may have the same
            self._trouble = ""
        elif comes_up and alone:
            self._index = 0
        self._link = state
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
        record = self._host.ports[self._slot]
        self._count_missed()
        link = self._monitor.link
        if link is None:
            return
        if link.ifindex == self._index:
            record["max_frame"] = link.mtu + _ETHERNET
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
            await self._look_for_addresses()
            _log.info("port %s: attached to %s again", self.name, self.interface)

    def _count_missed(self) -> None:
        """Note what found the rings full; and forget a link that went down once."""
        record = self._host.ports[self._slot]
        for sock in self._sockets:
            packet_socket.forget_error(sock)
            record["missed"] += packet_socket.count_missed(sock)

    def _most_pairs(self) -> int:
        return min(len(self._host.active), MAX_PAIRS)

    def _rings(self) -> NDArray[np.void]:
        first = self._slot * RINGS_PER_PORT
        return self._host.rings[first : first + RINGS_PER_PORT]


def check(interface: str, link: Link) -> None:
    """Refuse an interface that cannot be an uplink.

    Raises:
        PortError: It is not Ethernet, a wireless station, or has a master.
    """
    cannot = f"cannot use interface {interface}"
    if link.hardware != _ARPHRD_ETHER:
        found = _HARDWARE.get(link.hardware, f"its hardware type is {link.hardware}")
        raise PortError(f"{cannot}: it is not Ethernet: {found} (choose another)")
    if packet_socket.is_wireless(interface, link.ifindex):
        found = "it is a wireless station, which sends from no address but its own"
        raise PortError(f"{cannot}: {found} (choose another, or route)")
    if link.master:
        master = _name_of(link.master)
        found = f"it belongs to {master} already"
        raise PortError(f"{cannot}: {found} (ip link set {interface} nomaster)")


def move_addresses(interface: str, addresses: Sequence[str]) -> str:
    """What to say of addresses that guests will not reach, and what to do about it."""
    tap = f"{interface[:10]}-host"
    moves = "; ".join(
        f"ip address del {address} dev {interface}"
        f" && ip address add {address} dev {tap}"
        for address in addresses
    )
    return (
        f"interface {interface} has {', '.join(addresses)}, where guests cannot reach"
        f" this machine (move to a tap port: vswitch add-port tap:{tap}; {moves})"
    )


def _name_of(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"interface {index}"
