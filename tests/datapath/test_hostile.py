"""A guest that writes what it likes into its rings hurts nobody but itself.

The guest's regions lie between guards. Whatever the rings say, `take` and `put` return,
give back or count what was offered, describe only memory of the guest, and write no guard.
"""

import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ports.base import MAX_REGIONS, RING_BROKEN, RING_RUNNING
from ports.burst import ETH_SNAPSHOT, MAX_FRAME, MIN_FRAME
from ports.vhost import split
from ports.vhost.virtio import F_MRG_RXBUF
from ports.views import frame_at, segment_at
from tests.datapath.bench import A, B, Bench
from tests.datapath.conftest import make_plane
from tests.datapath.rings import DEFAULT, GPA, INDIRECT, NEXT, START, WRITE, frame_to

GUARD = 4096
SIZE = 8
TABLE = 0x4000  # of the first region: an indirect table
TOP = 1 << 64
# Guest-physical address and size. The first has the rings; the second goes on where it
# ends, but not in our memory; one straddles 2**63, the last ends with the address space.
REGIONS = [
    (GPA, 0x12000),
    (GPA + 0x12000, 0x1000),
    (0, 0x1000),
    ((1 << 63) - 0x800, 0x1000),
    ((1 << 63) + 0x10000, 0x1000),
    (TOP - 0x1000, 0x1000),
]
EDGES = [edge for gpa, size in REGIONS for edge in (gpa, gpa + size)]
ADDRESSES = st.one_of(
    st.sampled_from([GPA + TABLE, GPA + TABLE + 8, GPA + 0x1000, 1 << 62, 1 << 63]),
    st.builds(
        lambda edge, by: (edge + by) % TOP, st.sampled_from(EDGES), st.integers(-90, 90)
    ),
    st.integers(0, TOP - 1),
)
LENGTHS = st.one_of(
    st.sampled_from([0, 1, 12, 16, 32, 128, 129, 0x1000, 0x7FFFFFFF, 0xFFFFFFFF]),
    st.integers(0, 200),
)
FLAGS = st.one_of(
    st.sampled_from([0, NEXT, WRITE, WRITE | NEXT, INDIRECT]), st.integers(0, 0xFFFF)
)
DESCRIPTORS = st.builds(
    lambda *words: struct.pack("<QIHH", *words),
    ADDRESSES,
    LENGTHS,
    FLAGS,
    st.integers(0, SIZE + 1),
)
TABLES = st.one_of(
    st.lists(DESCRIPTORS, min_size=SIZE, max_size=SIZE).map(b"".join),
    st.binary(min_size=16 * SIZE, max_size=16 * SIZE),
)
HEADS = st.lists(st.integers(0, SIZE - 1), min_size=SIZE, max_size=SIZE)
RINGS = st.tuples(TABLES, TABLES, HEADS)


class Prison:
    """Guest A on guarded memory; guest B is an honest one."""

    def __init__(self):
        sizes = [size for _, size in REGIONS]
        self.starts = [GUARD + sum(sizes[:i]) + GUARD * i for i in range(len(sizes))]
        self.blank = np.full(self.starts[-1] + sizes[-1] + GUARD, 0xA5, np.uint8)
        for start, size in zip(self.starts, sizes, strict=True):
            self.blank[start : start + size] = 0
        self.guards = np.flatnonzero(self.blank)
        self.arena = self.blank.copy()
        self.bench = Bench(make_plane())
        own = self.arena[GUARD : GUARD + sizes[0]]
        self.hostile = self.bench.guest(A, size=SIZE, memory=own)
        self.honest = self.bench.guest(B)
        self.honest.post(16)
        shared = self.bench.plane.shared
        row = A * 2 * MAX_REGIONS
        for i, (gpa, size) in enumerate(REGIONS):
            region = shared.regions[row + i]
            region["gpa"] = gpa - TOP if gpa >= 1 << 63 else gpa
            region["size"] = size
            region["addr"] = self.arena.ctypes.data + self.starts[i]
        shared.ports[A]["regions"] = row << 8 | len(REGIONS)
        self.bench.round()

    def fill(self, side, rings, offered):
        """Fresh memory with these rings in it; `side` offers its first heads."""
        table, indirect, heads = rings
        self.arena[:] = self.blank
        self.hostile.write(side.desc, table)
        self.hostile.write(TABLE, indirect)
        for ring in (self.hostile.rx, self.hostile.tx):
            ring.offered = ring.seen = START
            self.hostile.write(ring.avail, struct.pack("<HH", 0, START))
            self.hostile.write(ring.used, struct.pack("<HH", 0, START))
            ring.record["state"] = RING_RUNNING
            split.resync(ring.record)
        for zeroed in (self.bench.plane.shared.counters, self.bench.plane.shared.fdb):
            zeroed[:] = 0
        self.honest.rx.offer(*(head for head, _ in self.honest.rx.reap()))
        self.honest.tx.reap()
        side.offer(*heads[:offered])

    def holds(self, addr, length):
        """Whether these bytes of our memory lie in one region."""
        at = addr - self.arena.ctypes.data
        return any(
            start <= at and at + length <= start + size
            for (_, size), start in zip(REGIONS, self.starts, strict=True)
        )

    def guards_are_whole(self):
        return bool((self.arena[self.guards] == 0xA5).all())


@pytest.fixture(scope="module")
def prison():
    prison = Prison()
    yield prison
    prison.bench.close()


