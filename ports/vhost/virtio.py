"""Virtio and virtio-net facts: layouts and bits, each written once.

Numba-free, so that the manager may import it. Field offsets are derived from the
dtypes; `tests/ports/vhost/test_virtio.py` pins them to the numbers in the spec.

virtio 1.2 §2.7 (split virtqueues), §5.1 (network device).
"""

from typing import Final

import numpy as np

# struct virtq_desc, virtio 1.2 §2.7.5. One buffer; chains by `next`.
DESC: Final = np.dtype(
    [
        ("addr", "<u8"),  # guest-physical address
        ("len", "<u4"),  # bytes
        ("flags", "<u2"),  # DESC_F_*
        ("next", "<u2"),  # index in the same table, meaningful with DESC_F_NEXT
    ]
)
DESC_SIZE: Final = DESC.itemsize

DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4

# struct virtq_avail, virtio 1.2 §2.7.6: u16 flags, u16 idx, u16 ring[N], u16 used_event
AVAIL_FLAGS: Final = 0
AVAIL_IDX: Final = 2
AVAIL_RING: Final = 4
AVAIL_F_NO_INTERRUPT: Final = 1

# struct virtq_used, virtio 1.2 §2.7.8: u16 flags, u16 idx, {u32 id, u32 len}[N],
# u16 avail_event
USED_FLAGS: Final = 0
USED_IDX: Final = 2
USED_RING: Final = 4
USED_ELEM_SIZE: Final = 8
USED_F_NO_NOTIFY: Final = 1

MAX_QUEUE_SIZE: Final = 32768

# Packed virtqueues, virtio 1.2 §2.8: descriptors of the same size, but with the chain's
# id where flags are in a split one, and flags where next is; and two event areas of
# u16 off_wrap, u16 flags (§2.8.14).
DESC_F_AVAIL: Final = 1 << 7
DESC_F_USED: Final = 1 << 15
EVENT_OFF_WRAP: Final = 0
EVENT_FLAGS: Final = 2
EVENT_LEN: Final = 4
EVENT_ENABLE: Final = 0
EVENT_DISABLE: Final = 1
EVENT_DESC: Final = 2
# Where a fresh packed ring begins: index 0, first lap; also for the used half.
PACKED_BASE: Final = 1 << 15
PACKED_INDEX: Final = PACKED_BASE - 1


def avail_len(size: int) -> int:
    """Bytes of an available ring of `size` entries, event word included."""
    return AVAIL_RING + 2 * size + 2


def used_len(size: int) -> int:
    """Bytes of a used ring of `size` entries, event word included."""
    return USED_RING + USED_ELEM_SIZE * size + 2


# struct virtio_net_hdr, virtio 1.2 §5.1.6. Legacy devices without MRG_RXBUF end it
# before num_buffers.
NET_HDR: Final = np.dtype(
    [
        ("flags", "u1"),
        ("gso_type", "u1"),
        ("hdr_len", "<u2"),
        ("gso_size", "<u2"),
        ("csum_start", "<u2"),
        ("csum_offset", "<u2"),
        ("num_buffers", "<u2"),
    ]
)
NET_HDR_LEN: Final = NET_HDR.itemsize
NET_HDR_LEN_LEGACY: Final = NET_HDR_LEN - 2

# struct virtio_net_config, virtio 1.2 §5.1.4; each field means something with its
# feature bit only.
NET_CONFIG: Final = np.dtype(
    [
        ("mac", "u1", (6,)),
        ("status", "<u2"),
        ("max_virtqueue_pairs", "<u2"),
        ("mtu", "<u2"),
        ("speed", "<u4"),  # Mbit/s
        ("duplex", "u1"),
    ]
)
NET_S_LINK_UP: Final = 1
NET_SPEED_UNKNOWN: Final = 0xFFFFFFFF
NET_DUPLEX_UNKNOWN: Final = 0xFF

NET_HDR_F_NEEDS_CSUM: Final = 1
NET_HDR_GSO_NONE: Final = 0
NET_HDR_GSO_TCPV4: Final = 1
NET_HDR_GSO_UDP: Final = 3  # to be fragmented (UFO)
NET_HDR_GSO_TCPV6: Final = 4
NET_HDR_GSO_UDP_L4: Final = 5  # to be segmented (USO)
NET_HDR_GSO_ECN: Final = 0x80

# Feature bits, as masks. virtio 1.2 §5.1.3, §6; vhost-user for the two vhost ones. GUEST
# is what the guest's driver takes, HOST (and CSUM) what it may send.
F_CSUM: Final = 1 << 0
F_GUEST_CSUM: Final = 1 << 1
F_MTU: Final = 1 << 3
F_GUEST_TSO4: Final = 1 << 7
F_GUEST_TSO6: Final = 1 << 8
F_GUEST_ECN: Final = 1 << 9
F_HOST_TSO4: Final = 1 << 11
F_HOST_TSO6: Final = 1 << 12
F_HOST_ECN: Final = 1 << 13
F_MRG_RXBUF: Final = 1 << 15
F_GUEST_ANNOUNCE: Final = 1 << 21
F_MQ: Final = 1 << 22
F_LOG_ALL: Final = 1 << 26  # vhost
F_ANY_LAYOUT: Final = 1 << 27  # legacy only
F_INDIRECT_DESC: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_PROTOCOL_FEATURES: Final = 1 << 30  # vhost-user
F_VERSION_1: Final = 1 << 32
F_RING_PACKED: Final = 1 << 34
F_IN_ORDER: Final = 1 << 35
F_GUEST_USO4: Final = 1 << 54
F_GUEST_USO6: Final = 1 << 55
F_HOST_USO: Final = 1 << 56
