"""The driver's arithmetic and its reaction to a device that misbehaves."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import naive
from tests.guest.naive_packed import RING_PACKED, PackedRing
from vswitch.guest import ring as driver
from vswitch.guest import slots
from vswitch.guest.header import NetHeader, pack_headers
from vswitch.guest.layout import Layout, RingShape, Shape
from vswitch.guest.memory import GuestMemory

U16 = st.integers(0, 0xFFFF)
FEATURES = naive.VERSION_1 | naive.MRG_RXBUF | naive.EVENT_IDX
INDIRECT_DESC, IN_ORDER = 1 << 28, 1 << 35
PLAIN = Shape()
FORMATS = pytest.mark.parametrize("form", [0, RING_PACKED], ids=["split", "packed"])


@given(U16, U16, st.integers(0, 40000))
def test_an_event_is_passed_exactly_when_its_entry_was_added(event, old, added):
    new = (old + added) & 0xFFFF
    entries = {(old + i) & 0xFFFF for i in range(added)}
    assert slots.passes(event, new, old) == (event in entries)


class Rig:
    """One ring of a guest with a naive device on the other side, no socket."""

    def __init__(
        self, features=FEATURES, start=65530, size=8, receives=True, shape=PLAIN
    ):
        self.memory = GuestMemory(1 << 20)
        self.rings = np.zeros(1, driver.DRIVER_RING)
        self.ring = self.rings[0]
        plan = RingShape(size, 256, shape)
        self.layout = Layout(self.memory, plan, features, self.ring, receives=receives)
        self.layout.clear(start)
        self.ring["kick_fd"] = -1
        region = self.memory.table.regions[0]
        view = memoryview(self.memory.bytes)
        memory = naive.Memory([(region.gpa, region.frontend_va, view)])
        areas = [memory.gpa_of(int(self.ring[n])) for n in ("desc", "avail", "used")]
        device = PackedRing if features & RING_PACKED else naive.Ring
        self.device = device(memory, size, *areas, features)
        if features & RING_PACKED:
            laps, index = divmod(start, size)
            position = index | (laps % 2 == 0) << 15
            self.device.next_avail = self.device.next_used = position

    def give(self, head, written):
        self.device.give(head, written)
        self.device.publish()

    def received(self):
        out, at, length = np.zeros(4096, np.uint8), *np.zeros((2, 8), np.int64)
        n = driver.receive_frames(self.ring, int(out.ctypes.data), 4096, at, length, 0)
        return [bytes(out[at[i] : at[i] + length[i]]) for i in range(n)]

    def fill(self, head, num_buffers, content):
        buffer = self.layout.buffers[head]
        data = bytes(10) + struct.pack("<H", num_buffers) + content
        buffer[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)

    def bad(self):
        return tuple(int(self.ring[n]) for n in ("bad_used", "bad_len", "bad_header"))

    def send(self, lengths, headers=0):
        data = np.arange(256, dtype=np.uint8)
        lengths = np.array(lengths)
        at = np.zeros(len(lengths), np.int64)
        data = int(data.ctypes.data)
        return driver.send_frames(self.ring, data, at, lengths, headers)

    def take(self, count):
        return [self.device.take().head for _ in range(count)]


@pytest.fixture(params=[0, RING_PACKED], ids=["split", "packed"])
def rig(request):
    return Rig(FEATURES | request.param)


def test_receive_buffers_are_offered_writable(rig):
    assert driver.post_buffers(rig.ring, 100) == 8
    chain = rig.device.take()
    assert chain.head == 65530 % 8
    assert (chain.readable, chain.room) == ([], 256)


@pytest.mark.parametrize("head", [8, 0x7FFF, 0xFFFF])
def test_an_id_that_does_not_exist_is_counted(rig, head):
    driver.post_buffers(rig.ring, 8)
    rig.give(head, 100)
    assert rig.received() == []
    assert rig.bad() == (1, 0, 0)


@pytest.mark.parametrize("head", [1 << 16, 1 << 31, 0xFFFFFFFF])
def test_an_id_that_only_a_split_ring_can_have_is_counted(head):
    rig = Rig()
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
    assert (rig.layout.outstanding, int(rig.layout._out[0])) == (8, 1)


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_count_of_buffers_is_counted(rig, count):
    driver.post_buffers(rig.ring, 8)
    rig.give(3, rig.fill(3, count, b"frame"))
    assert rig.received() == [b"frame"]
    assert rig.bad() == (0, 0, 1)


@FORMATS
def test_without_merging_the_count_is_one(form):
    rig = Rig(naive.VERSION_1 | form)
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


@FORMATS
def test_transmitted_chains_are_taken_back_once(form):
    rig = Rig(FEATURES | form, receives=False)
    assert rig.send([60] * 9) == 8
    heads = rig.take(8)
    rig.give(heads[0], 0)
    rig.give(heads[0], 0)
    assert driver.reap(rig.ring) == 1
    assert rig.bad() == (1, 0, 0)


@FORMATS
def test_a_device_that_writes_into_what_is_sent_is_counted(form):
    rig = Rig(FEATURES | form, receives=False)
    rig.send([60])
    rig.give(rig.take(1)[0], 5)
    assert driver.reap(rig.ring) == 1
    assert rig.bad() == (0, 1, 0)


@FORMATS
@pytest.mark.parametrize("shape", [Shape(), Shape(pieces=3)])
def test_one_used_entry_may_stand_for_a_batch_in_order(form, shape):
    rig = Rig(FEATURES | IN_ORDER | form, size=16, receives=False, shape=shape)
    slots = rig.layout.plan.slots
    assert rig.send([60, 61, 62, 1, 63]) == 5
    heads = rig.take(5)
    if form:
        rig.device.give(heads[0], 0)
        rig.device.give(heads[3], 0, skipped=heads[1:3])
    else:
        rig.device.give(heads[0], 0)
        rig.device.give(heads[3], 0)
        rig.device.next_used += 2
    rig.device.publish()
    assert driver.reap(rig.ring) == 4
    assert (rig.layout.outstanding, rig.bad()) == (1, (0, 0, 0))
    assert rig.send([60] * slots) == slots - 1
    assert len(set(rig.take(slots - 1))) == slots - 1


@FORMATS
def test_buffers_skipped_in_order_were_filled(form):
    rig = Rig(FEATURES | IN_ORDER | form)
    driver.post_buffers(rig.ring, 8)
    first, second = rig.take(2)
    rig.fill(first, 2, b"a" * 244)
    rig.layout.buffers[second][:10] = ord("b")
    if form:
        rig.device.give(second, 10, skipped=[first])
    else:
        rig.device.give(second, 10)
        rig.device.next_used += 1
    rig.device.publish()
    assert rig.received() == [b"a" * 244 + b"b" * 10]
    assert rig.bad() == (0, 0, 0)


@FORMATS
@pytest.mark.parametrize("indirect", [False, True])
def test_a_frame_is_cut_as_the_shape_says(form, indirect):
    features = FEATURES | INDIRECT_DESC * indirect | form
    shape = Shape(pieces=3, header_apart=True, indirect=indirect)
    rig = Rig(features, size=16, receives=False, shape=shape)
    rig.send([2, 60])
    short, long = rig.device.take(), rig.device.take()
    assert [length for _, length in short.readable] == [12, 1, 1]
    assert [length for _, length in long.readable] == [12, 20, 20, 20]


@FORMATS
def test_headers_go_in_front_and_come_back(form):
    rig = Rig(FEATURES | form, receives=False)
    headers = [NetHeader(1, 1, 54, 1400, 34, 16), NetHeader()]
    packed = pack_headers(headers, 2)
    assert rig.send([60, 61], int(packed.ctypes.data)) == 2
    for header, length in zip(headers, (60, 61), strict=True):
        chain = rig.device.take()
        data = b"".join(rig.device.memory.read(*part) for part in chain.readable)
        assert data == header.pack() + bytes(range(length))
        assert NetHeader.unpack(data[:12]) == header


@FORMATS
@pytest.mark.parametrize("features", [FEATURES, naive.VERSION_1])
def test_calls_are_refused_and_asked_for(features, form):
    rig = Rig(features | form)
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


@FORMATS
@pytest.mark.parametrize("features", [FEATURES, naive.VERSION_1])
def test_kicks_come_when_asked_for(features, form):
    rig = Rig(features | form, receives=False)
    kick = rig.ring["kick_fd"] = os.eventfd(0, os.EFD_NONBLOCK)
    device = rig.device
    for _ in range(6):
        device.pending()
        assert device.is_quiet()
        for asked in (True, False):
            rig.send([60, 61, 62])
            assert kicked(kick) == (asked or not features & naive.EVENT_IDX)
        for head in rig.take(6):
            device.give(head, 0)
        device.publish()
        refuse_kicks(rig, form)
        rig.send([60])
        assert not kicked(kick)
        rig.give(rig.take(1)[0], 0)
    os.close(kick)


def kicked(fd):
    try:
        return os.eventfd_read(fd) == 1
    except BlockingIOError:
        return False


def refuse_kicks(rig, form):
    ring, memory = rig.device, rig.device.memory
    if form:
        memory.put_u16(ring.device + 2, 1)
    elif ring.features & naive.EVENT_IDX:
        memory.put_u16(ring.used + 4 + 8 * ring.size, ring.next_avail - 1)
    else:
        memory.put_u16(ring.used, 1)


@given(st.integers(1, 9), st.data())
def test_a_packed_event_is_passed_exactly_when_its_descriptor_was_added(size, data):
    lap = 1 << 15
    old = data.draw(st.integers(0, size - 1)) | data.draw(st.sampled_from([0, lap]))
    added = data.draw(st.integers(1, size))
    event = data.draw(st.integers(0, size - 1)) | data.draw(st.sampled_from([0, lap]))
    rig = Rig(FEATURES | RING_PACKED, size=size)
    positions = [old]
    for _ in range(added):
        positions.append(rig.device.after(positions[-1]))
    new = positions.pop()
    rig.ring["avail_idx"], rig.ring["avail_lap"] = new & ~lap, new >> 15
    rig.device.memory.write(rig.device.device, struct.pack("<HH", event, 2))
    # Only the lap of what is added now, or the one before, can be asked for.
    assert driver.wants_kick(rig.ring, added) == (event in positions)
