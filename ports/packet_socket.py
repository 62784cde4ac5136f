"""A packet socket with a ring, as an eth port uses it: everything that is set on one.

linux/if_packet.h, linux/filter.h, packet(7).
"""

import contextlib
import ctypes
import errno
import fcntl
import socket
import struct
from pathlib import Path
from typing import Final

from ports.errors import PortError, explain
from ports.packet_ring import (
    BLOCK,
    BLOCKS,
    RING_LEN,
    SLOT,
    SLOTS,
    TPACKET_V2,
    VNET_HDR_LEN,
)

_SOL_PACKET: Final = 263
_ADD_MEMBERSHIP: Final = 1
_RX_RING: Final = 5
_STATISTICS: Final = 6
_VERSION: Final = 10
_VNET_HDR: Final = 15
_FANOUT: Final = 18
_IGNORE_OUTGOING: Final = 23  # since Linux 4.20
_VNET_HDR_SZ: Final = 24  # since Linux 6.5
_MR_PROMISC: Final = 1
_FANOUT_HASH: Final = 0
_FANOUT_UNIQUE_ID: Final = 0x2000
_FANOUT_IGNORE_OUTGOING: Final = 0x4000  # since Linux 5.11
_ETH_P_ALL: Final = 3
_SO_SNDBUFFORCE: Final = 32
_SO_ATTACH_FILTER: Final = 26
_SIOCGIWNAME: Final = 0x8B01
_SEND_BUFFER: Final = 4 << 20  # super-frames on their way through a driver

# Classic BPF: return 0 for PACKET_OUTGOING, else all of the frame.
_FILTER: Final = (
    (0x28, 0, 0, 0xFFFFF000 + 4),  # ldh SKF_AD_OFF + SKF_AD_PKTTYPE
    (0x15, 0, 1, 4),  # jeq PACKET_OUTGOING
    (0x06, 0, 0, 0),  # ret 0
    (0x06, 0, 0, 0xFFFFFFFF),  # ret all
)

_CAUSES: Final = {
    errno.EPERM: "we have no CAP_NET_RAW (run as root, or grant the capability)",
    errno.ENOMEM: f"no memory for a ring of {RING_LEN >> 20} MiB (free some)",
    errno.ENODEV: "it is gone (ip link show)",
    errno.EAFNOSUPPORT: "the kernel has no packet sockets (modprobe af_packet)",
}


def open_sockets(
    interface: str, index: int, count: int
) -> tuple[list[socket.socket], bool]:
    """Open packet sockets on an interface, promiscuous, with rings that fill.

    Flows are spread over them; where the kernel refuses to, there is one.

    Returns:
        The sockets, and whether the kernel has UDP segments come and go by them.

    Raises:
        PortError: We lack the right, the kernel the memory, or the interface is gone.
    """
    sockets: list[socket.socket] = []
    try:
        segments_udp = _open_into(sockets, interface)
        _join(sockets[0], index)
        group = begin_fanout(sockets[0]) if count > 1 else 0
        for _ in range(count - 1 if group else 0):
            _open_into(sockets, interface)
            sockets[-1].setsockopt(_SOL_PACKET, _FANOUT, group)
    except OSError as error:
        for sock in sockets:
            sock.close()
        message = f"cannot attach to interface {interface}: {explain(error, _CAUSES)}"
        raise PortError(message) from error
    return sockets, segments_udp


def promiscuous(index: int) -> socket.socket:
    """Have an interface take all frames until the socket is closed, which gets none.

    Raises:
        OSError: We lack the right, or it is gone.
    """
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        _join(sock, index)
    except OSError:
        sock.close()
        raise
    return sock


def _join(sock: socket.socket, index: int) -> None:
    membership = struct.pack("iHH8x", index, _MR_PROMISC, 0)
    sock.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, membership)


def _open_into(sockets: list[socket.socket], interface: str) -> bool:
    """Open another socket; whether it may speak of UDP segments."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sockets.append(sock)
    sock.setblocking(False)
    sock.setsockopt(_SOL_PACKET, _VERSION, TPACKET_V2)
    segments_udp = take_headers(sock)
    set_send_buffer(sock, _SEND_BUFFER)
    ring = struct.pack("4I", BLOCK, BLOCKS, SLOT, SLOTS)
    sock.setsockopt(_SOL_PACKET, _RX_RING, ring)
    ignore_outgoing(sock)
    sock.bind((interface, _ETH_P_ALL))
    return segments_udp


def begin_fanout(sock: socket.socket) -> int:
    """Make a group for sockets that share flows; what joins it, or 0: the kernel refuses.

    As one before 6.13 does while the interface is down.
    """
    flags = _FANOUT_HASH | _FANOUT_UNIQUE_ID | _FANOUT_IGNORE_OUTGOING
    try:
        sock.setsockopt(_SOL_PACKET, _FANOUT, flags << 16)
    except OSError:
        return 0
    number = sock.getsockopt(_SOL_PACKET, _FANOUT) & 0xFFFF
    return number | (flags & ~_FANOUT_UNIQUE_ID) << 16


def take_headers(sock: socket.socket, option: int = _VNET_HDR_SZ) -> bool:
    """Have virtio-net headers before frames; whether they may ask for UDP segments.

    Those came in Linux 6.2. A kernel that has the newer option knows them.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(_SOL_PACKET, option, VNET_HDR_LEN)
        return True
    sock.setsockopt(_SOL_PACKET, _VNET_HDR, 1)
    return False


def ignore_outgoing(sock: socket.socket, option: int = _IGNORE_OUTGOING) -> None:
    """See only what comes in: what goes out is ours, or this machine's own.

    The filter does that in every kernel; the option saves the kernel the copies.
    """
    code = b"".join(struct.pack("HBBI", *line) for line in _FILTER)
    memory = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(_FILTER), ctypes.addressof(memory))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    with contextlib.suppress(OSError):
        sock.setsockopt(_SOL_PACKET, option, 1)


def count_missed(sock: socket.socket) -> int:
    """Frames that found the ring full since the last call."""
    packets_and_drops = sock.getsockopt(_SOL_PACKET, _STATISTICS, 8)
    return int(struct.unpack("2I", packets_and_drops)[1])


def forget_error(sock: socket.socket) -> None:
    """Clear what a link that went down left for the next call, which may be much later."""
    sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def is_wireless(interface: str, index: int, sys: Path = Path("/sys/class/net")) -> bool:
    """Whether it is a wireless station, which may send only from its own address.

    Older drivers tell themselves; of newer ones /sys does, which may be another network
    namespace's.
    """
    with contextlib.suppress(OSError):
        same = int((sys / interface / "ifindex").read_text()) == index
        if same and (sys / interface / "phy80211").exists():
            return True
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            fcntl.ioctl(sock, _SIOCGIWNAME, struct.pack("32s", interface.encode()))
        except OSError:
            return False
    return True


def set_send_buffer(sock: socket.socket, length: int) -> None:
    """How many bytes of ours the kernel may have on their way."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, length)
    except PermissionError:  # no CAP_NET_ADMIN: as much as everybody may have
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, length)
