"""A guest that writes where it should not: into what is ours, or over its own rings.

Both formats. Our positions are in our own records, so nothing that a guest changes leads
anywhere but into its own memory; what it does to that is its own loss.
"""

import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ports.base import MAX_REGIONS, RING_BROKEN, RING_RUNNING
from ports.burst import BURST_SIZE, MAX_SEGMENTS
from tests.datapath import packed_rings
from tests.datapath.bench import A, B, Bench, C
from tests.datapath.conftest import make_plane
from tests.datapath.packed_rings import AVAIL, INDIRECT, NEXT, USED, WRITE, PackedGuest
from tests.datapath.rings import GPA, START, Guest, frame_to

FORMATS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
CANARY = 0xA5
SIZE = 8
# Of a guest's memory two parts are told to the switch; canaries fill the rest.
TOLD = [(0, 0x60000), (0x62000, 0x1E000)]
EDGES = [edge for start, size in TOLD for edge in (start, start + size)]


class AnyBench(Bench):
    """Guests of either format."""

    def either(self, slot, *, packed, **options):
        kind = PackedGuest if packed else Guest
        guest = kind(self.plane, slot, **options)
        self.guests.append(guest)
        return guest


@pytest.fixture
def bench(plane):
    bench = AnyBench(plane)
    yield bench
    bench.check_ledger()
    bench.close()


def offer(side, number, *parts):
    """Offer one chain of (offset, length, flags), number its head or its id."""
    parts = [(GPA + at, length, flags) for at, length, flags in parts]
    if isinstance(side, packed_rings.PackedSide):
        side.offer(number, *parts)
        return
    for n, (gpa, length, flags) in enumerate(parts):
        more = NEXT if n + 1 < len(parts) else 0
        side.describe(number + n, gpa, length, flags | more, number + n + 1)
    side.offer(number)


def numbers(back):
    return [number for number, *_ in back]


# R12.
def test_what_a_driver_writes_over_our_words_is_not_read_again(bench):
    a, b = bench.guest(A), bench.guest(B, size=64)
    b.post(40)
    bench.round()  # from here on the used index is ours
    noise = np.random.default_rng(1)
    for n in range(40):
        one = frame_to(B, A, 64 + n)
        a.send(one)
        for guest, side in ((g, s) for g in (a, b) for s in (g.rx, g.tx)):
            # The used ring's flags and index; the driver's flags; both events.
            guest.write(side.used, noise.bytes(4))
            guest.write(side.avail, noise.bytes(2))
            guest.write(side.used + 4 + 8 * side.size, noise.bytes(2))
            guest.write(side.avail + 4 + 2 * side.size, noise.bytes(2))
        assert bench.round() == 1
        for guest, side in ((a, a.tx), (b, b.rx)):
            (index,) = struct.unpack("<H", guest.read(side.used + 2, 2))
            assert index == (START + n + 1) & 0xFFFF
        assert b.buffer(n, 12 + 64 + n)[12:] == one


# R14.
@FORMATS
def test_a_driver_that_wants_every_call_gets_one_a_burst(bench, packed):
    a, b = (bench.either(slot, packed=packed, size=128) for slot in (A, B))
    b.post(BURST_SIZE)
    bench.round()
    a.calls(), b.calls()
    for n in range(BURST_SIZE):
        data = bytes(12) + frame_to(B, A)
        a.put(0x20000, data)
        offer(a.tx, n, (0x20000, len(data), 0))
    assert bench.round() == BURST_SIZE
    assert len(b.rx.reap()) == BURST_SIZE
    assert (a.calls(), b.calls()) == (1, 1)


# R10.
@FORMATS
@pytest.mark.parametrize("pieces", [MAX_SEGMENTS, MAX_SEGMENTS + 1, 200])
def test_a_frame_in_very_many_pieces_is_counted_and_given_back(bench, packed, pieces):
    a, b = bench.either(A, packed=packed, size=256), bench.guest(B)
    b.post(1)
    data = bytes(12) + frame_to(B, A, pieces)
    a.put(0x20000, data)
    head = (0x20000, 13, 0)
    offer(a.tx, 0, head, *[(0x2000D + n, 1, 0) for n in range(pieces - 1)])
    assert bench.turn() == 1
    assert numbers(a.tx.reap()) == [0]
    arrives = pieces <= MAX_SEGMENTS
    assert bench.drops(A) == ({} if arrives else {"rx_drop_too_long": 1})
    assert [b.buffer(n, len(data))[12:] for n, _ in b.rx.reap()] == [
        data[12:]
    ] * arrives


