"""A tap port: a Linux tap interface as an uplink. Control half; `tap_data` has the other.

Life cycle: `open` attaches to the interface, which the kernel makes if it is absent, and
sets it up. An interface that we made goes away with our last descriptor; one that was
there (`ip tuntap add`) stays, and loses the offloads that we could do. The link going
down and up is followed and shown; frames for a link that is down are counted by the data
path, as the kernel refuses them.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from typing import Final, cast

import numpy as np

from ports.base import (
    KIND_NONE,
    KIND_TAP,
    NO_FD,
    RING_STARTING,
    RING_STOPPED,
    RINGS_PER_PORT,
    RX,
    TX,
)
from ports.burst import MAX_FRAME
from ports.errors import PortError, explain
from ports.host import Host, State
from ports.links import LinkMonitor, bring_up, check_name
from ports.vhost.features import (
    RECEIVER,
    RECEIVER_USO,
    SENDER,
    SENDER_USO,
    feature_names,
)
from ports.vhost.virtio import NET_HDR_LEN

# linux/if_tun.h
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUN_F_TCP: Final = 0x0F  # checksums, TCP segments over IPv4 and IPv6, ECN
_TUN_F_UDP: Final = 0x60  # UDP segments over IPv4 and IPv6, since Linux 6.2
_IFF_VNET_HDR: Final = 0x4000
_IFF_TAP: Final = 0x0002
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_NO_PI: Final = 0x1000
_IFREQ: Final = "16sH22x"
_DEVICE: Final = "/dev/net/tun"

_CAUSES: Final = {
    errno.EBUSY: "another program is attached to it (end it, or choose another name)",
    errno.EINVAL: "it exists and is not a tap (choose another name)",
    errno.EPERM: "we have no CAP_NET_ADMIN (run as root, or grant the capability)",
    errno.EACCES: f"we may not open {_DEVICE} (run as root)",
    errno.ENOENT: f"there is no {_DEVICE} (modprobe tun)",
    errno.ENODEV: f"there is no driver behind {_DEVICE} (modprobe tun)",
}


class TapPort:
    """Control half of a tap port."""

    kind = "tap"
    mode = ""
    warnings: Sequence[str] = ()

    def __init__(self, host: Host, slot: int, name: str, interface: str) -> None:
        self.name = name
        self.interface = interface
        self._host = host
        self._slot = slot
        self._fd = NO_FD
        self._number = NO_FD
        self._link = "down"
        self._receiver, self._sender = RECEIVER, SENDER
        self._monitor = LinkMonitor(interface, self._on_link)

    async def open(self) -> None:
        """Attach to the interface, set it up, and start its rings.

        Raises:
            PortError: It is no tap, is taken, or we lack the right.
        """
        self._fd, segments_udp = attach(self.interface)
        if not segments_udp:
            self._receiver &= ~RECEIVER_USO
            self._sender &= ~SENDER_USO
        await bring_up(self.interface)
        await self._monitor.start()
        (self._number,) = await self._host.install([self._fd])
        record = self._host.ports[self._slot]
        record["kind"], record["fd"] = KIND_TAP, self._number
        record["max_frame"], record["pairs"] = MAX_FRAME, 1
        record["offloads"] = self._receiver
        for index in (TX, RX):
            ring = self._ring(index)
            ring["owner"] = self._host.owner_for(self._slot, 0)
            ring["port"], ring["enabled"] = self._slot, 1
            ring["header_len"], ring["features"] = NET_HDR_LEN, self._sender
            ring["shared"], ring["lock"] = 0, 0
            ring["call_fd"] = ring["err_fd"] = NO_FD
            ring["kick_fd"] = self._number if index == RX else NO_FD
            ring["state"] = RING_STARTING
        await self._host.sync()
        record["up"] = 1

    async def close(self) -> None:
        """Detach; an interface that we made goes away."""
        await self._monitor.stop()
        record = self._host.ports[self._slot]
        record["up"] = 0
        for index in (TX, RX):
            self._ring(index)["state"] = RING_STOPPED
        await self._host.sync()
        record["kind"], record["fd"] = KIND_NONE, NO_FD
        self._ring(RX)["kick_fd"] = NO_FD
        if self._number != NO_FD:
            await self._host.uninstall([self._number])
            self._number = NO_FD
        if self._fd != NO_FD:
            detach(self._fd)
            self._fd = NO_FD

    def state(self) -> State:
        """The port's state and its reason."""
        if self._link == "up":
            return State("up", f"interface {self.interface} is up")
        if self._link == "moved":
            where = "in another network namespace, where its link cannot be seen"
            return State("up", f"interface {self.interface} is {where}")
        if self._link == "gone":
            remedy = f"vswitch del-port {self.name}, then add it again"
            return State("down", f"interface {self.interface} is gone ({remedy})")
        remedy = f"ip link set {self.interface} up"
        return State("down", f"interface {self.interface} is down ({remedy})")

    def features(self) -> list[str]:
        """What the kernel does and lets us do."""
        return feature_names(self._receiver | self._sender)

    def queues(self) -> dict[str, int]:
        """A tap has one pair."""
        return {"enabled": 1, "max": 1}

    def _on_link(self, state: str) -> None:
        self._link = state

    def _ring(self, index: int) -> np.void:
        return cast("np.void", self._host.rings[self._slot * RINGS_PER_PORT + index])


def attach(interface: str) -> tuple[int, bool]:
    """Open a tap, non-blocking, with virtio-net headers; made if it is absent.

    Returns:
        Its descriptor, and whether the kernel has UDP segments come and go by it.

    Raises:
        PortError: It is no tap, is taken, or we lack the right.
    """
    check_name("tap", interface)
    verb = "attach to" if _exists(interface) else "make"
    fd = -1
    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        _choose(fd, interface)
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", NET_HDR_LEN))
        segments_udp = take_offloads(fd)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        message = f"cannot {verb} tap {interface}: {explain(error, _CAUSES)}"
        raise PortError(message) from error
    return fd, segments_udp


def take_offloads(fd: int, more: int = _TUN_F_UDP) -> bool:
    """Tell the kernel what it may leave to us: `more`, too, if it knows that."""
    with contextlib.suppress(OSError):  # it does not
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _TUN_F_TCP | more)
        return True
    fcntl.ioctl(fd, _TUNSETOFFLOAD, _TUN_F_TCP)
    return False


def detach(fd: int) -> None:
    """Close a tap. What we could do with its frames would stay with the interface."""
    with contextlib.suppress(OSError):  # it is gone
        fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)
    os.close(fd)


def _choose(fd: int, interface: str) -> None:
    """Tie the descriptor to the interface, which may have been made for many queues."""
    plain = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack(_IFREQ, interface.encode(), plain))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        flags = plain | _IFF_MULTI_QUEUE
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack(_IFREQ, interface.encode(), flags))


def _exists(interface: str) -> bool:
    """Whether our network namespace has it; /sys may show another one's."""
    try:
        return socket.if_nametoindex(interface) > 0
    except OSError:
        return False
