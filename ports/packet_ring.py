"""The ring of a packet socket: how the kernel lays it out, and how we have it made.

Numba-free. TPACKET_V2: slots of one size, each with a status word that says whose it is.
Frames come in order; a slot goes back to the kernel by itself. TPACKET_V3 packs frames
into blocks, but shows nothing of a block before it is full or a timer of at least a
millisecond (a few where the kernel counts jiffies) has run out; here a frame is seen at
once.

A slot has to hold the longest super-frame of a peer on the same machine, so slots are
large and there are few; the memory is the kernel's and is taken when the port is added.

linux/if_packet.h; Documentation/networking/packet_mmap.rst.
"""

from typing import Final

import numpy as np

from ports.burst import MAX_FRAME

TPACKET_V2: Final = 1

# struct tpacket2_hdr, at the beginning of each slot.
HEADER: Final = np.dtype(
    [
        ("status", "<u4"),  # TP_STATUS_*
        ("len", "<u4"),  # bytes of the frame
        ("snaplen", "<u4"),  # bytes of it that are here
        ("mac", "<u2"),  # offset of its Ethernet header
        ("net", "<u2"),
        ("sec", "<u4"),
        ("nsec", "<u4"),
        ("vlan_tci", "<u2"),  # of a tag that was taken out, in our order of bytes
        ("vlan_tpid", "<u2"),
        ("padding", "u1", (4,)),
    ]
)

SNAPLEN, MAC, VLAN_TCI, VLAN_TPID = (
    HEADER.fields[name][1] if HEADER.fields else 0
    for name in ("snaplen", "mac", "vlan_tci", "vlan_tpid")
)

# Right before the frame, however long a header we ask for: one that is two bytes longer
# has only those in the way (Linux 6.18 writes it 10 bytes before the frame, too).
VNET_HDR_LEN: Final = 10

TP_STATUS_KERNEL: Final = 0
TP_STATUS_USER: Final = 1 << 0
TP_STATUS_VLAN_VALID: Final = 1 << 4

# Before the frame: the slot's header, a socket address of 20 bytes, a virtio-net header,
# each aligned.
_MOST_BEFORE: Final = 128
# A multiple of 16 bytes. The odd number of cache lines keeps the beginnings of a burst's
# frames from competing for the same cache sets.
SLOT: Final = 65536 + 448
BLOCK: Final = 1 << 20  # contiguous if the kernel has that much in one piece
SLOTS_PER_BLOCK: Final = BLOCK // SLOT
BLOCKS: Final = 32
SLOTS: Final = BLOCKS * SLOTS_PER_BLOCK
RING_LEN: Final = BLOCKS * BLOCK

if SLOT < _MOST_BEFORE + MAX_FRAME:  # pragma: no cover
    message = "a slot has no room for the longest frame"
    raise AssertionError(message)
