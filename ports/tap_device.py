"""A tap as the kernel offers it: /dev/net/tun, one descriptor for each of its queues.

Numba-free. The kernel keeps in mind by which queue a flow came in, and has what goes back
leave by the same. linux/if_tun.h; Documentation/networking/tuntap.rst.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
from typing import Final, NamedTuple

from ports.errors import PortError, explain
from ports.links import check_name, find
from ports.vhost.virtio import NET_HDR_LEN

_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUN_F_TCP: Final = 0x0F  # checksums, TCP segments over IPv4 and IPv6, ECN
_TUN_F_UDP: Final = 0x60  # UDP segments over IPv4 and IPv6, since Linux 6.2
_IFF_TAP: Final = 0x0002
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
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


class Tap(NamedTuple):
    """A tap that we are attached to."""

    fds: list[int]  # one a queue
    segments_udp: bool  # whether the kernel has UDP segments come and go


async def check_unused(interface: str) -> None:
    """Refuse a tap that another program is attached to: each would get a part of it.

    Raises:
        PortError: It is.
    """
    link = await find(interface)
    if link and link.attached:
        cause = _CAUSES[errno.EBUSY]
        raise PortError(f"cannot attach to tap {interface}: EBUSY: {cause}")


def attach(interface: str, queues: int) -> Tap:
    """Open a tap, non-blocking, with virtio-net headers; made if it is absent.

    One that was there and has a single queue is taken as it is.

    Raises:
        PortError: It is no tap, is taken, or we lack the right.
    """
    check_name("tap", interface)
    verb = "attach to" if _exists(interface) else "make"
    fds: list[int] = []
    try:
        _open_queues(interface, queues, fds)
        fcntl.ioctl(fds[0], _TUNSETVNETHDRSZ, struct.pack("i", NET_HDR_LEN))
        return Tap(fds, take_offloads(fds[0]))
    except OSError as error:
        _close(fds)
        message = f"cannot {verb} tap {interface}: {explain(error, _CAUSES)}"
        raise PortError(message) from error


def take_offloads(fd: int, more: int = _TUN_F_UDP) -> bool:
    """Tell the kernel what it may leave to us: `more`, too, if it knows that."""
    with contextlib.suppress(OSError):  # it does not
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _TUN_F_TCP | more)
        return True
    fcntl.ioctl(fd, _TUNSETOFFLOAD, _TUN_F_TCP)
    return False


def detach(tap: Tap) -> None:
    """Close a tap. What we could do with its frames would stay with the interface."""
    with contextlib.suppress(OSError):  # it is gone
        fcntl.ioctl(tap.fds[0], _TUNSETOFFLOAD, 0)
    _close(tap.fds)


def _open_queues(interface: str, queues: int, fds: list[int]) -> None:
    """Append a descriptor for each queue to `fds`, which the caller closes."""
    while len(fds) < queues:
        fds.append(os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        if not _choose(fds[-1], interface, many=queues > 1):
            return


def _choose(fd: int, interface: str, *, many: bool) -> bool:
    """Tie a descriptor to the interface; whether that has many queues or just one.

    The kernel insists on being asked for what the interface was made as.
    """
    plain = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    try:
        _tie(fd, interface, plain | _IFF_MULTI_QUEUE * many)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        many = not many
        _tie(fd, interface, plain | _IFF_MULTI_QUEUE * many)
    return many


def _tie(fd: int, interface: str, flags: int) -> None:
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack(_IFREQ, interface.encode(), flags))


def _exists(interface: str) -> bool:
    """Whether our network namespace has it; /sys may show another one's."""
    try:
        return socket.if_nametoindex(interface) > 0
    except OSError:
        return False


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
