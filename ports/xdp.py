"""An xdp port: an existing interface as an uplink, through AF_XDP sockets.

The interface runs a program of ours that gives every frame to a socket of ours; the
kernel's own network stack gets none any more. Each receive queue has a socket, served by
one worker. When the port goes, or we are killed, the program goes, and the interface is
what it was.

Frames come before the kernel has looked at them, and go to the driver's queue directly.
So there are no offloads: a guest's are done by us. An interface whose driver cannot run
a program (native XDP) can have it run later in the kernel's own code (generic XDP), where
several frames may have become one of unknown pieces. That is switched off where it is the
driver's and ours to switch. Where it is the sender's, as with a macvlan or a tap, we
refuse the interface; an eth port has headers that say what a frame is.

A veth's frames come from another part of this machine. Its checksums may be only begun:
`offload.find_begun`. VLAN tags may be beside the frame: `xdp_program`.

`xdp_data` has the other half, `xdp_socket` what is set on a socket.
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from ports import bpf, ethtool, xdp_program
from ports.base import KIND_XDP, MAX_PAIRS
from ports.errors import PortError, explain
from ports.ethtool import Setting
from ports.host import Host, Mapping
from ports.interface import ETHERNET, InterfacePort, move_addresses
from ports.links import Link
from ports.packet_socket import promiscuous
from ports.vhost.virtio import NET_HDR_LEN
from ports.xdp_program import GENERIC, NATIVE, Program
from ports.xdp_ring import PAGE, XSK, layout_for
from ports.xdp_socket import COPY, RINGS, Queue

_TAG: Final = 4
_HARDWARE: Final = ""  # Link.kind
_VETH: Final = "veth"
_TRIES: Final = 100
_TRY_AGAIN_S: Final = 0.02
_CAUSES: Final = {
    errno.EAFNOSUPPORT: "the kernel has no AF_XDP (use eth:{})",
    errno.EBUSY: "another program has its queues (end that, or use eth:{})",
    errno.EINVAL: "frames as long as its MTU take Linux 6.6 (lower it, or use eth:{})",
    errno.ENOBUFS: "we may not lock enough memory (raise ulimit -l)",
    errno.ENOMEM: "there is no memory for its queues (free some)",
}


class _Served(NamedTuple):
    """A receive queue, and where workers have it mapped."""

    queue: Queue
    mappings: list[Mapping]  # its memory, then its rings


class XdpPort(InterfacePort):
    """Control half of an xdp port."""

    kind = "xdp"

    def __init__(self, host: Host, slot: int, name: str, interface: str) -> None:
        super().__init__(host, slot, name, interface)
        self._program: Program | None = None
        self._served: list[_Served] = []
        self._listener: socket.socket | None = None  # has the interface promiscuous
        self._switched_off: list[tuple[int, Setting]] = []  # interfaces' settings
        self._layout = layout_for(0)
        self._queues = (0, 0)  # of the interface: to receive by, to transmit by
        self._has_copies = True
        self._is_veth = False

    def features(self) -> list[str]:
        """How frames come and go."""
        if self._program is None:
            return []
        words = ["native" if self._program.mode == NATIVE else "generic"]
        words.append("copy" if self._has_copies else "zero-copy")
        words += ["fragments"] * self._layout.pieces
        return words + ["vlan-tags"] * self._program.has_tags

    def queues(self) -> dict[str, int]:
        """One for each receive queue of the interface."""
        return {"enabled": len(self._served), "max": len(self._served)}

    # --- the interface ---

    async def _take(self, link: Link) -> None:
        self._is_veth = link.kind == _VETH
        self._layout = layout_for(link.mtu + ETHERNET + _TAG)
        self._queues = ethtool.count_queues(link.ifindex)
        check(self.interface, link, self._queues[0])
        # The first time takes a tenth of a second, in which nobody should wait for us.
        await asyncio.to_thread(xdp_program.function_for_tags)
        program = self._program = Program(
            self.interface, link.ifindex, fragments=self._layout.pieces
        )
        modes = [NATIVE] if self._is_veth else [NATIVE, GENERIC]
        await asyncio.to_thread(program.attach, modes)  # a driver may begin anew
        try:
            self._switch_off(link.ifindex)
            self._listener = promiscuous(link.ifindex)
            for number in range(self._queues[0]):
                await self._serve(program, link, number)
        except OSError as error:
            cannot = f"cannot attach to interface {self.interface}"
            raise PortError(f"{cannot}: {self._why(error)}") from error
        self._keep_open()
        self._note_link()
        record = self._host.ports[self._slot]
        record["kind"], record["pairs"] = KIND_XDP, min(self._queues)
        record["offloads"] = 0
        # There are no headers; if one is missing is found out.
        looks = self._is_veth or program.mode == GENERIC
        for pair, served in enumerate(self._served):
            memory, ring, *_ = served.mappings
            fields = {
                "owner": self._host.owner_for(self._slot, pair),
                "kick_fd": ring.number,
                "desc": (memory.addr + XSK.itemsize, memory.addr),
                "header_len": NET_HDR_LEN if looks else 0,
                "features": 0,
                "shared": int(self._host.several),
            }
            self._start(pair, fields)

    def _keep_open(self) -> None:
        """Let the program, and that the interface is promiscuous, outlive us."""
        words = {"switched_off": [[n, *setting] for n, setting in self._switched_off]}
        fds = [self._program.fileno()] if self._program else []
        fds += [self._listener.fileno()] if self._listener else []
        self._host.keep(self._slot, words, fds)

    def _inherit(self, kept: dict[str, Any]) -> None:
        settings = kept.get("switched_off", [])
        self._switched_off = [(n, Setting(*setting)) for n, *setting in settings]

    async def _serve(self, program: Program, link: Link, number: int) -> None:
        """Make a socket for a queue, have it mapped, and give frames to it."""
        queue = Queue(self._layout)
        served = _Served(queue, [])
        self._served.append(served)
        parts = [(queue.file, self._layout.length, 0)]
        for which, ring in enumerate(RINGS):
            parts.append((queue.fileno(), queue.ring_len(which), ring.offset))
        for fd, length, offset in parts:
            mapping = await self._host.map(fd, length, offset, PAGE, self._on_unmapped)
            served.mappings.append(mapping)
        memory, *rings = (mapping.addr for mapping in served.mappings)
        queue.describe(memory, rings)
        flags = COPY if program.mode == GENERIC else 0
        self._has_copies = await _bind(queue, link.ifindex, number, flags)
        program.serve(number, queue.fileno())

    async def _let_go(self) -> None:
        if self._program:
            await asyncio.to_thread(self._program.close)
            self._program = None
        for index, setting in self._switched_off:
            with contextlib.suppress(OSError):  # the interface is gone
                ethtool.switch_on(index, setting)
        self._switched_off = []
        self._keep_open()
        if self._listener:
            self._listener.close()
            self._listener = None
        served, self._served = self._served, []
        for queue, mappings in served:
            await self._host.unmap(mappings)
            queue.close()

    def _switch_off(self, index: int) -> None:
        """Have frames come as they were on the wire."""
        settings = [] if self._is_veth else [ethtool.RX_VLAN]
        if self._program and self._program.mode == GENERIC:
            settings.append(ethtool.GRO)
        for setting in settings:
            if ethtool.switch_off(index, setting):
                self._switched_off.append((index, setting))

    def _why(self, error: OSError) -> str:
        rights = f"we have no {bpf.missing_rights()} (run as root, or grant it)"
        found = explain(error, _CAUSES | {errno.EPERM: rights}, "use eth:{}")
        return found.replace("{}", self.interface)

    # --- the keeper ---

    def _serves(self, link: Link) -> bool:
        fits = self._layout == layout_for(link.mtu + ETHERNET + _TAG)
        return fits and self._queues == ethtool.count_queues(link.ifindex)

    def _note_link(self) -> None:
        link = self._monitor.link
        down = link is None or not (link.is_up and link.has_carrier)
        for queue, _ in self._served:
            queue.set_link_down(down=down)

    def _on_unmapped(self) -> None:
        """A worker that started later could not map a ring: see `xdp_socket`."""
        self._index = 0
        self._changed.set()

    def _count_missed(self) -> None:
        record = self._host.ports[self._slot]
        for queue, _ in self._served:
            record["missed"] += queue.count_missed()
        if self._program:
            record["missed"] += self._program.count_lost()

    def _find_warnings(self, addresses: Sequence[str]) -> Sequence[str]:
        warnings = []
        if addresses:
            warnings.append(move_addresses(self.interface, addresses, "nobody can"))
        if self._is_veth and self._program and not self._program.has_tags:
            text = f"interface {self.interface} loses VLAN tags that its peer does not"
            off = "txvlan off tx-vlan-stag-hw-insert off"
            remedy = f"where the peer is: ethtool -K PEER {off}"
            warnings.append(f"{text} write into frames ({remedy})")
        return warnings

    def _how(self) -> str:
        if not self._program:
            return ""
        copies = "copy mode" if self._has_copies else "zero-copy"
        if self._program.mode == NATIVE:
            return f" (native XDP, {copies})"
        return f" (generic XDP: {self._program.reason})"


async def _bind(queue: Queue, ifindex: int, number: int, flags: int) -> bool:
    """Bind a socket; the kernel takes its time to be done with one that was closed."""
    for _ in range(_TRIES):
        try:
            return await asyncio.to_thread(queue.bind, ifindex, number, flags)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        await asyncio.sleep(_TRY_AGAIN_S)
    return queue.bind(ifindex, number, flags)


def check(interface: str, link: Link, rx_queues: int) -> None:
    """Refuse an interface whose frames may be other than they seem.

    Raises:
        PortError: It is no hardware and no veth, or has more queues than a port can.
    """
    cannot = f"cannot use interface {interface} by XDP"
    if link.kind not in {_HARDWARE, _VETH}:
        found = f"it is a {link.kind}, whose senders leave cutting frames to others"
        raise PortError(f"{cannot}: {found} (use eth:{interface})")
    if rx_queues > MAX_PAIRS:
        found = f"it has {rx_queues} receive queues, and a port at most {MAX_PAIRS}"
        raise PortError(f"{cannot}: {found} (ethtool -L, or use eth:{interface})")
