"""The rings of an AF_XDP socket, and the memory that its frames lie in.

Numba-free. The memory is one file that we share with the kernel: a page of our own with
two XSK records, then *chunks* of one size, each for a frame or a part of one. A chunk has
one place at any time: in the kernel's hands, or in a ring where we will find it.

    to receive    kernel -> receive ring -> fill ring -> kernel
    to transmit   completion ring -> transmit ring -> kernel -> completion ring

So both directions are the same: chunks come out of one ring, the *source*, and go into
another, the *sink*. Positions are free-running 32-bit words in the rings themselves. The
completion ring is our list of free chunks: what is in it stays there until it is used
again, and chunks that never were are taken in order (`fresh`).

A batch is moved by one store: the sink's producer. What has to follow it (the source's
consumer, `fresh`) is written down before, with the value that the producer will have
then. Whoever finds that value there does the rest again; nothing is lost or had twice.

linux/if_xdp.h; Documentation/networking/af_xdp.rst.
"""

from typing import Final, NamedTuple

import numpy as np

from ports.burst import MAX_FRAME

PAGE: Final = 4096

# struct xdp_desc, an entry of the receive and the transmit ring; the others have
# addresses alone. Length and options are one word in our code.
DESC_LEN: Final = 16
ADDRESS_LEN: Final = 8
XDP_PKT_CONTD: Final = 1  # of the options: the next entry is of the same frame
XDP_RING_NEED_WAKEUP: Final = 1

# Powers of two, as the rings have as many entries.
CHUNKS: Final = 2048  # to receive with
TX_CHUNKS: Final = 1024
# Left free before a received frame by the kernel (XDP_PACKET_HEADROOM).
HEADROOM: Final = 256
# Most chunks of one frame: what is not in the first is in pages of a socket buffer
# (MAX_SKB_FRAGS).
MOST_PIECES: Final = 18
# A worker's view of the memory: the records, then the chunks.
CHUNKS_AT: Final = PAGE

XSK: Final = np.dtype(
    [
        # Written by the manager before the ring starts. Addresses are those in workers.
        ("chunks", "<i8"),  # address of the first
        ("chunk_len", "<i8"),
        ("room", "<i8"),  # bytes of a frame in a chunk
        ("most", "<i8"),  # chunks of one frame
        ("copies", "<i8"),  # 1: the kernel copies what we send, in our system call
        ("source_producer", "<i8"),
        ("source_consumer", "<i8"),
        ("source_rows", "<i8"),
        ("source_mask", "<i8"),
        ("sink_producer", "<i8"),
        ("sink_consumer", "<i8"),
        ("sink_rows", "<i8"),
        ("sink_mask", "<i8"),
        ("sink_flags", "<i8"),
        ("fresh_end", "<i8"),
        # Written by the manager at any time.
        ("link_down", "<i8"),
        # To transmit, written by whoever transmits: bursts that the kernel did not take
        # all of. To receive, written by the worker that polls: how many of those it has
        # seen to. A line of its own, as it is looked at in each round.
        ("unsent", "<i8"),
        ("unsent_pad", "<i8", (7,)),
        # Written by the worker that polls, or by whoever holds the lock.
        ("fresh", "<i8"),  # next chunk that never was used
        ("taken", "<i8"),  # entries of the burst in hand
        # Where the sink's producer is when a batch has been moved, and the others then.
        ("next_sink", "<i8"),
        ("next_source", "<i8"),  # the source's consumer
        ("next_fresh", "<i8"),
        ("data_pad", "<i8", (3,)),
    ]
)


class Layout(NamedTuple):
    """How an interface's frames are put into chunks."""

    chunk_len: int
    pieces: bool  # a frame may need several

    @property
    def length(self) -> int:
        """Bytes of the memory."""
        return CHUNKS_AT + (CHUNKS + TX_CHUNKS) * self.chunk_len


def layout_for(max_frame: int) -> Layout:
    """The layout for frames of up to so many bytes, tags included.

    Small chunks where a frame fits one: the less memory, the more of it is in a cache.
    """
    for chunk_len in (PAGE // 2, PAGE):
        if max_frame <= chunk_len - HEADROOM:
            return Layout(chunk_len, pieces=False)
    return Layout(PAGE, pieces=True)


if MOST_PIECES * (PAGE - HEADROOM) < MAX_FRAME:  # pragma: no cover
    message = "the chunks of a frame have no room for the longest"
    raise AssertionError(message)