class Caged:
    """Guest A between canaries, and two that are honest."""

    def __init__(self):
        self.bench = AnyBench(make_plane())
        self.b, self.c = self.bench.guest(B, size=64), self.bench.guest(C, size=64)
        self.c.post(64)
        self.a = None

    def renew(self, *, packed):
        """Guest A anew, with rings that begin where they always do."""
        shared = self.bench.plane.shared
        if self.a:
            self.bench.guests.remove(self.a)
            self.a.close()
        self.a = self.bench.either(A, packed=packed, size=SIZE)
        row = A * 2 * MAX_REGIONS
        for n, (start, size) in enumerate(TOLD):
            region = shared.regions[row + n]
            region["gpa"], region["size"] = GPA + start, size
            region["addr"] = self.a.memory.ctypes.data + start
        shared.ports[A]["regions"] = row << 8 | len(TOLD)
        for canaries in self.canaries():
            canaries[:] = CANARY
        for zeroed in (shared.counters, shared.fdb):
            zeroed[:] = 0
        self.b.tx.reap()
        self.take()
        self.bench.round()
        return self.a

    def canaries(self):
        """What lies between the parts that were told, and behind them."""
        return np.split(self.a.memory, EDGES)[2::2]

    def take(self):
        """What the honest one got."""
        back = self.c.rx.reap()
        self.c.rx.offer(*numbers(back))
        return [self.c.buffer(n, length)[12:] for n, length in back]

    def check(self):
        """Send to A and past it: the honest notice nothing, and nothing is outside."""
        lengths = (60, 700, 1514)
        frames = [frame_to(C, B, n) for n in lengths]
        for n, one in enumerate([frame_to(A, B, n) for n in lengths] + frames):
            self.b.send(one, index=n, offset=0x20000 + 0x800 * n)
        self.bench.round()
        assert numbers(self.b.tx.reap()) == [*range(2 * len(lengths))]
        assert self.take()[-len(frames) :] == frames
        assert all((canaries == CANARY).all() for canaries in self.canaries())
        for side in (self.a.rx, self.a.tx):
            assert int(side.record["state"]) in {RING_RUNNING, RING_BROKEN}
        self.bench.check_ledger()


@pytest.fixture(scope="module")
def caged():
    caged = Caged()
    yield caged
    caged.bench.close()


# R11.
@FORMATS
def test_receive_buffers_over_the_rings_and_each_other_hurt_nobody(caged, packed):
    a = caged.renew(packed=packed)
    places = [
        *(a.rx.desc, a.tx.desc, a.rx.record["used"], a.rx.record["avail"]),
        *(0x50000, 0x50000, 0x50010, TOLD[0][1] - 256),
    ]
    base = a.memory.ctypes.data
    for n, at in enumerate(places[:SIZE]):
        offset = int(at) - base if int(at) >= base else int(at)
        offer(a.rx, n, (offset, 256, WRITE))
    for _ in range(4):
        caged.check()


NEAR_EDGES = st.builds(
    lambda edge, by: (GPA + edge + by) % (1 << 64),
    st.sampled_from(EDGES),
    st.integers(-2000, 2000),
)
ADDRESSES = st.one_of(st.just(GPA + 0x20000), NEAR_EDGES, st.integers(0, (1 << 64) - 1))
LENGTHS = st.one_of(
    st.integers(0, 3000),
    st.sampled_from([0, 1, 12, 16, 128, 2048, 0x7FFFFFFF, 0xFFFFFFFF]),
)
SHAPES = st.sampled_from([0, WRITE, NEXT, WRITE | NEXT, INDIRECT])
DESCRIPTORS = st.tuples(ADDRESSES, LENGTHS, st.integers(0, 0xFFFF), SHAPES)
ANY_FLAGS = st.none() | st.integers(0, 0xFFFF)


def table(descriptors, wrap, odd):
    """A ring whose descriptors are there, up to `wrap` in one lap; one of them is odd."""
    rows = []
    for n, (gpa, length, number, shape) in enumerate(descriptors):
        lap = USED if n < wrap else AVAIL
        flags = shape | lap if odd is None or n != odd % SIZE else odd
        rows.append(struct.pack("<QIHH", gpa, length, number, flags))
    return b"".join(rows)


TABLES = st.builds(
    table,
    st.lists(DESCRIPTORS, min_size=SIZE, max_size=SIZE),
    st.just(SIZE - 2) | st.integers(0, SIZE),  # where the rings begin, or anywhere
    ANY_FLAGS,
)
EVENTS = st.binary(min_size=4, max_size=4)
CIRCLE = table([(GPA, 100, 1, NEXT)] * SIZE, SIZE - 2, None)
ACROSS = table([(GPA + EDGES[1] - 100, 180, 1, WRITE)] * SIZE, SIZE - 2, None)


# R16.
@given(tables=st.lists(st.tuples(TABLES, TABLES, EVENTS), min_size=1, max_size=3))
@example([(CIRCLE, CIRCLE, bytes(4))] * 2)
@example([(ACROSS, ACROSS, bytes(4))])
def test_packed_rings_of_anything_hurt_nobody(caged, tables):
    a = caged.renew(packed=True)
    for rx, tx, event in tables:
        for side, table in ((a.rx, rx), (a.tx, tx)):
            a.write(side.desc, table)
            a.write(side.driver, event)
        caged.check()
