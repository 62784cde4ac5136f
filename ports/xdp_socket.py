"""An AF_XDP socket with its rings and memory: what is set up before frames can pass.

Numba-free. Each receive queue of an interface has a socket, since a frame can only go to
one of its own queue. The memory is a file of ours that the kernel pins; we have it mapped
to write the records, and so has every worker.

Up to Linux 6.3 the rings can be mapped only as long as the socket is not bound.

linux/if_xdp.h; Documentation/networking/af_xdp.rst.
"""

import contextlib
import ctypes
import mmap
import os
import resource
import socket
import struct
from typing import Final, NamedTuple

import numpy as np

from ports.packet_socket import set_send_buffer
from ports.xdp_ring import (
    ADDRESS_LEN,
    CHUNKS,
    CHUNKS_AT,
    DESC_LEN,
    HEADROOM,
    MOST_PIECES,
    PAGE,
    TX_CHUNKS,
    XSK,
    Layout,
)

_AF_XDP: Final = 44
_SOL_XDP: Final = 283
_MMAP_OFFSETS: Final = 1
_UMEM_REG: Final = 4
_STATISTICS: Final = 7
_OPTIONS: Final = 8
_MAX_TX_BUDGET: Final = 9  # since Linux 6.17
_OPTIONS_ZEROCOPY: Final = 1
# As much as all our chunks can be in flight; the kernel counts what it allocates for one.
_SEND_BUFFER: Final = TX_CHUNKS * 4 * PAGE

# Flags of bind.
COPY: Final = 1 << 1
_USE_NEED_WAKEUP: Final = 1 << 3
_USE_SG: Final = 1 << 4  # since Linux 6.6


class Kind(NamedTuple):
    """One of the rings: option to make it, offset to map it, its entries."""

    option: int
    offset: int
    entries: int
    entry_len: int


# In the order of struct xdp_mmap_offsets.
RINGS: Final = (
    Kind(2, 0, CHUNKS, DESC_LEN),  # receive
    Kind(3, 0x8000_0000, TX_CHUNKS, DESC_LEN),  # transmit
    Kind(5, 0x1_0000_0000, CHUNKS, ADDRESS_LEN),  # fill
    Kind(6, 0x1_8000_0000, TX_CHUNKS, ADDRESS_LEN),  # completion
)
_RECEIVE: Final = 0
_TRANSMIT: Final = 1
_FILL: Final = 2
_COMPLETION: Final = 3


class _Places(NamedTuple):
    """Offsets in a mapped ring."""

    producer: int
    consumer: int
    rows: int
    flags: int


class Queue:
    """The socket of one receive queue; not bound yet."""

    def __init__(self, layout: Layout) -> None:
        """Make it. Raises OSError."""
        self._layout = layout
        self._missed = 0
        self._memory: mmap.mmap | None = None
        self._records = np.zeros(2, XSK)
        self.file = -1
        self._socket = socket.socket(_AF_XDP, socket.SOCK_RAW, 0)
        try:
            self._make_memory()
            for ring in RINGS:
                self._socket.setsockopt(_SOL_XDP, ring.option, ring.entries)
            set_send_buffer(self._socket, _SEND_BUFFER)
            with contextlib.suppress(OSError):  # 32 frames a system call, then
                self._socket.setsockopt(_SOL_XDP, _MAX_TX_BUDGET, TX_CHUNKS)
            got = self._socket.getsockopt(_SOL_XDP, _MMAP_OFFSETS, 16 * len(RINGS) * 2)
            words = struct.unpack("16Q", got)
            self._places = [_Places(*words[at : at + 4]) for at in range(0, 16, 4)]
            self._fill()
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def ring_len(self, ring: int) -> int:
        """Bytes to map of a ring."""
        return self._places[ring].rows + RINGS[ring].entries * RINGS[ring].entry_len

    def describe(self, memory: int, rings: list[int]) -> None:
        """Tell workers where they have all mapped: the memory, and the rings in order."""
        layout = self._layout
        rx, tx = self._records
        for record in (rx, tx):
            record["chunks"] = memory + CHUNKS_AT
            record["chunk_len"] = layout.chunk_len
            record["room"] = layout.chunk_len - HEADROOM
            record["most"] = MOST_PIECES if layout.pieces else 1
        tx["fresh"], tx["fresh_end"] = CHUNKS, CHUNKS + TX_CHUNKS
        sides = (
            (rx, "source", _RECEIVE),
            (rx, "sink", _FILL),
            (tx, "source", _COMPLETION),
            (tx, "sink", _TRANSMIT),
        )
        for record, side, ring in sides:
            for part, offset in self._places[ring]._asdict().items():
                if (side, part) != ("source", "flags"):
                    record[f"{side}_{part}"] = rings[ring] + offset
            record[f"{side}_mask"] = RINGS[ring].entries - 1

    def bind(self, ifindex: int, queue: int, flags: int) -> bool:
        """Begin to serve a queue; whether frames are copied between it and the driver.

        The kernel tries without first, unless `flags` say COPY.

        Raises:
            OSError: EBUSY where another socket has that queue, EINVAL where frames need
                several chunks and the kernel cannot do that.
        """
        flags |= _USE_NEED_WAKEUP | (_USE_SG if self._layout.pieces else 0)
        address = struct.pack("2H3I", _AF_XDP, flags, ifindex, queue, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.bind(self.fileno(), address, len(address)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        options = self._socket.getsockopt(_SOL_XDP, _OPTIONS)
        copies = not options & _OPTIONS_ZEROCOPY
        self._records["copies"] = copies
        return copies

    def set_link_down(self, *, down: bool) -> None:
        """Have frames to transmit counted as lost, or sent again."""
        self._records["link_down"] = down

    def count_missed(self) -> int:
        """Frames that found no chunk or no place in the ring since the last call."""
        words = self._socket.getsockopt(_SOL_XDP, _STATISTICS, 48)
        dropped, _, _, ring_full, _, _ = struct.unpack("6Q", words)
        before, self._missed = self._missed, dropped + ring_full
        return self._missed - before

    def close(self) -> None:
        """Give back what we have."""
        self._socket.close()
        self._records = np.zeros(2, XSK)
        if self._memory:
            self._memory.close()
            self._memory = None
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def _make_memory(self) -> None:
        _allow_locked_memory()
        self.file = os.memfd_create("vswitch-xdp", os.MFD_CLOEXEC)
        os.ftruncate(self.file, self._layout.length)
        self._memory = mmap.mmap(self.file, self._layout.length)
        self._records = np.frombuffer(self._memory, XSK, 2)
        first = int(self._records.ctypes.data) + CHUNKS_AT
        length = self._layout.length - CHUNKS_AT
        chunks = struct.pack("2Q2I", first, length, self._layout.chunk_len, 0)
        self._socket.setsockopt(_SOL_XDP, _UMEM_REG, chunks)

    def _fill(self) -> None:
        """Give the kernel all chunks to receive into."""
        places, length = self._places[_FILL], self.ring_len(_FILL)
        with mmap.mmap(self.fileno(), length, offset=RINGS[_FILL].offset) as ring:
            addresses = np.arange(CHUNKS, dtype=np.uint64) * self._layout.chunk_len
            ring[places.rows : places.rows + addresses.nbytes] = addresses.tobytes()
            struct.pack_into("I", ring, places.producer, CHUNKS)


def _allow_locked_memory() -> None:
    """As much as we may; without CAP_IPC_LOCK, pinned memory counts."""
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
