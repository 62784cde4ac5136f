"""Packed rings seen from the driver: shapes, laps, hostility, notifications, a crash."""

import itertools
import struct

import pytest

from ports.base import REDO_ROWS, RING_BROKEN
from ports.vhost.virtio import (
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    F_EVENT_IDX,
    F_MRG_RXBUF,
    PACKED_BASE,
)
from tests.datapath.bench import Bench
from tests.datapath.packed_rings import (
    DEFAULT,
    GPA,
    INDIRECT,
    LAP,
    MEMORY,
    NEXT,
    WRITE,
    PackedGuest,
)
from tests.datapath.rings import frame_to
from vswitch.datapath import loop

A, B = 1, 2


class PackedBench(Bench):
    def packed(self, slot, **options):
        guest = PackedGuest(self.plane, slot, **options)
        self.guests.append(guest)
        return guest


@pytest.fixture
def bench(plane):
    bench = PackedBench(plane)
    yield bench
    bench.check_ledger()
    for guest in bench.guests:
        guest.close()


@pytest.fixture
def pair(bench):
    a, b = bench.packed(A), bench.packed(B)
    b.post(8)
    return a, b


def test_a_frame_goes_from_guest_to_guest(bench, pair):
    a, b = pair
    frame = frame_to(B, A, 100)
    a.send(frame, chain_id=7)
    assert bench.turn() == 1
    assert a.tx.reap() == [(7, 0, 0)]
    assert b.rx.reap() == [(0, 112, WRITE)]
    assert b.buffer(0, 112) == bytes(10) + b"\x01\x00" + frame


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 100])
def test_many_laps_of_rings_of_any_size(bench, size):
    a, b = bench.packed(A, size=size), bench.packed(B, size=size, start=LAP)
    for number in range(3 * size + 2):
        b.rx.offer(number, (GPA + 0x40000, 2048, WRITE))
        frame = frame_to(B, A, 64, struct.pack("<I", number) + bytes(46))
        a.send(frame, chain_id=number)
        bench.turn()
        assert a.tx.reap() == [(number, 0, 0)]
        assert b.rx.reap() == [(number, 76, WRITE)]
        assert b.buffer(0, 76)[12:] == frame


def test_a_burst_crosses_the_wrap_in_order(bench, pair):
    a, b = pair
    for n in range(6):
        a.send(frame_to(B, A, 64 + n), chain_id=n, offset=0x20000 + 256 * n)
    assert bench.turn() == 6
    assert a.tx.reap() == [(n, 0, 0) for n in range(6)]
    assert b.rx.reap() == [(n, 76 + n, WRITE) for n in range(6)]


def test_split_and_packed_guests_talk(bench):
    a, b = bench.packed(A), bench.guest(B)
    a.post(4)
    b.post(4)
    there, back = frame_to(B, A, 200), frame_to(A, B, 300)
    a.send(there)
    b.send(back)
    bench.turn()
    assert b.buffer(0, 212)[12:] == there
    assert a.buffer(0, 312)[12:] == back


def pieces_of(data, cuts):
    edges = [0, *cuts, len(data)]
    return [data[i:j] for i, j in itertools.pairwise(edges)]


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("cuts", [[12], [1, 5, 11], [13], [12, 18, 25], [10, 60]])
def test_a_frame_may_be_spread_over_any_descriptors(bench, pair, cuts, indirect):
    a, b = pair
    frame = frame_to(B, A, 90)
    parts = [
        (a.put(0x20000 + 256 * n, piece), len(piece), 0)
        for n, piece in enumerate(pieces_of(bytes(12) + frame, cuts))
    ]
    if indirect:
        table = b"".join(struct.pack("<QIHH", *part[:2], 0, 0) for part in parts)
        parts = [(a.put(0x30000, table), len(table), INDIRECT)]
    a.tx.offer(3, *parts)
    a.send(frame_to(B, A, 64), chain_id=4, offset=0x28000)
    assert bench.turn() == 2
    assert a.tx.reap() == [(3, 0, 0), (4, 0, 0)]
    assert b.rx.reap() == [(0, 102, WRITE), (1, 76, WRITE)]
    assert b.buffer(0, 102)[12:] == frame


def one_bad(a, gpa=GPA + 0x20000, length=100, flags=0):
    a.tx.offer(5, (gpa, length, flags))


def table(a, *entries, length=None):
    raw = b"".join(struct.pack("<QIHH", *entry) for entry in entries)
    size = len(raw) if length is None else length
    one_bad(a, a.put(0x30000, raw), size, INDIRECT)