def chain(*descriptors):
    """A table that begins with these (gpa, length, flags, next)."""
    packed = b"".join(struct.pack("<QIHH", *words) for words in descriptors)
    return packed.ljust(16 * SIZE, b"\0")


HEADS_0 = [0] * SIZE
A_CIRCLE = chain((GPA, 0, NEXT, 1), (GPA, 0, NEXT, 0))
A_TABLE = chain((GPA + TABLE, 16, INDIRECT, 0))


def across(gpa, flags=0):
    """A buffer of which the second half begins at an edge."""
    return chain(((gpa - 100) % TOP, 200, flags, 0))


@given(rings=RINGS, offered=st.integers(0, SIZE))
@example((A_CIRCLE, A_CIRCLE, HEADS_0), 8)
@example((A_TABLE, A_TABLE, HEADS_0), 1)
@example((A_TABLE, across(GPA + 0x12000), HEADS_0), 1)
@example((across(GPA + 0x12000), A_CIRCLE, HEADS_0), 8)
@example((across(GPA + 0x13000), A_CIRCLE, HEADS_0), 1)
@example((across(1 << 63), A_CIRCLE, HEADS_0), 1)
@example((across(TOP), A_CIRCLE, HEADS_0), 1)
@example((chain((GPA, 0xFFFFFFFF, 0, 0)), A_CIRCLE, HEADS_0), 1)
def test_take_describes_nothing_but_the_guests_memory(prison, rings, offered):
    prison.fill(prison.hostile.tx, rings, offered)
    plane, ring = prison.bench.plane, prison.hostile.tx.record
    n = split.take(ring, plane.shared.ports[A], plane.ctx, plane.tally(A))
    assert n == offered
    for i in range(n):
        frame = frame_at(int(plane.ctx["burst"]), i)
        length, eth = int(frame["length"]), int(frame["eth"])
        if length < 0:
            continue
        parts = [(int(frame["addr"]), length)]
        if frame["segments"] > 1:
            first = int(frame["first_segment"])
            rows = [
                segment_at(int(plane.ctx["segments"]), first + k)
                for k in range(int(frame["segments"]))
            ]
            parts = [(int(row["addr"]), int(row["len"])) for row in rows]
        assert all(prison.holds(*part) for part in parts)
        assert MIN_FRAME <= length <= MAX_FRAME
        assert sum(size for _, size in parts) == length
        gathered = int(plane.ctx["heads"]) + (i + 1) * ETH_SNAPSHOT
        assert eth == gathered or (eth == parts[0][0] and len(parts) == 1)
    split.release(ring, plane.shared.ports[A], plane.ctx, n)
    assert prison.hostile.tx.reap() == [(head, 0) for head in rings[2][:offered]]
    assert prison.guards_are_whole()


@given(rings=RINGS, offered=st.integers(0, SIZE))
def test_whatever_is_sent_is_given_back_and_counted(prison, rings, offered):
    prison.fill(prison.hostile.tx, rings, offered)
    assert prison.bench.round() == offered
    assert prison.hostile.tx.reap() == [(head, 0) for head in rings[2][:offered]]
    assert prison.bench.tally(A).get("rx_frames", 0) == offered
    prison.bench.check_ledger()
    assert prison.guards_are_whole()


@given(rings=RINGS, offered=st.integers(0, SIZE), mergeable=st.booleans())
@example((across(GPA + 0x12000, WRITE), A_CIRCLE, HEADS_0), 8, True)
@example((across(GPA + 0x13000, WRITE), A_CIRCLE, HEADS_0), 8, True)
@example((across(1 << 63, WRITE), A_CIRCLE, HEADS_0), 8, False)
@example((across(TOP, WRITE), A_CIRCLE, HEADS_0), 8, False)
@example((A_TABLE, across(GPA + 0x13000, WRITE), HEADS_0), 8, True)
def test_put_writes_nothing_but_the_guests_memory(prison, rings, offered, mergeable):
    prison.fill(prison.hostile.rx, rings, offered)
    features = DEFAULT if mergeable else DEFAULT & ~F_MRG_RXBUF
    prison.hostile.rx.record["features"] = features
    lengths = (14, 100, 180, 188, 189, 1514, 9000)
    for i, length in enumerate(lengths):
        frame = frame_to(9, B, length)
        prison.honest.send(frame, index=i, offset=0x20000 + 0x2400 * i)
    assert prison.bench.round() == len(lengths)
    assert prison.guards_are_whole()
    tally, back = prison.bench.tally(A), prison.hostile.rx.reap()
    assert [head for head, _ in back] == rings[2][: len(back)]
    arrived = tally.get("tx_frames", 0)
    assert arrived + sum(prison.bench.drops(A).values()) == len(lengths)
    written = tally.get("tx_bytes", 0) + 12 * arrived
    assert sum(length for _, length in back) == written


@given(heads=st.lists(st.integers(0, 2 * SIZE), max_size=SIZE))
@example([0xFFFF])
def test_a_head_outside_the_ring_breaks_it_where_it_stands(prison, heads):
    prison.fill(prison.hostile.tx, (A_TABLE, A_TABLE, heads), SIZE)
    good = next((i for i, head in enumerate(heads) if head >= SIZE), len(heads))
    assert prison.bench.round() == good
    assert prison.hostile.tx.reap() == [(head, 0) for head in heads[:good]]
    broken = good < len(heads)
    assert (prison.hostile.tx.record["state"] == RING_BROKEN) == broken
    assert prison.bench.tally(A).get("broken_rings", 0) == broken
