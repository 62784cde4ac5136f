"""A burst: frames that were taken together and have not been given back yet.

`FRAME` describes where a frame's bytes lie; nothing is copied to get here. A frame in
one piece is `addr` and `length`; one in several pieces lists them in SEGMENT rows that
have the shape of C's struct iovec so that a tap can write them as they are.

Numba-free; the records live in a worker's private memory.
"""

from typing import Any, Final

import numpy as np

from ports.base import MAX_PORTS, RINGS_PER_PORT

BURST_SIZE: Final = 64
MAX_SEGMENTS: Final = 64  # pieces of one frame; more is a guest that burns our time
MAX_WALK: Final = 4 * MAX_SEGMENTS  # descriptors of a chain, empty ones included
MAX_FRAME: Final = 65535 + 18  # longest IP packet, Ethernet header and a VLAN tag
MIN_FRAME: Final = 14  # an Ethernet header
ETH_SNAPSHOT: Final = 16  # bytes kept of a frame's head
ADDRESSES_LEN: Final = 12  # of them: destination and source
HEADER_SLOT: Final = 16  # bytes kept of a clean virtio-net header
MAX_TARGETS: Final = 1024  # pieces of receive buffers for one frame

# FRAME.length of a chain that holds no frame; each value is one drop counter.
BAD_CHAIN: Final = -1
TOO_SHORT: Final = -2
TOO_LONG: Final = -3
BAD_HEADER: Final = -4

FRAME: Final = np.dtype(
    [
        ("addr", "<i8"),  # first byte, when it lies in one piece
        ("length", "<i8"),  # bytes, or one of the codes above
        # At least 14 contiguous bytes of its head. From `decide` on, at least the two
        # addresses as they were judged, in our own memory.
        ("eth", "<i8"),
        ("segments", "<i8"),  # number of pieces
        ("first_segment", "<i8"),  # row in the segments table, for more than one piece
        ("egress", "<i8"),  # port slot, or a negative verdict
        ("offload", "<i8"),  # address of a clean virtio-net header, or 0: asks nothing
    ]
)

SEGMENT: Final = np.dtype([("addr", "<i8"), ("len", "<i8")])

# Where a frame goes that fits one buffer of its receiver.
AIM: Final = np.dtype(
    [
        ("addr", "<i8"),
        ("gpa", "<i8"),
        ("len", "<i8"),  # bytes, with the header
    ]
)

# C's struct mmsghdr, its padding as part of the words: frames for sendmmsg.
MESSAGE: Final = np.dtype(
    [
        ("name", "<i8"),
        ("name_len", "<i8"),
        ("pieces", "<i8"),  # address of SEGMENT rows
        ("n_pieces", "<i8"),
        ("control", "<i8"),
        ("control_len", "<i8"),
        ("flags", "<i8"),
        ("sent", "<i8"),  # bytes, written by the kernel
    ]
)

# A tap's frames are read into our own memory: one slot a frame. The odd line keeps the
# slots of one burst from competing for the same cache sets.
TAP_SLOT: Final = 65536 + 192


# Where a worker finds everything: one record of addresses, so that a jitted function
# takes one argument that costs nothing to pass. First the tables of the shared segment,
# then the worker's own scratch memory for the burst in hand.
CONTEXT: Final = np.dtype(
    [
        ("header", "<i8"),
        ("ports", "<i8"),
        ("rings", "<i8"),
        ("redo", "<i8"),
        ("regions", "<i8"),
        ("fdb", "<i8"),
        ("counters", "<i8"),
        ("workers", "<i8"),
        ("serving", "<i8"),  # of the worker's own record, where it says what it is at
        ("burst", "<i8"),  # FRAME[2 * BURST_SIZE]; the second half for `offload.lower`
        ("segments", "<i8"),  # SEGMENT rows of the burst
        ("targets", "<i8"),  # SEGMENT rows of one delivery
        ("aims", "<i8"),  # AIM rows of one delivery
        ("messages", "<i8"),  # MESSAGE rows of one delivery
        ("message_headers", "<i8"),  # the virtio-net header of each
        ("heads", "<i8"),  # heads of frames; the first is for headers we write
        ("tap_slots", "<i8"),
        ("headers", "<i8"),  # clean headers of frames that ask for something
        ("lowered", "<i8"),  # a frame to be lowered, then what is made of it
        ("lowered_rows", "<i8"),  # i8[]: the rows behind the burst
        ("offloads", "<i8"),  # not an address: frames of the burst that ask
        ("picked", "<i8"),  # i8[]: the frames that are sent now, by their rows
        ("pair_of", "<i8"),  # i8[]: of the picked frames, the receive queue of each
        ("spread", "<i8"),  # i8[]: those for one of them
        ("peek", "<i8"),  # the beginning of a frame in pieces
        ("lists", "<i8"),  # i8[MAX_PORTS][BURST_SIZE]: frames for each port
        ("counts", "<i8"),  # i8[MAX_PORTS]: how many
        ("egresses", "<i8"),  # i8[]: ports with frames
        ("awake", "<i8"),  # u1[]: of the polled rings, which brought frames last time
        ("uring", "<i8"),  # URING, or 0: this worker has none
        ("clock", "<i8"),  # CLOCK
    ]
)


def make_scratch() -> dict[str, "np.ndarray[Any, np.dtype[Any]]"]:
    """Allocate a worker's scratch memory, by the names of CONTEXT's second half."""
    return {
        "burst": np.zeros(2 * BURST_SIZE, FRAME),
        "segments": np.zeros(BURST_SIZE * MAX_SEGMENTS, SEGMENT),
        "targets": np.zeros(MAX_TARGETS, SEGMENT),
        "aims": np.zeros(BURST_SIZE, AIM),
        "messages": np.zeros(BURST_SIZE, MESSAGE),
        "message_headers": np.zeros(BURST_SIZE * HEADER_SLOT, np.uint8),
        "heads": np.zeros((BURST_SIZE + 1) * ETH_SNAPSHOT, np.uint8),
        "tap_slots": np.zeros(BURST_SIZE * TAP_SLOT, np.uint8),
        "headers": np.zeros(BURST_SIZE * HEADER_SLOT, np.uint8),
        "lowered": np.zeros((BURST_SIZE + 1) * TAP_SLOT, np.uint8),
        "lowered_rows": np.arange(BURST_SIZE, 2 * BURST_SIZE),
        "picked": np.zeros(BURST_SIZE, np.int64),
        "pair_of": np.zeros(BURST_SIZE, np.int64),
        "spread": np.zeros(BURST_SIZE, np.int64),
        "peek": np.zeros(128, np.uint8),
        "lists": np.zeros((MAX_PORTS, BURST_SIZE), np.int64),
        "counts": np.zeros(MAX_PORTS, np.int64),
        "egresses": np.zeros(BURST_SIZE, np.int64),
        "awake": np.zeros(MAX_PORTS * RINGS_PER_PORT // 2, np.uint8),
    }