BAD_CHAINS = {
    "outside memory": lambda a: one_bad(a, gpa=0x1000),
    "across the end": lambda a: one_bad(a, gpa=GPA + MEMORY - 50),
    "around the address space": lambda a: one_bad(a, gpa=2**64 - 50),
    "zero length": lambda a: one_bad(a, length=0),
    "a header alone": lambda a: one_bad(a, length=12),
    "writable": lambda a: one_bad(a, flags=WRITE),
    "ragged table": lambda a: table(a, (GPA, 100, 0, 0), length=17),
    "empty table": lambda a: table(a, (GPA, 100, 0, 0), length=0),
    "table larger than the ring": lambda a: table(a, (GPA, 100, 0, 0), length=17 * 16),
    "table outside memory": lambda a: one_bad(a, 0x1000, 16, INDIRECT),
    "table in a table": lambda a: table(a, (GPA + 0x30000, 16, 0, INDIRECT)),
    "table with next": lambda a: a.tx.offer(
        5, (GPA + 0x30000, 16, INDIRECT), (GPA + 0x20000, 100, 0)
    ),
}


@pytest.mark.parametrize("build", BAD_CHAINS.values(), ids=BAD_CHAINS)
def test_a_malformed_chain_is_returned_and_counted(bench, pair, build):
    a, b = pair
    build(a)
    a.send(frame_to(B, A), chain_id=6, offset=0x28000)
    assert bench.turn() == 2
    assert a.tx.reap() == [(5, 0, 0), (6, 0, 0)]
    assert bench.drops(A) == {"rx_drop_bad_chain": 1}
    assert b.rx.reap() == [(0, 76, WRITE)]


def test_a_chain_without_an_end_breaks_only_its_ring(bench, pair):
    a, _ = pair
    a.tx.offer(1, *[(GPA + 0x20000, 10, NEXT)] * 16)
    assert bench.turn() == 0
    assert a.tx.record["state"] == RING_BROKEN
    assert a.rx.record["state"] != RING_BROKEN
    assert int(bench.plane.tally(A)["broken_rings"]) == 1


def test_a_receive_chain_without_an_end_breaks_only_its_ring(bench):
    a, b = bench.packed(A), bench.packed(B)
    b.rx.offer(1, *[(GPA + 0x40000, 10, WRITE | NEXT)] * 16)
    a.send(frame_to(B, A))
    bench.turn()
    assert b.rx.record["state"] == RING_BROKEN
    assert bench.drops(B) == {"tx_drop_not_ready": 1}
    assert a.tx.reap() == [(0, 0, 0)]


@pytest.mark.parametrize(("empty", "arrived"), [(200, 1), (300, 0)])
def test_a_long_table_of_nothing_does_not_hold_the_worker(bench, empty, arrived):
    a, b = bench.packed(A, size=512), bench.packed(B)
    b.post(1)
    gpa = a.put(0x20000, bytes(12) + frame_to(B, A))
    table(a, *[(gpa, 0, 0, 0)] * empty, (gpa, 76, 0, 0))
    bench.turn()
    assert len(a.tx.reap()) == 1
    assert len(b.rx.reap()) == arrived
    assert bench.drops(A) == ({} if arrived else {"rx_drop_bad_chain": 1})


@pytest.mark.parametrize("count", [2, 7, 40])
def test_a_frame_fills_as_many_mergeable_buffers_as_it_needs(bench, count):
    a = bench.packed(A)
    b = bench.packed(B, size=64, start=60 | LAP)
    b.post(count, length=100, base=0x40000)
    frame = frame_to(B, A, 100 * count - 12 - 3)
    a.send(frame)
    bench.turn()
    *full, last = b.rx.reap()
    assert full == [(n, 100, WRITE) for n in range(count - 1)]
    assert last == (count - 1, 97, WRITE)
    data = b.read(0x40000, 100 * count - 3)
    assert data == bytes(10) + struct.pack("<H", count) + frame


def test_without_mergeable_buffers_a_long_frame_is_dropped(bench):
    a = bench.packed(A)
    b = bench.packed(B, features=DEFAULT & ~F_MRG_RXBUF)
    b.post(4, length=100)
    a.send(frame_to(B, A, 500), chain_id=1)
    a.send(frame_to(B, A, 64), chain_id=2, offset=0x28000)
    bench.turn()
    assert bench.drops(B) == {"tx_drop_too_long": 1}
    assert b.rx.reap() == [(0, 76, WRITE)]


