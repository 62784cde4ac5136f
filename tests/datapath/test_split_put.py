"""A guest's receive ring, seen from the driver: shapes of buffers, and bad ones."""

import struct

import pytest

from ports.base import RING_BROKEN
from ports.vhost.virtio import F_INDIRECT_DESC, F_VERSION_1
from tests.datapath.bench import NEW_HEADER, A, B, C
from tests.datapath.rings import GPA, INDIRECT, MEMORY, NEXT, START, WRITE, frame_to


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


def test_a_driver_is_called_when_only_a_bad_buffer_went_back(bench, pair):
    a, _b = pair
    c = bench.guest(C)
    c.rx.describe(0, GPA + 0x50000, 2048)
    c.rx.offer(0)
    a.send(frame_to(C, A))
    bench.turn()
    assert c.rx.reap() == [(0, 0)]
    assert c.calls() == 1


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


@pytest.mark.parametrize(("empty", "arrived"), [(200, 1), (300, 0)])
def test_a_long_buffer_of_nothing_does_not_hold_the_worker(bench, pair, empty, arrived):
    a, _ = pair
    c = bench.guest(C, size=512)
    for i in range(empty):
        c.rx.describe(i, GPA + 0x50000, 0, WRITE | NEXT, i + 1)
    c.rx.describe(empty, GPA + 0x50000, 2048, WRITE)
    c.rx.offer(0)
    a.send(frame_to(C, A))
    bench.turn()
    assert c.rx.reap() == [(0, 76 * arrived)]
    assert bench.drops(C) == ({} if arrived else {"tx_drop_bad_chain": 1})


def test_a_bad_buffer_behind_good_ones_does_not_stop_long_frames_for_ever(bench, pair):
    # The frame did not fit, the buffer before the bad one was kept, and so on.
    a, _ = pair
    c = bench.guest(C)
    c.post(6, length=512)
    c.rx.describe(1, GPA + MEMORY, 512, WRITE)
    frames = [frame_to(C, A, 1000, fill=bytes([i]) * 986) for i in range(4)]
    for i, frame in enumerate(frames):
        a.send(frame, index=i, offset=0x20000 + 1024 * i)
    bench.turn()
    back = c.rx.reap()
    assert back == [(0, 0), (1, 0), (2, 512), (3, 500), (4, 512), (5, 500)]
    data = b"".join(c.buffer(head, 512, size=512) for head in (2, 3))
    assert data[12:1012] == frames[2]
    assert bench.drops(C) == {"tx_drop_bad_chain": 2}


@pytest.mark.parametrize("needed", [1, 2])
def test_a_head_outside_the_ring_breaks_only_that_ring(bench, pair, needed):
    a, b = pair
    c = bench.guest(C)
    c.post(2, length=512)
    c.rx.offer(16)
    length = 500 * needed
    for i in range(3):
        a.send(frame_to(9, A, length), index=i, offset=0x20000 + 1024 * i)
    bench.turn()
    # Two short frames, or a long one, arrive before it is seen.
    arrived = 2 // needed
    assert c.rx.reap() == [(0, 512), (1, 512 if needed == 1 else 500)]
    assert c.rx.record["state"] == RING_BROKEN
    assert bench.drops(C) == {"tx_drop_not_ready": 3 - arrived}
    assert len(b.rx.reap()) == 3


@pytest.mark.parametrize("jump", [17, 40000])
def test_an_available_index_that_jumps_breaks_the_ring(bench, pair, jump):
    a, b = pair
    b.rx.offered = (START + jump) & 0xFFFF
    b.rx.offer()
    a.send(frame_to(B, A))
    bench.turn()
    assert b.rx.record["state"] == RING_BROKEN
    assert b.rx.reap() == []
    assert bench.drops(B) == {"tx_drop_not_ready": 1}
