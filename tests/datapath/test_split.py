"""Split rings and forwarding, seen from the driver: shapes, hostility, notifications."""

import itertools
import struct

import pytest

from ports.base import KIND_VHOST_USER, RING_BROKEN
from ports.vhost.virtio import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from tests.datapath.rings import (
    DEFAULT,
    GPA,
    INDIRECT,
    MEMORY,
    NEXT,
    WRITE,
    Guest,
    frame_to,
    mac,
)
from vswitch.datapath import loop

A, B, C = 1, 2, 3
NEW_HEADER = bytes(10) + b"\x01\x00"


class Bench:
    """Guests on a plane, and a turn on demand."""

    def __init__(self, plane):
        self.plane = plane
        self.guests = []

    def guest(self, slot, **options):
        guest = Guest(self.plane, slot, **options)
        self.guests.append(guest)
        return guest

    def turn(self, now_s=0):
        loop.start_rings(self.plane.ctx, 0)
        polled = loop.polled_rings(self.plane.shared, 0)
        return loop.poll_turn(self.plane.ctx, 0, polled, now_s, 50_000)

    def drops(self, slot):
        tally = self.plane.tally(slot)
        return {
            name: int(tally[name])
            for name in tally.dtype.names
            if "_drop_" in name and tally[name]
        }

    def check_ledger(self):
        for slot in range(8):
            tally = self.plane.tally(slot)
            verdicts = int(tally["rx_forwarded"] + tally["rx_flooded"])
            verdicts += sum(n for k, n in self.drops(slot).items() if k[:2] == "rx")
            assert int(tally["rx_frames"]) == verdicts


@pytest.fixture
def bench(plane):
    bench = Bench(plane)
    yield bench
    bench.check_ledger()
    for guest in bench.guests:
        guest.close()


@pytest.fixture
def pair(bench):
    a, b = bench.guest(A), bench.guest(B)
    a.post(8)
    b.post(8)
    return a, b


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


def test_a_known_address_gets_frames_alone(bench, pair):
    a, b = pair
    c = bench.guest(C)
    c.post(4)
    b.send(frame_to(A, B))  # unknown yet: flooded
    bench.turn()
    a.send(frame_to(B, A))
    bench.turn()
    assert len(c.rx.reap()) == 1
    assert len(a.rx.reap()) == len(b.rx.reap()) == 1
    assert bench.plane.tally(A)["rx_forwarded"] == 1
    assert bench.plane.tally(B)["rx_flooded"] == 1


def test_a_broadcast_reaches_every_other_port_once(bench, pair):
    a, b = pair
    c = bench.guest(C)
    c.post(4)
    a.send(b"\xff" * 6 + mac(A) + b"\x08\x06" + bytes(46))
    bench.turn()
    assert [len(g.rx.reap()) for g in (a, b, c)] == [0, 1, 1]


def test_order_holds_between_flooded_and_known_frames(bench, pair):
    a, b = pair
    b.send(frame_to(A, B))
    bench.turn()
    a.rx.reap()
    frames = []
    for i in range(6):
        to = mac(B) if i % 2 else b"\xff" * 6
        frames.append(to + mac(A) + bytes([i]) * 60)
        a.send(frames[-1], index=i, offset=0x20000 + 256 * i)
    bench.turn()
    got = [b.buffer(head, length)[12:] for head, length in b.rx.reap()]
    assert got == frames


def test_a_hairpin_is_dropped(bench, pair):
    a, _ = pair
    a.send(frame_to(9, A))
    bench.turn()
    a.send(frame_to(A, 9))
    bench.turn()
    assert bench.drops(A) == {"rx_drop_hairpin": 1}


@pytest.mark.parametrize("src", [bytes(6), b"\x01\x00\x5e\x00\x00\x01", b"\xff" * 6])
def test_a_source_that_no_station_has_is_dropped(bench, pair, src):
    a, b = pair
    a.send(mac(B) + src + bytes(50))
    bench.turn()
    assert bench.drops(A) == {"rx_drop_bad_source": 1}
    assert b.rx.reap() == []


@pytest.mark.parametrize("forwarded", [0, 1])
def test_reserved_addresses_pass_if_the_switch_says_so(bench, pair, forwarded):
    a, b = pair
    bench.plane.shared.header[0]["forward_reserved"] = forwarded
    a.send(b"\x01\x80\xc2\x00\x00\x0e" + mac(A) + bytes(50))
    bench.turn()
    assert len(b.rx.reap()) == forwarded
    assert bench.drops(A) == ({} if forwarded else {"rx_drop_reserved": 1})


# --- shapes of transmit chains ---


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


def table_in_a_table(a):
    entry = struct.pack("<QIHH", GPA + 0x31000, 16, INDIRECT, 0)
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