@pytest.mark.parametrize("indirect", [False, True])
def test_a_receive_buffer_may_be_a_chain(bench, indirect):
    a, b = bench.packed(A), bench.packed(B)
    parts = [(GPA + 0x40000 + 1000 * n, 30, WRITE) for n in range(4)]
    if indirect:
        raw = b"".join(struct.pack("<QIHH", gpa, 30, 0, WRITE) for gpa, _, _ in parts)
        parts = [(b.put(0x30000, raw), len(raw), INDIRECT)]
    b.rx.offer(9, *parts)
    b.rx.offer(8, (GPA + 0x60000, 2048, WRITE))
    frame = frame_to(B, A, 100)
    a.send(frame, chain_id=1)
    a.send(frame, chain_id=2, offset=0x28000)
    bench.turn()
    assert b.rx.reap() == [(9, 112, WRITE), (8, 112, WRITE)]
    got = b"".join(b.read(0x40000 + 1000 * n, 30) for n in range(4))[:112]
    assert got[12:] == frame


def test_a_readable_receive_buffer_is_never_written(bench):
    a, b = bench.packed(A), bench.packed(B)
    b.put(0x40000, b"\xaa" * 2048)
    b.rx.offer(1, (GPA + 0x40000, 2048, 0))
    b.rx.offer(2, (GPA + 0x50000, 2048, WRITE))
    a.send(frame_to(B, A), chain_id=1)
    a.send(frame_to(B, A), chain_id=2, offset=0x28000)
    bench.turn()
    assert b.read(0x40000, 2048) == b"\xaa" * 2048
    assert b.rx.reap() == [(1, 0, 0), (2, 76, WRITE)]
    assert bench.drops(B) == {"tx_drop_bad_chain": 1}


def test_a_bad_chain_behind_a_good_one_does_not_block_the_ring(bench):
    a, b = bench.packed(A), bench.packed(B)
    b.rx.offer(1, (GPA + 0x40000, 100, WRITE))
    b.rx.offer(2, (GPA + 0x50000, 2048, 0))
    b.rx.offer(3, (GPA + 0x60000, 2048, WRITE))
    for n in range(3):
        a.send(frame_to(B, A, 500), chain_id=n, offset=0x20000 + 1024 * n)
    bench.turn()
    assert b.rx.reap() == [(1, 0, 0), (2, 0, 0), (3, 512, WRITE)]
    assert bench.drops(B) == {"tx_drop_bad_chain": 2}


def test_a_full_ring_drops_what_it_has_no_room_for(bench):
    a, b = bench.packed(A), bench.packed(B)
    b.post(2)
    for n in range(5):
        a.send(frame_to(B, A), chain_id=n, offset=0x20000 + 256 * n)
    bench.turn()
    assert len(b.rx.reap()) == 2
    assert bench.drops(B) == {"tx_drop_ring_full": 3}
    assert len(a.tx.reap()) == 5


