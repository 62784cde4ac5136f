"""An AF_XDP socket's rings in plain memory, and the kernel behind them.

Written from Documentation/networking/af_xdp.rst and linux/if_xdp.h. The model knows where
each chunk is, and that it is in one place only.
"""

import struct
from collections import deque
from itertools import pairwise

import numpy as np

from ports.xdp_ring import CHUNKS_AT, XSK, layout_for

HEADROOM = 256
CONTD, NEED_WAKEUP = 1, 1
WRAP = 1 << 32


_PARTS = ("producer", "consumer", "rows", "mask")


class Index:
    """One ring: two free-running positions, flags, and entries."""

    def __init__(self, size, start, entry):
        self.size, self.entry = size, entry
        self.words = np.array([start % WRAP, start % WRAP, 0], np.uint32)
        self.rows = np.zeros(size * entry, np.uint8)

    producer = property(lambda self: int(self.words[0]))
    consumer = property(lambda self: int(self.words[1]))

    def __len__(self):
        return (self.producer - self.consumer) % WRAP

    def entries(self):
        """What is between the consumer and the producer."""
        shape = {8: "<Q", 16: "<QII"}[self.entry]
        for n in range(len(self)):
            at = (self.consumer + n) % self.size * self.entry
            yield struct.unpack_from(shape, self.rows, at)

    def push(self, *entry):
        if len(self) == self.size:
            return False
        shape = {8: "<Q", 16: "<QII"}[self.entry]
        struct.pack_into(
            shape, self.rows, self.producer % self.size * self.entry, *entry
        )
        self.words[0] = (self.producer + 1) % WRAP
        return True

    def pop(self):
        entry = next(self.entries())
        self.words[1] = (self.consumer + 1) % WRAP
        return entry

    def addresses(self):
        word = self.words.ctypes.data
        return word, word + 4, self.rows.ctypes.data, self.size - 1, word + 8


class XdpSocket:
    """One queue of an interface: four rings, memory, and the kernel's part of it."""

    def __init__(self, size=128, max_frame=1518, start=WRAP - 70, copies=1):
        layout = layout_for(max_frame)
        self.size, self.chunk_len = size, layout.chunk_len
        # Only as much memory as there are chunks.
        self.memory = np.zeros(CHUNKS_AT + 2 * size * layout.chunk_len, np.uint8)
        self.receive, self.fill, self.send, self.done = (
            Index(size, start, entry) for entry in (16, 8, 16, 8)
        )
        self.records = self.memory[: 2 * XSK.itemsize].view(XSK)
        both = (self.receive, self.fill), (self.done, self.send)
        for record, (source, sink) in zip(self.records, both, strict=True):
            record["chunks"] = self.memory.ctypes.data + CHUNKS_AT
            record["chunk_len"], record["copies"] = layout.chunk_len, copies
            record["room"] = layout.chunk_len - HEADROOM
            record["most"] = 18 if layout.pieces else 1
            places = source.addresses(), sink.addresses()
            for side, place in zip(("source", "sink"), places, strict=True):
                for name, value in zip(_PARTS, place[:4], strict=True):
                    record[f"{side}_{name}"] = value
            record["sink_flags"] = places[1][4]
        self.records[1]["fresh"], self.records[1]["fresh_end"] = size, 2 * size
        self.send.words[2] = NEED_WAKEUP
        self.kernels = deque(n * layout.chunk_len for n in range(size))
        self.flying = deque()  # sent, not done with

    @property
    def addr(self):
        return self.memory.ctypes.data

    def attach(self, rings):
        """Make a port's rings those of this socket."""
        for ring, record in zip(rings, (1, 0), strict=True):
            ring["desc"] = self.addr + record * XSK.itemsize

    # --- to receive ---

    def deliver(self, frame, cuts=()):
        """Put a frame into chunks, cut at `cuts`; False if there is no room."""
        while len(self.fill):
            (address,) = self.fill.pop()
            self.kernels.append(address - address % self.chunk_len)
        edges = [0, *cuts, len(frame)]
        if len(self.kernels) < len(edges) - 1:
            return False
        if len(self.receive) + len(edges) - 1 > self.size:
            return False
        for begin, end in pairwise(edges):
            address = self.kernels.popleft() + HEADROOM
            at = CHUNKS_AT + address
            self.memory[at : at + end - begin] = np.frombuffer(
                frame[begin:end], np.uint8
            )
            self.receive.push(address, end - begin, CONTD if end < len(frame) else 0)
        return True

    # --- to send ---

    def take(self):
        """Frames that were given to the kernel; their chunks are in flight."""
        frames, frame = [], b""
        while len(self.send):
            address, length, options = self.send.pop()
            assert length + address % self.chunk_len <= self.chunk_len
            at = CHUNKS_AT + address
            frame += bytes(self.memory[at : at + length])
            self.flying.append(address)
            if not options & CONTD:
                frames.append(frame)
                frame = b""
        assert frame == b""
        return frames

    def complete(self, count=None, order=deque.popleft):
        """Be done with chunks, in some order."""
        for _ in range(len(self.flying) if count is None else count):
            assert self.done.push(order(self.flying))

    # --- the whole ---

    def check(self):
        """Every chunk is in one place."""
        size, length = self.size, self.chunk_len
        receive = [a // length for a, *_ in self.receive.entries()]
        fill = [a // length for (a,) in self.fill.entries()]
        kernels = [a // length for a in self.kernels]
        assert sorted(receive + fill + kernels) == list(range(size))
        places = (self.send.entries(), self.done.entries())
        used = [a // length for entries in places for a, *_ in entries]
        used += [a // length for a in self.flying]
        assert sorted(used) == list(range(size, int(self.records[1]["fresh"])))
