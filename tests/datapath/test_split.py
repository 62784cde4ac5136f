"""A guest's transmit ring, seen from the driver: shapes of chains, and hostile ones."""

import itertools
import struct

import pytest

from ports.base import RING_BROKEN
from ports.vhost.virtio import F_VERSION_1
from tests.datapath.bench import NEW_HEADER, A, B
from tests.datapath.rings import GPA, INDIRECT, MEMORY, NEXT, WRITE, frame_to


def test_a_frame_goes_from_guest_to_guest(bench, pair):
    a, b = pair
    frame = frame_to(B, A, 100)
    a.send(frame)
    bench.turn()
    assert a.tx.reap() == [(0, 0)]
    assert b.rx.reap() == [(0, 112)]
    assert b.buffer(0, 112) == NEW_HEADER + frame
    assert b.buffer(0, 200)[112:] == bytes(88)  # no stale byte beyond the frame
    assert a.rx.reap() == []


@pytest.mark.parametrize("length", [14, 15, 59, 60, 64, 65, 511, 513, 1514])
def test_every_length_arrives_intact(bench, pair, length):
    a, b = pair
    frame = frame_to(B, A, length)
    a.send(frame)
    bench.turn()
    assert b.rx.reap() == [(0, length + 12)]
    assert b.buffer(0, length + 12) == NEW_HEADER + frame


def pieces_of(data, cuts):
    edges = [0, *cuts, len(data)]
    return [data[i:j] for i, j in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    "cuts", [(12,), (5,), tuple(range(1, 13)), (12, 26), (12, 13, 14), (20, 20, 40)]
)
@pytest.mark.parametrize("indirect", [False, True])
def test_a_header_may_be_spread_over_any_descriptors(bench, pair, cuts, indirect):
    a, b = pair
    frame = frame_to(B, A, 80)
    parts = pieces_of(bytes(12) + frame, cuts)
    table = b""
    for i, part in enumerate(parts):
        gpa = a.put(0x20000 + 64 * i, part)
        flags = NEXT if i < len(parts) - 1 else 0
        if indirect:
            table += struct.pack("<QIHH", gpa, len(part), flags, i + 1)
        else:
            a.tx.describe(i, gpa, len(part), flags, i + 1)
    if indirect:
        a.tx.describe(0, a.put(0x30000, table), len(table), INDIRECT)
    a.tx.offer(0)
    bench.turn()
    assert a.tx.reap() == [(0, 0)]
    assert b.rx.reap() == [(0, 92)]
    assert b.buffer(0, 92) == NEW_HEADER + frame


def test_an_indirect_table_may_follow_direct_descriptors(bench, pair):
    a, b = pair
    frame = frame_to(B, A, 80)
    a.tx.describe(0, a.put(0x20000, bytes(12)), 12, NEXT, 1)
    table = struct.pack("<QIHH", a.put(0x21000, frame), len(frame), 0, 0)
    a.tx.describe(1, a.put(0x30000, table), 16, INDIRECT)
    a.tx.offer(0)
    bench.turn()
    assert b.buffer(0, 92) == NEW_HEADER + frame


def chain_that_loops(a):
    a.tx.describe(0, GPA + 0x20000, 100, NEXT, 1)
    a.tx.describe(1, GPA + 0x20000, 100, NEXT, 0)


def chain_outside_memory(a):
    a.tx.describe(0, GPA + MEMORY, 100)


def chain_across_the_end(a):
    a.tx.describe(0, GPA + MEMORY - 50, 100)


def chain_that_wraps(a):
    a.tx.describe(0, (1 << 64) - 50, 100)


def chain_with_next_out_of_range(a):
    a.tx.describe(0, GPA + 0x20000, 100, NEXT, 16)


def chain_of_length_zero(a):
    a.tx.describe(0, GPA + 0x20000, 0)


def chain_with_a_header_alone(a):
    a.tx.describe(0, GPA + 0x20000, 12)


def chain_that_is_writable(a):
    a.tx.describe(0, GPA + 0x20000, 100, WRITE)


def table_with_a_ragged_length(a):
    a.tx.describe(0, GPA + 0x30000, 17, INDIRECT)


def table_of_length_zero(a):
    a.tx.describe(0, GPA + 0x30000, 0, INDIRECT)


def table_larger_than_the_ring(a):
    a.tx.describe(0, GPA + 0x30000, 17 * 16, INDIRECT)


def table_outside_memory(a):
    a.tx.describe(0, GPA + MEMORY, 16, INDIRECT)


def entry_of_a_frame(a):
    gpa = a.put(0x20000, bytes(12) + frame_to(B, A))
    return struct.pack("<QIHH", gpa, 76, 0, 0)


def table_across_the_end(a):
    row = int(a.plane.shared.ports[A]["regions"]) >> 8
    a.plane.shared.regions[row]["size"] = 0x30008
    a.tx.describe(0, a.put(0x30000, entry_of_a_frame(a)), 16, INDIRECT)


def table_in_a_table(a):
    inner = a.put(0x31000, entry_of_a_frame(a))
    entry = struct.pack("<QIHH", inner, 16, INDIRECT, 0)
    a.tx.describe(0, a.put(0x30000, entry), 16, INDIRECT)


def table_with_a_loop(a):
    entry = struct.pack("<QIHH", GPA + 0x20000, 64, NEXT, 0)
    a.tx.describe(0, a.put(0x30000, entry), 16, INDIRECT)