# --- shapes of receive chains ---


def test_a_frame_fills_as_many_mergeable_buffers_as_it_needs(bench, pair):
    a, _ = pair
    c = bench.guest(C)
    c.post(8, length=512)
    frame = frame_to(C, A, 1500)
    a.send(frame)
    bench.turn()
    assert c.rx.reap() == [(0, 512), (1, 512), (2, 488)]
    data = b"".join(c.buffer(i, 512, size=512) for i in range(3))
    assert data[:1512] == bytes(10) + b"\x03\x00" + frame
    assert data[1512:] == bytes(24)


def test_the_longest_frame_passes_through_mergeable_buffers(bench):
    a, b = bench.guest(A, size=64), bench.guest(B, size=64)
    b.post(64, length=2048)
    frame = frame_to(B, A, 65535)
    a.send(frame, offset=0x80000)
    bench.turn()
    back = b.rx.reap()
    assert len(back) == 33
    data = b"".join(b.buffer(head, length) for head, length in back)
    assert data == bytes(10) + b"\x21\x00" + frame


def test_without_mergeable_buffers_a_long_frame_is_dropped(bench, pair):
    a, _b = pair
    c = bench.guest(C, features=F_VERSION_1)
    c.post(4, length=512)
    a.send(frame_to(C, A, 501))
    a.send(frame_to(C, A, 500), index=1, offset=0x22000)
    bench.turn()
    assert c.rx.reap() == [(0, 512)]
    assert bench.drops(C) == {"tx_drop_too_long": 1}
    assert c.buffer(0, 12, size=512) == NEW_HEADER


@pytest.mark.parametrize("indirect", [False, True])
def test_a_receive_buffer_may_be_a_chain(bench, pair, indirect):
    a, _ = pair
    c = bench.guest(C, features=F_VERSION_1 | F_INDIRECT_DESC)
    sizes = (5, 30, 0, 100)
    table = b""
    for i, size in enumerate(sizes):
        flags = WRITE | (NEXT if i < len(sizes) - 1 else 0)
        gpa = GPA + 0x50000 + 256 * i
        table += struct.pack("<QIHH", gpa, size, flags, i + 1)
        c.rx.describe(i, gpa, size, flags, i + 1)
    if indirect:
        c.rx.describe(0, c.put(0x30000, table), len(table), INDIRECT)
    c.rx.offer(0)
    frame = frame_to(C, A, 100)
    a.send(frame)
    bench.turn()
    assert c.rx.reap() == [(0, 112)]
    data = b"".join(c.read(0x50000 + 256 * i, size) for i, size in enumerate(sizes))
    assert data[:112] == NEW_HEADER + frame


@pytest.mark.parametrize("header_len", [10, 12])
def test_a_legacy_header_has_ten_bytes(bench, pair, header_len):
    a, _ = pair
    c = bench.guest(C, features=0, header_len=header_len)
    c.post(1)
    frame = frame_to(C, A)
    a.send(frame)
    c.send(frame_to(A, C))
    bench.turn()
    assert c.rx.reap() == [(0, 64 + header_len)]
    assert c.buffer(0, 64 + header_len)[header_len:] == frame
    assert len(a.rx.reap()) == 1


def test_a_readable_receive_buffer_is_never_written(bench, pair):
    a, _b = pair
    c = bench.guest(C)
    c.rx.describe(0, GPA + 0x50000, 2048)
    c.rx.describe(1, GPA + 0x51000, 2048, WRITE)
    c.rx.offer(0, 1)
    a.send(frame_to(C, A))
    a.send(frame_to(C, A), index=1, offset=0x21000)
    bench.turn()
    assert c.rx.reap() == [(0, 0), (1, 76)]
    assert c.read(0x50000, 2048) == bytes(2048)
    assert bench.drops(C) == {"tx_drop_bad_chain": 1}


def test_a_receive_buffer_outside_memory_is_returned_empty(bench, pair):
    a, _b = pair
    c = bench.guest(C)
    c.rx.describe(0, GPA + MEMORY - 10, 2048, WRITE)
    c.rx.offer(0)
    a.send(frame_to(C, A))
    bench.turn()
    assert c.rx.reap() == [(0, 0)]
    assert bench.drops(C) == {"tx_drop_bad_chain": 1}


def test_a_full_ring_drops_and_blocks_nobody(bench, pair):
    a, b = pair
    for i in range(12):
        a.send(frame_to(B, A), index=i, offset=0x20000 + 256 * i)
    bench.turn()
    assert len(a.tx.reap()) == 12
    assert len(b.rx.reap()) == 8
    assert bench.drops(B) == {"tx_drop_ring_full": 4}
    assert bench.plane.tally(B)["tx_frames"] == 8


