"""The driver's arithmetic and its reaction to a device that misbehaves."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import naive
from vswitch.guest import ring as driver
from vswitch.guest.layout import Layout, RingShape, Shape
from vswitch.guest.memory import GuestMemory

U16 = st.integers(0, 0xFFFF)
FEATURES = naive.VERSION_1 | naive.MRG_RXBUF | naive.EVENT_IDX


@given(U16, U16, st.integers(0, 40000))
def test_an_event_is_passed_exactly_when_its_entry_was_added(event, old, added):
    new = (old + added) & 0xFFFF
    entries = {(old + i) & 0xFFFF for i in range(added)}
    assert driver.passes(event, new, old) == (event in entries)


class Rig:
    """One ring of a guest with a naive device on the other side, no socket."""

    def __init__(self, features=FEATURES, start=65530, size=8):
        self.memory = GuestMemory(1 << 20)
        self.rings = np.zeros(1, driver.DRIVER_RING)
        self.ring = self.rings[0]
        plan = RingShape(size, 256, Shape())
        self.layout = Layout(self.memory, plan, features, self.ring)
        self.layout.clear(start)
        self.ring["kick_fd"] = -1
        region = self.memory.table.regions[0]
        view = memoryview(self.memory.bytes)
        memory = naive.Memory([(region.gpa, region.frontend_va, view)])
        areas = [memory.gpa_of(int(self.ring[n])) for n in ("desc", "avail", "used")]
        self.device = naive.Ring(memory, size, *areas, features)

    def give(self, head, written):
        self.device.give(head, written)
        self.device.publish()

    def received(self):
        out, at, length = np.zeros(4096, np.uint8), *np.zeros((2, 8), np.int64)
        n = driver.receive_frames(self.ring, int(out.ctypes.data), 4096, at, length)
        return [bytes(out[at[i] : at[i] + length[i]]) for i in range(n)]

    def fill(self, head, num_buffers, content):
        buffer = self.layout.buffers[head]
        data = bytes(10) + struct.pack("<H", num_buffers) + content
        buffer[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)

    def bad(self):
        return tuple(int(self.ring[n]) for n in ("bad_used", "bad_len", "bad_header"))


@pytest.fixture
def rig():
    return Rig()


def test_receive_buffers_are_offered_writable(rig):
    assert driver.post_buffers(rig.ring, 100) == 8
    chain = rig.device.take()
    assert chain.head == 65530 % 8
    assert (chain.readable, chain.room) == ([], 256)


@pytest.mark.parametrize("head", [8, 1 << 31, 0xFFFFFFFF])
def test_an_id_that_does_not_exist_is_counted(rig, head):
    driver.post_buffers(rig.ring, 8)
    rig.give(head, 100)
    assert rig.received() == []
    assert rig.bad() == (1, 0, 0)


def test_a_buffer_returned_that_was_not_offered_is_counted(rig):
    driver.post_buffers(rig.ring, 1)
    rig.give(65530 % 8 ^ 1, 100)
    assert rig.received() == []
    assert rig.bad() == (1, 0, 0)


@pytest.mark.parametrize("written", [0, 11, 257, 0xFFFFFFFF])
def test_a_length_that_cannot_be_is_counted(rig, written):
    driver.post_buffers(rig.ring, 8)
    rig.give(0, written)
    assert rig.received() == []
    assert rig.bad() == (0, 1, 0)
    assert rig.ring["avail_idx"] == (65530 + 8 + 1) & 0xFFFF


@pytest.mark.parametrize(("features", "count"), [(FEATURES, 0), (FEATURES, 2)])
def test_a_wrong_count_of_buffers_is_counted(features, count):
    rig = Rig(features)
    driver.post_buffers(rig.ring, 8)
    rig.give(3, rig.fill(3, count, b"frame"))
    assert rig.received() == [b"frame"]
    assert rig.bad() == (0, 0, 1)


def test_without_merging_the_count_is_one():
    rig = Rig(naive.VERSION_1)
    driver.post_buffers(rig.ring, 8)
    for head, count in ((2, 1), (3, 0), (4, 2)):
        rig.give(head, rig.fill(head, count, b"frame"))
    assert rig.received() == [b"frame"] * 3
    assert rig.bad() == (0, 0, 2)


def test_a_merged_buffer_that_is_not_full_is_counted(rig):
    driver.post_buffers(rig.ring, 8)
    rig.give(2, rig.fill(2, 2, b"a" * 100))
    rig.layout.buffers[3][:10] = ord("b")
    rig.give(3, 10)
    assert rig.received() == [b"a" * 100 + b"b" * 10]
    assert rig.bad() == (0, 1, 0)


def test_buffers_may_come_back_in_any_order(rig):
    driver.post_buffers(rig.ring, 8)
    for head in (7, 2, 5):
        rig.give(head, rig.fill(head, 1, bytes([head]) * 20))
    assert [frame[0] for frame in rig.received()] == [7, 2, 5]
    assert rig.bad() == (0, 0, 0)


def test_a_write_past_a_buffer_is_seen(rig):
    driver.post_buffers(rig.ring, 8)
    rig.layout.buffers[3][256] = 0
    assert rig.layout.overrun() == 1


def test_transmitted_chains_are_taken_back_once(rig):
    data = np.arange(64, dtype=np.uint8)
    at, length = np.zeros(8, np.int64), np.full(8, 60)
    assert driver.send_frames(rig.ring, int(data.ctypes.data), at, length) == 8
    heads = [rig.device.take().head for _ in range(8)]
    rig.give(heads[0], 0)
    rig.give(heads[0], 0)
    assert driver.reap(rig.ring) == 1
    assert rig.bad() == (1, 0, 0)
    rig.give(heads[1], 5)
    assert driver.reap(rig.ring) == 1
    assert rig.bad() == (1, 1, 0)


@pytest.mark.parametrize("features", [FEATURES, naive.VERSION_1])
def test_calls_are_refused_and_asked_for(features):
    rig = Rig(features)
    driver.post_buffers(rig.ring, 8)
    rig.give(2, rig.fill(2, 1, b"frame"))
    driver.refuse_calls(rig.ring)
    rig.received()
    driver.refuse_calls(rig.ring)
    rig.device.give(3, rig.fill(3, 1, b"frame"))
    assert not rig.device.publish()
    assert driver.ask_for_calls(rig.ring) == 1
    rig.received()
    assert driver.ask_for_calls(rig.ring) == 0
    rig.device.give(4, rig.fill(4, 1, b"frame"))
    assert rig.device.publish()


@pytest.mark.parametrize("features", [FEATURES, naive.VERSION_1])
def test_kicks_come_when_asked_for(features):
    rig = Rig(features)
    memory, ring = rig.device.memory, rig.device
    driver.post_buffers(rig.ring, 4)
    ring.pending()
    assert ring.is_quiet()
    old, new = 65534, 65535
    assert driver.wants_kick(rig.ring, new, old)
    if features & naive.EVENT_IDX:
        memory.put_u16(ring.used + 4 + 8 * 8, 65533)
    else:
        memory.put_u16(ring.used, 1)
    assert not driver.wants_kick(rig.ring, new, old)