BAD_CHAINS = [
    chain_that_loops,
    chain_outside_memory,
    chain_across_the_end,
    chain_that_wraps,
    chain_with_next_out_of_range,
    chain_of_length_zero,
    chain_with_a_header_alone,
    chain_that_is_writable,
    table_with_a_ragged_length,
    table_of_length_zero,
    table_larger_than_the_ring,
    table_outside_memory,
    table_across_the_end,
    table_in_a_table,
    table_with_a_loop,
]


@pytest.mark.parametrize("build", BAD_CHAINS)
def test_a_malformed_chain_is_returned_and_counted(bench, pair, build):
    a, b = pair
    build(a)
    a.tx.offer(0)
    good = frame_to(B, A)
    a.send(good, index=5, offset=0x28000)
    bench.turn()
    assert a.tx.reap() == [(0, 0), (5, 0)]
    assert bench.drops(A) == {"rx_drop_bad_chain": 1}
    assert len(b.rx.reap()) == 1


def test_an_indirect_table_that_was_not_negotiated_is_refused(bench):
    a, b = bench.guest(A, features=F_VERSION_1), bench.guest(B)
    b.post(2)
    table = struct.pack("<QIHH", a.put(0x20000, bytes(12) + frame_to(B, A)), 76, 0, 0)
    a.tx.describe(0, a.put(0x30000, table), 16, INDIRECT)
    a.tx.offer(0)
    bench.turn()
    assert bench.drops(A) == {"rx_drop_bad_chain": 1}


def test_frames_too_short_or_too_long_are_counted(bench, pair):
    a, _b = pair
    a.send(bytes(13))
    a.send(bytes(65554), index=1, offset=0x60000)
    bench.turn()
    assert a.tx.reap() == [(0, 0), (1, 0)]
    assert bench.drops(A) == {"rx_drop_too_short": 1, "rx_drop_too_long": 1}


@pytest.mark.parametrize("split_header", [False, True])
def test_a_header_that_asks_for_an_offload_is_refused(bench, pair, split_header):
    a, _b = pair
    data = struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 6, 0) + frame_to(B, A)
    gpa = a.put(0x20000, data)
    if split_header:
        a.tx.describe(0, gpa, 1, NEXT, 1)
        a.tx.describe(1, gpa + 1, len(data) - 1)
    else:
        a.tx.describe(0, gpa, len(data))
    a.tx.offer(0)
    bench.turn()
    assert bench.drops(A) == {"rx_drop_bad_header": 1}


def test_a_head_outside_the_ring_breaks_only_that_ring(bench, pair):
    a, b = pair
    a.send(frame_to(B, A))
    a.tx.offer(16)
    b.send(frame_to(A, B))
    bench.turn()
    assert a.tx.record["state"] == RING_BROKEN
    assert bench.plane.tally(A)["broken_rings"] == 1
    assert a.tx.reap() == [(0, 0)]
    assert len(b.rx.reap()) == len(a.rx.reap()) == 1


@pytest.mark.parametrize("jump", [17, 40000])
def test_an_available_index_that_jumps_breaks_the_ring(bench, pair, jump):
    a, b = pair
    a.tx.offered = (a.tx.offered + jump) & 0xFFFF
    a.tx.offer()
    bench.turn()
    assert a.tx.record["state"] == RING_BROKEN
    assert b.rx.reap() == []


def test_a_buffer_across_two_regions_is_cut_in_two(bench, pair):
    a, b = pair
    shared = bench.plane.shared
    row = int(shared.ports[A]["regions"]) >> 8
    half = 0x20040
    shared.regions[row]["size"] = half
    shared.regions[row + 1]["gpa"] = GPA + half
    shared.regions[row + 1]["size"] = 0x1000
    # The second half lives elsewhere in our address space.
    shared.regions[row + 1]["addr"] = a.memory.ctypes.data + 0x90000
    shared.ports[A]["regions"] = row << 8 | 2
    data = bytes(12) + frame_to(B, A, 100)
    a.write(0x20000, data[:0x40])
    a.write(0x90000, data[0x40:])
    a.tx.describe(0, GPA + 0x20000, len(data))
    a.tx.offer(0)
    bench.turn()
    assert b.buffer(0, 112) == NEW_HEADER + data[12:]


@pytest.mark.parametrize(("empty", "drops"), [(200, 0), (300, 1)])
@pytest.mark.parametrize("indirect", [False, True])
def test_a_long_chain_of_nothing_does_not_hold_the_worker(
    bench, empty, drops, indirect
):
    # A ring of 32768 could name that many for each frame of each burst.
    a = bench.guest(A, size=512)
    gpa = a.put(0x40000, bytes(12) + frame_to(B, A))
    chain = [(gpa, 0, NEXT, i + 1) for i in range(empty)] + [(gpa, 76, 0, 0)]
    if indirect:
        table = b"".join(struct.pack("<QIHH", *entry) for entry in chain)
        chain = [(a.put(0x80000, table), len(table), INDIRECT, 0)]
    for i, entry in enumerate(chain):
        a.tx.describe(i, *entry)
    a.tx.offer(0)
    bench.turn()
    assert a.tx.reap() == [(0, 0)]
    assert bench.drops(A) == ({"rx_drop_bad_chain": 1} if drops else {})