def test_a_burst_longer_than_the_redo_rows_arrives_whole(bench):
    a = bench.packed(A, size=256, start=LAP)
    b = bench.packed(B, size=512, start=500 | LAP)
    b.post(300, length=40, base=0x40000)
    lengths = [64 + n % 50 for n in range(64)]
    for n, length in enumerate(lengths):
        a.send(frame_to(B, A, length), chain_id=n, offset=0x20000 + 256 * n)
    assert sum(-(-(12 + length) // 40) for length in lengths) > REDO_ROWS
    bench.turn()
    back = b.rx.reap()
    assert [n for n, _, _ in back] == list(range(len(back)))
    assert sum(written for _, written, _ in back) == sum(lengths) + 12 * 64
    assert bench.drops(B) == {}


def test_the_driver_says_whether_it_is_called(bench, pair):
    a, _ = pair
    for flags, calls in ((EVENT_ENABLE, 1), (EVENT_DISABLE, 0), (EVENT_ENABLE, 1)):
        a.tx.set_driver_event(flags)
        a.send(frame_to(B, A))
        bench.turn()
        a.tx.reap()
        assert a.calls() == calls


@pytest.mark.parametrize("ahead", range(6))
def test_event_idx_calls_exactly_when_the_position_is_passed(bench, ahead):
    a = bench.packed(A, features=DEFAULT | F_EVENT_IDX)
    b = bench.packed(B)
    b.post(12)
    a.send(frame_to(B, A))
    bench.turn()  # the first completion always calls
    a.tx.reap()
    assert a.calls() == 1
    wish = a.tx.next + ahead
    wish = wish - 16 | (1 - a.tx.lap) << 15 if wish >= 16 else wish | a.tx.lap << 15
    a.tx.set_driver_event(EVENT_DESC, wish)
    for n in range(6):
        a.send(frame_to(B, A))
        bench.turn()
        a.tx.reap()
        assert a.calls() == (n == ahead)


@pytest.mark.parametrize("event_idx", [0, F_EVENT_IDX])
def test_before_sleep_a_kick_is_asked_for_and_a_late_chain_is_seen(bench, event_idx):
    a = bench.packed(A, features=DEFAULT | event_idx)
    ctx, polled = bench.plane.ctx, None
    bench.turn()
    assert a.tx.device_event()[1] == EVENT_DISABLE
    polled = loop.polled_rings(bench.plane.shared, 0)
    assert loop.ask_for_kicks(ctx, 0, polled) == 0
    off_wrap, flags = a.tx.device_event()
    assert flags == (EVENT_DESC if event_idx else EVENT_ENABLE)
    if event_idx:
        assert off_wrap == a.tx.position
    a.send(frame_to(B, A))
    assert loop.ask_for_kicks(ctx, 0, polled) == 1
    loop.stop_kicks(ctx, 0, polled)
    assert a.tx.device_event()[1] == EVENT_DISABLE


def taken(bench, a, count):
    """`count` frames are offered and taken, and their worker dies before release."""
    for n in range(count):
        a.send(frame_to(B, A, 64 + n), chain_id=n, offset=0x20000 + 256 * n)
    before = a.tx.record["next_avail"].item()
    memory = a.memory.copy()
    bench.turn()
    after = a.tx.record["next_avail"].item()
    used = a.memory.copy()
    a.memory[:] = memory
    a.tx.record["next_used"] = before
    return before, after, used


def test_what_a_dead_worker_took_and_never_gave_back_is_taken_again(bench, pair):
    a, b = pair
    before, _, _ = taken(bench, a, 3)
    b.rx.reap()
    assert loop.repair_rings(bench.plane.ctx, 5, 0) > 0
    assert a.tx.record["next_avail"] == before
    bench.turn()
    assert [n for n, _, _ in a.tx.reap()] == [0, 1, 2]


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_batch_that_was_half_given_back_is_given_back_whole(bench, pair, written):
    a, _ = pair
    before, after, used = taken(bench, a, 3)
    # Its last `written` slots, as they are written from behind.
    for n in range(3 - written, 3):
        slot = 0x10000 + 16 * (((before & ~LAP) + n) % 16)
        a.memory[slot : slot + 16] = used[slot : slot + 16]
    a.tx.record["redo"] = 3
    loop.repair_rings(bench.plane.ctx, 5, 0)
    assert (a.tx.record["next_avail"], a.tx.record["next_used"]) == (after, after)
    assert a.tx.reap() == [(n, 0, 0) for n in range(3)]
    a.send(frame_to(B, A), chain_id=9)
    bench.turn()
    assert a.tx.reap() == [(9, 0, 0)]


def test_a_batch_that_was_given_back_is_left_alone(bench, pair):
    a, _ = pair
    before, after, used = taken(bench, a, 3)
    a.memory[:] = used
    a.tx.record["next_used"], a.tx.record["redo"] = before, 3
    assert len(a.tx.reap()) == 3
    a.send(frame_to(B, A), chain_id=9)
    offered = a.memory.copy()
    loop.repair_rings(bench.plane.ctx, 5, 0)
    assert (a.memory[:0x8000] == offered[:0x8000]).all()
    assert a.tx.record["next_used"] == after
    bench.turn()
    assert a.tx.reap() == [(9, 0, 0)]


def test_a_fresh_ring_begins_at_the_base_of_the_spec(bench):
    a = bench.packed(A, start=PACKED_BASE)
    assert (a.tx.next, a.tx.lap) == (0, 1)
    a.send(frame_to(B, A))
    assert bench.turn() == 1
    assert a.tx.reap() == [(0, 0, 0)]


def test_a_driver_that_began_anew_is_met_at_its_base(bench):
    a = bench.packed(A, start=PACKED_BASE)
    a.tx.record["next_avail"] = 5 | LAP  # where an earlier session stood
    a.send(frame_to(B, A))
    assert bench.turn() == 1
    assert a.tx.reap() == [(0, 0, 0)]


def test_a_driver_that_went_on_is_met_where_it_stands(bench):
    a = bench.packed(A, start=5 | LAP)
    a.tx.record["signalled_used"] = PACKED_BASE  # what its front-end says again
    a.send(frame_to(B, A))
    assert bench.turn() == 1
    assert a.tx.reap() == [(0, 0, 0)]
