"""An eth port: an existing interface as an uplink, through a packet socket.

Where several workers forward, each has a pair of its own, which is a socket and its ring;
the kernel spreads flows over them, and whoever sends does so by its own socket.

The kernel's own network stack goes on using the interface, and what it sends is not for
us. So this machine cannot be reached from a guest by addresses that the interface has;
`warnings` tells how to move them.

`eth_data` has the other half, `packet_socket` what is set on the socket.
"""

import socket
from collections.abc import Sequence
from typing import Final

from ports import packet_socket
from ports.base import KIND_ETH
from ports.errors import PortError, errno_name
from ports.host import Host, Mapping
from ports.interface import InterfacePort, move_addresses
from ports.links import Link
from ports.packet_ring import RING_LEN, SLOTS, VNET_HDR_LEN
from ports.vhost.features import (
    RECEIVER,
    RECEIVER_USO,
    SENDER,
    SENDER_USO,
    feature_names,
)

_PAGE: Final = 4096


class EthPort(InterfacePort):
    """Control half of an eth port."""

    kind = "eth"

    def __init__(
        self, host: Host, slot: int, name: str, interface: str, most_queues: int
    ) -> None:
        super().__init__(host, slot, name, interface)
        self._most_queues = most_queues
        self._sockets: list[socket.socket] = []
        self._mappings: list[Mapping] = []  # of their rings
        self._receiver = self._sender = 0

    def features(self) -> list[str]:
        """What the kernel does and lets us do."""
        return feature_names(self._receiver | self._sender)

    def queues(self) -> dict[str, int]:
        """A pair for each worker; one as long as the interface has not been up."""
        return {"enabled": len(self._sockets), "max": self._most_pairs()}

    # --- the interface ---

    async def _take(self, link: Link) -> None:
        self._sockets, segments_udp = packet_socket.open_sockets(
            self.interface, link.ifindex, self._most_pairs()
        )
        await self._map_rings()
        self._receiver, self._sender = RECEIVER, SENDER
        if not segments_udp:
            self._receiver &= ~RECEIVER_USO
            self._sender &= ~SENDER_USO
        record = self._host.ports[self._slot]
        record["kind"], record["pairs"] = KIND_ETH, len(self._sockets)
        record["offloads"] = self._receiver
        pairs = zip(self._mappings, self._host.active, strict=False)
        for pair, (mapping, owner) in enumerate(pairs):
            fields = {
                "owner": owner,
                "kick_fd": mapping.number,
                "desc": (0, mapping.addr),
                "size": (0, SLOTS),
                "next_avail": 0,
                "header_len": VNET_HDR_LEN,
                "features": self._sender,
                "shared": 0,
            }
            self._start(pair, fields)

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

    async def _let_go(self) -> None:
        mappings, self._mappings = self._mappings, []
        if mappings:
            await self._host.unmap(mappings)
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            sock.close()

    # --- the keeper ---

    def _on_link(self, state: str) -> None:
        # Flows can be spread from the first time on that the interface is up.
        alone = len(self._sockets) < self._most_pairs()
        if state == "up" and self._link != "up" and alone:
            self._index = 0
        super()._on_link(state)

    def _count_missed(self) -> None:
        """Note what found the rings full; and forget a link that went down once."""
        record = self._host.ports[self._slot]
        for sock in self._sockets:
            packet_socket.forget_error(sock)
            record["missed"] += packet_socket.count_missed(sock)

    def _find_warnings(self, addresses: Sequence[str]) -> Sequence[str]:
        if not addresses:
            return ()
        return (move_addresses(self.interface, addresses, "guests cannot"),)

    def _most_pairs(self) -> int:
        return min(len(self._host.active), self._most_queues)
