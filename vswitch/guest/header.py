"""The virtio-net header and the offloads that it speaks of.

A guest that takes offloads sends frames with half a checksum, or longer than the wire
allows, and receives such frames; the header in front of each says what is missing.

    Guest(path, features=DEFAULT_FEATURES | OFFLOADS, tx_buffer_len=65600)
    guest.send([frame], headers=[NetHeader(NEEDS_CSUM, csum_start=34, csum_offset=16)])

virtio 1.2 §5.1.6 struct virtio_net_hdr, §5.1.3.1 which feature needs which; UDP
segmentation (USO) came after 1.2.
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple, Self

import numpy as np

from ports.vhost import virtio
from vswitch.guest.errors import GuestError
from vswitch.guest.memory import Bytes

_LAYOUT: Final = struct.Struct("<BBHHHHH")

NEEDS_CSUM: Final = virtio.NET_HDR_F_NEEDS_CSUM
DATA_VALID: Final = 2
GSO_NONE: Final = virtio.NET_HDR_GSO_NONE
GSO_TCPV4: Final = virtio.NET_HDR_GSO_TCPV4
GSO_UDP: Final = virtio.NET_HDR_GSO_UDP
GSO_TCPV6: Final = virtio.NET_HDR_GSO_TCPV6
GSO_UDP_L4: Final = virtio.NET_HDR_GSO_UDP_L4
GSO_ECN: Final = virtio.NET_HDR_GSO_ECN

# Not offered by this switch.
_GUEST_UFO: Final = 1 << 10
_HOST_UFO: Final = 1 << 14

_GUEST_TSO: Final = virtio.F_GUEST_TSO4 | virtio.F_GUEST_TSO6
_HOST_TSO: Final = virtio.F_HOST_TSO4 | virtio.F_HOST_TSO6

# A feature, and those of which it needs one. In an order in which one pass will do.
_NEEDS: Final = {
    virtio.F_GUEST_TSO4: virtio.F_GUEST_CSUM,
    virtio.F_GUEST_TSO6: virtio.F_GUEST_CSUM,
    virtio.F_GUEST_ECN: _GUEST_TSO,
    _GUEST_UFO: virtio.F_GUEST_CSUM,
    virtio.F_GUEST_USO4: virtio.F_GUEST_CSUM,
    virtio.F_GUEST_USO6: virtio.F_GUEST_CSUM,
    virtio.F_HOST_TSO4: virtio.F_CSUM,
    virtio.F_HOST_TSO6: virtio.F_CSUM,
    virtio.F_HOST_ECN: _HOST_TSO,
    _HOST_UFO: virtio.F_CSUM,
    virtio.F_HOST_USO: virtio.F_CSUM,
}

# Everything that a guest may leave to others: to whom it sends, and who sends to it.
SEND_OFFLOADS: Final = (
    virtio.F_CSUM | _HOST_TSO | virtio.F_HOST_ECN | _HOST_UFO | virtio.F_HOST_USO
)
RECEIVE_OFFLOADS: Final = (
    virtio.F_GUEST_CSUM
    | _GUEST_TSO
    | virtio.F_GUEST_ECN
    | _GUEST_UFO
    | virtio.F_GUEST_USO4
    | virtio.F_GUEST_USO6
)
OFFLOADS: Final = SEND_OFFLOADS | RECEIVE_OFFLOADS


class NetHeader(NamedTuple):
    """What is in front of a frame; by default it asks for nothing."""

    flags: int = 0  # NEEDS_CSUM, DATA_VALID
    gso_type: int = GSO_NONE  # GSO_*
    hdr_len: int = 0  # bytes of all headers, a hint
    gso_size: int = 0  # bytes of payload a segment
    csum_start: int = 0  # where to sum from
    csum_offset: int = 0  # from there, where the sum goes
    num_buffers: int = 0  # received frames: how many buffers it filled

    def pack(self) -> bytes:
        """The header as a device reads it, NET_HDR_LEN bytes."""
        return _LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The header that a device wrote, NET_HDR_LEN bytes."""
        return cls(*_LAYOUT.unpack(data))


def usable(features: int) -> int:
    """The features without those that need another one that is not there."""
    for feature, needed in _NEEDS.items():
        if not features & needed:
            features &= ~feature
    return features


def pack_headers(headers: Sequence[NetHeader], frames: int) -> Bytes:
    """Headers one behind the other.

    Raises:
        GuestError: There are not as many as frames.
    """
    if len(headers) != frames:
        raise GuestError(f"cannot send {frames} frames with {len(headers)} headers")
    return np.frombuffer(b"".join(header.pack() for header in headers), np.uint8)
