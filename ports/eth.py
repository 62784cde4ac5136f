"""An eth port: an existing interface as an uplink, through a packet socket.

Life cycle: `open` attaches to the interface, which is its owner's and stays as it is, but
for being promiscuous as long as we are attached. A keeper follows the link: up and down
are shown, and an interface that comes back under the same name is attached to anew.

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
from typing import Final, cast

import numpy as np

from ports import links, packet_socket
from ports.aio import unbroken
from ports.base import (
    KIND_ETH,
    KIND_NONE,
    NO_FD,
    RING_STARTING,
    RING_STOPPED,
    RINGS_PER_PORT,
    RX,
    TX,
)
from ports.errors import PortError
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
        self._socket: socket.socket | None = None
        self._mapping: Mapping | None = None
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
        self.warnings = await self._find_addresses()
        for warning in self.warnings:
            _log.warning("port %s: %s", self.name, warning)
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
        interface = f"interface {self.interface}"
        if self._trouble:
            return State("down", self._trouble)
        if self._link == "gone":
            return State("down", f"{interface} is gone (it may return)")
        if self._link == "moved":
            where = "in another network namespace"
            return State("down", f"{interface} is {where} (it may return)")
        if self._link == "down":
            remedy = f"ip link set {self.interface} up"
            return State("down", f"{interface} is down ({remedy})")
        if self._monitor.link and not self._monitor.link.has_carrier:
            remedy = "look at its cable, or set its peer up"
            return State("down", f"{interface} has no carrier ({remedy})")
        return State("up", f"{interface} is up")

    def features(self) -> list[str]:
        """What the kernel does and lets us do."""
        return feature_names(self._receiver | self._sender)

    def queues(self) -> dict[str, int]:
        """One ring in, one way out."""
        return {"enabled": 1, "max": 1}

    # --- the interface ---

    async def _attach(self) -> None:
        link = await links.look_up(self.interface)
        check(self.interface, link)
        sock, segments_udp = packet_socket.open_socket(self.interface, link.ifindex)
        self._socket, self._index = sock, link.ifindex
        self._mapping = await self._host.map(sock.fileno(), RING_LEN, 0, _PAGE)
        self._receiver, self._sender = RECEIVER, SENDER
        if not segments_udp:
            self._receiver &= ~RECEIVER_USO
            self._sender &= ~SENDER_USO
        record = self._host.ports[self._slot]
        record["kind"], record["pairs"] = KIND_ETH, 1
        record["max_frame"] = link.mtu + _ETHERNET
        record["offloads"] = self._receiver
        for index in (TX, RX):
            ring = self._ring(index)
            ring["owner"] = self._host.owner_for(self._slot, 0)
            ring["port"], ring["enabled"] = self._slot, 1
            ring["header_len"], ring["features"] = VNET_HDR_LEN, self._sender
            ring["shared"], ring["lock"] = 0, 0
            ring["kick_fd"] = self._mapping.number
            ring["call_fd"] = ring["err_fd"] = NO_FD
        ring = self._ring(RX)
        ring["desc"], ring["size"], ring["next_avail"] = self._mapping.addr, SLOTS, 0
        for index in (TX, RX):
            self._ring(index)["state"] = RING_STARTING
        await self._host.sync()
        record["up"] = 1

    async def _detach(self) -> None:
        record = self._host.ports[self._slot]
        record["up"] = 0
        for index in (TX, RX):
            self._ring(index)["state"] = RING_STOPPED
        await self._host.sync()
        record["kind"] = KIND_NONE
        for index in (TX, RX):
            self._ring(index)["kick_fd"] = NO_FD
        if self._mapping:
            await self._host.unmap([self._mapping])
            self._mapping = None
        if self._socket:
            self._socket.close()
            self._socket = None
        self._index = 0

    async def _find_addresses(self) -> list[str]:
        """What to say of the interface's addresses, if it has any."""
        try:
            found = await links.addresses(self._index)
        except OSError:  # it is gone, or nobody may ask
            return []
        return [move_addresses(self.interface, found)] if found else []

    # --- the keeper ---

    def _on_link(self, state: str) -> None:
        self._link = state
        if state in {"gone", "moved"}:
            self._index = 0  # an interface that comes back may have the same
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
        if self._socket:
            packet_socket.forget_error(self._socket)
            record["missed"] += packet_socket.count_missed(self._socket)
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
            _log.info("port %s: attached to %s again", self.name, self.interface)

    def _ring(self, index: int) -> np.void:
        return cast("np.void", self._host.rings[self._slot * RINGS_PER_PORT + index])


def check(interface: str, link: Link) -> None:
    """Refuse an interface that cannot be an uplink.

    Raises:
        PortError: It is not Ethernet, a wireless station, or has a master.
    """
    cannot = f"cannot use interface {interface}"
    if link.hardware != _ARPHRD_ETHER:
        found = _HARDWARE.get(link.hardware, f"its hardware type is {link.hardware}")
        raise PortError(f"{cannot}: it is not Ethernet: {found} (choose another)")
    if packet_socket.is_wireless(interface):
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