def test_the_mtu_of_a_port_is_enforced(bench, pair):
    a, b = pair
    bench.plane.shared.ports[B]["max_frame"] = 1518
    a.send(frame_to(B, A, 1519))
    a.send(frame_to(B, A, 1518), index=1, offset=0x22000)
    bench.turn()
    assert len(b.rx.reap()) == 1
    assert bench.drops(B) == {"tx_drop_too_long": 1}


def test_a_disabled_transmit_queue_is_drained_and_discarded(bench, pair):
    a, b = pair
    a.tx.record["enabled"] = 0
    a.send(frame_to(B, A))
    bench.turn()
    assert a.tx.reap() == [(0, 0)]
    assert b.rx.reap() == []
    assert bench.drops(A) == {"rx_drop_disabled": 1}


def test_a_port_that_is_not_up_gets_nothing(bench, pair):
    a, b = pair
    b.send(frame_to(A, B))
    bench.turn()
    bench.plane.shared.ports[B]["up"] = 0
    a.send(frame_to(B, A))
    a.send(b"\xff" * 6 + mac(A) + bytes(50), index=1, offset=0x21000)
    bench.turn()
    assert b.rx.reap() == []
    assert bench.drops(B) == {"tx_drop_not_ready": 1}


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


# --- notifications ---


def test_the_first_completion_calls_and_suppression_is_obeyed(bench):
    a, b = bench.guest(A), bench.guest(B)
    b.post(4)
    a.send(frame_to(B, A))
    bench.turn()
    assert (a.calls(), b.calls()) == (1, 1)
    b.write(b.rx.avail, struct.pack("<H", 1))  # VIRTQ_AVAIL_F_NO_INTERRUPT
    a.send(frame_to(B, A))
    bench.turn()
    assert (a.calls(), b.calls()) == (1, 0)


def test_event_idx_calls_exactly_when_the_used_index_passes(bench):
    features = DEFAULT | F_EVENT_IDX
    a, b = bench.guest(A), bench.guest(B, features=features)
    b.post(16, length=1024)
    called = []
    b.rx.set_used_event((65530 + 7) & 0xFFFF)  # beyond the wrap
    for _i in range(10):
        a.send(frame_to(B, A))
        bench.turn()
        called.append(b.calls())
        a.tx.reap()
    # The first check after a start always calls; then the eighth completion does.
    assert called == [1, 0, 0, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_chain_offered_at_the_edge_of_sleep_is_seen(bench, event_idx):
    features = DEFAULT | (F_EVENT_IDX if event_idx else 0)
    a, b = bench.guest(A, features=features), bench.guest(B)
    b.post(4)
    bench.turn()
    polled = loop.polled_rings(bench.plane.shared, 0)
    assert loop.ask_for_kicks(bench.plane.ctx, 0, polled) == 0
    if event_idx:
        event = a.read(a.tx.used + 4 + 8 * a.size, 2)
        assert struct.unpack("<H", event) == (a.tx.offered,)
    else:
        assert a.read(a.tx.used, 2) == b"\x00\x00"
    a.send(frame_to(B, A))
    assert loop.ask_for_kicks(bench.plane.ctx, 0, polled) == 1
    loop.stop_kicks(bench.plane.ctx, 0, polled)
    assert event_idx or a.read(a.tx.used, 2) == b"\x01\x00"
    bench.turn()
    assert len(b.rx.reap()) == 1


# --- repair ---


def test_a_ring_is_taken_up_where_its_used_index_says(bench, pair):
    a, b = pair
    a.send(frame_to(B, A))
    bench.turn()
    shared = bench.plane.shared
    # The worker died after it took a frame and before it gave it back.
    a.send(frame_to(B, A), index=1, offset=0x21000)
    a.tx.record["next_avail"] = (int(a.tx.record["next_avail"]) + 1) & 0xFFFF
    a.tx.record["next_used"] = a.tx.record["next_avail"]
    b.rx.record["lock"] = 1
    for side in (a.rx, a.tx, b.rx, b.tx):
        side.record["owner"] = 3
    assert loop.repair_rings(bench.plane.ctx, 0, 3) == 4
    assert b.rx.record["lock"] == 0
    loop.poll_turn(bench.plane.ctx, 3, loop.polled_rings(shared, 3), 0, 50_000)
    assert a.tx.reap() == [(0, 0), (1, 0)]
    assert len(b.rx.reap()) == 2


def test_a_kind_without_a_data_path_moves_nothing(bench, pair):
    a, _b = pair
    bench.plane.shared.ports[A]["kind"] = KIND_VHOST_USER + 100
    a.send(frame_to(B, A))
    assert bench.turn() == 0
