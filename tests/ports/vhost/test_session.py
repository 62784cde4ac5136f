import dataclasses
import itertools
import os
import struct
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ports.base import NO_FD
from ports.vhost import virtio
from ports.vhost.channel import close_fds
from ports.vhost.features import OFFERED, OFFERED_PROTOCOL
from ports.vhost.messages import (
    HEADER_LEN,
    PF_CONFIG,
    PF_REPLY_ACK,
    RULES,
    U64,
    Config,
    Log,
    MemoryRegion,
    MemTable,
    Message,
    Request,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
    decode_reply,
    encode_request,
)
from ports.vhost.session import NOT_SHARED, BaseReply, Place, RingAreas, Session
from tests.ports.vhost.conftest import open_fds

pytestmark = pytest.mark.usefixtures("no_fd_leak")

# A guest of two regions, its second one high up; addresses as QEMU gives them.
SIZE = 0x10_0000
LOW = MemoryRegion(0, SIZE, 0x7F00_0000_0000, 0)
HIGH = MemoryRegion(0x1_0000_0000, SIZE, 0x7F10_0000_0000, SIZE)
FEATURES = virtio.F_VERSION_1 | virtio.F_MRG_RXBUF | virtio.F_PROTOCOL_FEATURES


class FrontEnd:
    """Sends messages into a session, with whatever descriptors are asked for."""

    def __init__(self, session):
        self.session = session
        self.file = memfd(2 * SIZE)
        self.last = None

    def send(self, request, payload=None, fds=(), ack=False):
        """One message; its descriptors become the session's."""
        data = encode_request(request, payload)[HEADER_LEN:]
        return self.send_raw(request, data, fds, ack)

    def send_raw(self, request, data, fds=(), ack=False):
        self.last = self.session.handle(Message(request, ack, data, tuple(fds)))
        close_fds(self.session.take_retired())
        return self.last

    def ask(self, request, payload=None):
        return decode_reply(request, self.send(request, payload).reply)

    def ack_replies(self):
        assert not self.send(Request.SET_PROTOCOL_FEATURES, U64(PF_REPLY_ACK)).close

    def set_memory(self, *regions, **options):
        fds = [os.dup(self.file) for _ in regions]
        return self.send(Request.SET_MEM_TABLE, MemTable(regions), fds, **options)

    def set_fd(self, request, index, **options):
        return self.send(request, VringFd(index, True), [os.eventfd(0)], **options)

    def set_up(self, index, num=256):
        return [
            lambda: self.send(Request.SET_VRING_NUM, VringState(index, num)),
            lambda: self.send(Request.SET_VRING_BASE, VringState(index, 0)),
            lambda: self.send(Request.SET_VRING_ADDR, ring_addr(index)),
            lambda: self.set_fd(Request.SET_VRING_KICK, index),
            lambda: self.set_fd(Request.SET_VRING_CALL, index),
        ]

    def start(self, *indexes):
        self.send(Request.SET_FEATURES, U64(FEATURES))
        self.set_memory(LOW, HIGH)
        for step in itertools.chain.from_iterable(map(self.set_up, indexes)):
            assert not step().close

    def close(self):
        self.session.close()
        os.close(self.file)


def memfd(size):
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size)
    return fd


def ring_addr(index, region=LOW, flags=0):
    start = region.frontend_va + index * 0x1_0000
    return VringAddr(
        index, flags, desc=start, avail=start + 0x4000, used=start + 0x5000, log=0
    )


def refused(step, match):
    assert match in step.refused
    return step


def nacked(step, match):
    """Whether a failure was answered and the connection goes on."""
    assert not step.close
    assert int.from_bytes(step.reply[HEADER_LEN:], "little") == 1
    return refused(step, match)


def ended(step, match):
    assert step.close
    assert step.reply is None
    return refused(step, match)


@pytest.fixture
def front_end():
    front_end = FrontEnd(Session(max_pairs=2))
    yield front_end
    front_end.close()


@pytest.fixture
def session(front_end):
    return front_end.session


# --- negotiation ---


def test_features_may_be_asked_for_at_any_time(front_end):
    for _ in range(3):
        assert front_end.ask(Request.GET_FEATURES) == U64(OFFERED)
        front_end.start(0)
    assert OFFERED & virtio.F_PROTOCOL_FEATURES


def test_protocol_features_come_before_features_and_again(front_end, session):
    for _ in range(2):
        offered = front_end.ask(Request.GET_PROTOCOL_FEATURES)
        assert offered == U64(OFFERED_PROTOCOL)
        front_end.send(Request.SET_PROTOCOL_FEATURES, offered)
    assert session.protocol_features == OFFERED_PROTOCOL
    assert not session.features_known


@pytest.mark.parametrize("bit", [24, 38, 40, 63])
def test_feature_that_was_not_offered_is_refused(front_end, session, bit):
    step = front_end.send(Request.SET_FEATURES, U64(FEATURES | 1 << bit))
    ended(step, "SET_FEATURES: not offered")
    front_end.ack_replies()
    step = front_end.send(Request.SET_FEATURES, U64(FEATURES | 1 << bit), ack=True)
    nacked(step, "not offered")
    assert session.features is None


def test_protocol_feature_that_was_not_offered_is_refused(front_end, session):
    ended(front_end.send(Request.SET_PROTOCOL_FEATURES, U64(1 << 12)), "inflight_shmfd")
    assert session.protocol_features == 0


def test_features_may_be_repeated_but_not_changed_while_a_ring_runs(front_end, session):
    front_end.start(0)
    assert not front_end.send(Request.SET_FEATURES, U64(FEATURES)).close
    other = FEATURES | virtio.F_EVENT_IDX
    ended(front_end.send(Request.SET_FEATURES, U64(other)), "while a ring runs")
    assert session.features == FEATURES
    assert session.rings[0].runnable


def test_another_driver_may_choose_other_features_after_a_stop(front_end, session):
    front_end.start(0)
    assert session.header_len == 12
    front_end.send(Request.GET_VRING_BASE, VringState(0, 0))
    assert not front_end.send(Request.SET_FEATURES, U64(1 << 30)).close
    assert session.header_len == 10


@pytest.mark.parametrize(
    ("features", "length"),
    [
        (0, 10),
        (virtio.F_ANY_LAYOUT, 10),
        (virtio.F_MRG_RXBUF, 12),
        (virtio.F_VERSION_1, 12),
    ],
)
def test_header_length_follows_the_features(front_end, session, features, length):
    front_end.send(Request.SET_FEATURES, U64(features))
    assert session.header_len == length


def test_queue_pairs_are_told(front_end):
    assert front_end.ask(Request.GET_QUEUE_NUM) == U64(2)


def test_owner_is_of_no_consequence(front_end, session):
    front_end.start(0)
    memory = session.memory
    assert front_end.send(Request.SET_OWNER) == (None, None, None, "", False)
    assert front_end.send(Request.RESET_OWNER) == (None, None, None, "", False)
    assert session.memory is memory
    assert session.features == FEATURES
    assert session.rings[0].runnable


@pytest.mark.parametrize(("mtu", "good"), [(67, 0), (68, 1), (65535, 1), (65536, 0)])
def test_mtu_is_taken_within_limits(front_end, session, mtu, good):
    front_end.ack_replies()
    step = front_end.send(Request.NET_SET_MTU, U64(mtu), ack=True)
    assert decode_reply(Request.NET_SET_MTU, step.reply) == U64(not good)
    assert session.mtu == (mtu if good else None)


def test_status_is_a_record_and_zero_drops_nothing(front_end, session):
    front_end.start(0, 1)
    front_end.send(Request.SET_STATUS, U64(0xF))
    assert session.driver_ok
    before = (session.memory, session.features, session.rings[0].addr)
    assert not front_end.send(Request.SET_STATUS, U64(0)).close
    assert (session.memory, session.features, session.rings[0].addr) == before
    assert session.rings[0].runnable
    assert not session.driver_ok
    assert front_end.ask(Request.GET_STATUS) == U64(0)
    step = front_end.send(Request.GET_VRING_BASE, VringState(0, 0))
    assert step.base is not None
    # Size and memory are not given again.
    for restart in front_end.set_up(0)[1:]:
        restart()
    assert session.rings[0].runnable


def test_features_ok_is_taken_back_where_features_are_refused(front_end):
    front_end.ack_replies()
    front_end.send(Request.SET_STATUS, U64(0xB))
    front_end.send(Request.SET_FEATURES, U64(1 << 63), ack=True)
    assert front_end.ask(Request.GET_STATUS) == U64(0x3)


def test_status_of_more_than_a_byte_is_refused(front_end):
    ended(front_end.send(Request.SET_STATUS, U64(0x100)), "status byte")


def test_driver_is_seen_by_its_rings_where_no_status_is_sent(front_end, session):
    assert not session.driver_ok
    front_end.start(0)
    assert session.driver_ok


# --- replies ---

NATURAL = {
    Request.GET_FEATURES: None,
    Request.GET_PROTOCOL_FEATURES: None,
    Request.GET_QUEUE_NUM: None,
    Request.GET_STATUS: None,
    Request.GET_MAX_MEM_SLOTS: None,
}
ACKED = {
    Request.SET_FEATURES: U64(FEATURES),
    Request.SET_OWNER: None,
    Request.RESET_OWNER: None,
    Request.SET_LOG_FD: None,
    Request.SET_VRING_NUM: VringState(0, 256),
    Request.SET_VRING_ADDR: ring_addr(0),
    Request.SET_VRING_BASE: VringState(0, 0),
    Request.SET_VRING_KICK: VringFd(0, False),
    Request.SET_VRING_CALL: VringFd(0, False),
    Request.SET_VRING_ERR: VringFd(0, False),
    Request.SET_PROTOCOL_FEATURES: U64(PF_REPLY_ACK),
    Request.SET_VRING_ENABLE: VringState(0, 1),
    Request.SEND_RARP: U64(0x563412005452),
    Request.NET_SET_MTU: U64(1500),
    Request.RESET_DEVICE: None,
    Request.REM_MEM_REG: SingleRegion(LOW),
    Request.SET_STATUS: U64(1),
}


@pytest.mark.parametrize("request_id", ACKED, ids=lambda r: r.name)
def test_acknowledgement_comes_only_where_asked_for_and_negotiated(
    front_end, request_id
):
    payload = ACKED[request_id]
    if request_id != Request.SET_PROTOCOL_FEATURES:
        assert front_end.send(request_id, payload, ack=True).reply is None
    front_end.ack_replies()
    assert front_end.send(request_id, payload).reply is None
    step = front_end.send(request_id, payload, ack=True)
    assert decode_reply(request_id, step.reply) == U64(0)
    assert decode_reply(request_id, step.nack) == U64(1)


@pytest.mark.parametrize("request_id", NATURAL, ids=lambda r: r.name)
def test_reply_of_its_own_is_the_only_one(front_end, request_id):
    plain = front_end.send(request_id).reply
    front_end.ack_replies()
    assert front_end.send(request_id, ack=True) == (plain, None, None, "", False)


def test_memory_table_is_acknowledged(front_end):
    front_end.ack_replies()
    step = front_end.set_memory(LOW, ack=True)
    assert decode_reply(Request.SET_MEM_TABLE, step.reply) == U64(0)


# SET_MEM_TABLE, SET_LOG_BASE, GET_VRING_BASE, ADD_MEM_REG have tests of their own.
OTHERS = {5, 6, 11, 37}
UNOFFERED = [*sorted({*Request} - {*NATURAL, *ACKED} - OTHERS), 0, 77, 2**32 - 1]


@pytest.mark.parametrize("request_id", UNOFFERED)
def test_request_that_was_not_offered_is_answered_or_ends_the_session(
    front_end, request_id
):
    ended(front_end.send_raw(request_id, b"", [os.eventfd(0)]), "not offered")
    front_end.ack_replies()
    step = front_end.send_raw(request_id, bytes(8), [os.eventfd(0)], ack=True)
    nacked(step, "not offered")


def test_every_request_with_a_rule_is_tested_here():
    assert {*NATURAL, *ACKED, *UNOFFERED, *OTHERS} >= set(RULES)


@pytest.mark.parametrize("request_id", [*ACKED, Request.SET_MEM_TABLE])
def test_payload_of_the_wrong_size_is_refused(front_end, request_id):
    ended(front_end.send_raw(request_id, bytes(5)), "payload has 5 bytes")
    front_end.ack_replies()
    nacked(front_end.send_raw(request_id, bytes(5), ack=True), "payload has 5 bytes")


@pytest.mark.parametrize("request_id", [*NATURAL, Request.GET_VRING_BASE])
def test_no_failure_is_told_in_a_reply_of_another_shape(front_end, request_id):
    front_end.ack_replies()
    ended(front_end.send_raw(request_id, bytes(5), ack=True), "payload has 5 bytes")


@pytest.mark.parametrize("count", [1, 9, 253])
@pytest.mark.parametrize("request_id", RULES)
def test_surplus_descriptors_are_refused_and_closed(front_end, request_id, count):
    before = open_fds()
    payload = ACKED.get(request_id, MemTable((LOW,)))
    count += RULES[request_id].max_fds
    fds = [os.eventfd(0) for _ in range(count)]
    assert front_end.send(request_id, payload, fds).close
    assert open_fds() == before


# --- memory ---


def test_memory_table_is_kept_with_its_files(front_end, session):
    front_end.set_memory(LOW, HIGH)
    low, high = session.memory
    assert (low.gpa, low.size, low.frontend_va, low.mmap_offset) == (
        LOW.gpa,
        LOW.size,
        LOW.frontend_va,
        LOW.mmap_offset,
    )
    assert (high.gpa, high.mmap_offset) == (HIGH.gpa, HIGH.mmap_offset)
    assert os.fstat(low.fd).st_ino == low.inode == high.inode
    assert session.memory_problem == ""


def test_same_table_again_changes_nothing(front_end, session):
    front_end.set_memory(LOW, HIGH)
    memory, fds = session.memory, open_fds()
    for _ in range(1000):
        front_end.set_memory(LOW, HIGH)
    assert session.memory is memory
    assert open_fds() == fds


def test_same_place_in_another_file_is_another_region(front_end, session):
    front_end.set_memory(LOW)
    (old,) = session.memory
    front_end.send(Request.SET_MEM_TABLE, MemTable((LOW,)), [memfd(SIZE)])
    (new,) = session.memory
    assert new.inode != old.inode


def test_hot_plug_keeps_the_rows_that_stay_and_the_rings(front_end, session):
    front_end.start(0)
    low, high = session.memory
    more = MemoryRegion(0x2_0000_0000, SIZE, 0x7F20_0000_0000, 0)
    front_end.set_memory(LOW, HIGH, more)
    assert session.memory[:2] == (low, high)
    assert session.rings[0].runnable


def test_unplugging_the_memory_of_a_ring_ends_it_with_a_reason(front_end, session):
    front_end.start(0)
    front_end.set_memory(HIGH)
    assert not session.rings[0].runnable
    assert session.problem == (
        "ring 0: descriptor table at 0x7f0000000000, 4096 bytes, outside guest memory"
    )


def test_replaced_memory_is_handed_out_to_be_closed(front_end, session):
    front_end.set_memory(LOW, HIGH)
    low, high = session.memory
    message = encode_request(Request.SET_MEM_TABLE, MemTable((HIGH,)))
    session.handle(Message(5, False, message[HEADER_LEN:], (os.dup(front_end.file),)))
    assert session.memory == (high,)
    retired = session.take_retired()
    assert retired == [low.fd]
    assert session.take_retired() == []
    close_fds(retired)


def test_most_regions_and_huge_sparse_addresses(front_end, session):
    """DPDK: guest addresses are virtual ones. 32 regions is what rust-vmm sends."""
    rows = [
        MemoryRegion(base, 0x1000, base, i * 0x1000)
        for i in range(32)
        for base in [0x11_8020_0000 + i * 0x10_0000_0000]
    ]
    front_end.set_memory(*rows)
    assert len(session.memory) == 32
    assert session.translate(rows[31].frontend_va + 0xFFF, 1) == Place(31, 0xFFF)


TOP = 1 << 64
BAD_TABLES = {
    "size 0": [MemoryRegion(0, 0, 0, 0)],
    "wrap around": [MemoryRegion(TOP - 0x1000, 0x2000, 0, 0)],
    "wrap around ": [MemoryRegion(0, 0x2000, TOP - 0x1000, 0)],
    "of a file of 0x200000": [MemoryRegion(0, SIZE, 0, 2 * SIZE - 1)],
    "of a file of 0x200000 ": [MemoryRegion(0, SIZE, 0, TOP - 0x1000)],
    "overlap": [LOW, MemoryRegion(LOW.size - 1, 0x1000, 0x1000, 0)],
    "at front-end": [
        LOW,
        MemoryRegion(TOP // 2, 0x1000, LOW.frontend_va - 0xFFF, 0),
    ],
    "overlap ": [LOW, LOW],
    "at most 32": [MemoryRegion(i << 20, 4096, i << 20, 0) for i in range(33)],
}


@pytest.mark.parametrize("match", BAD_TABLES)
def test_impossible_table_is_refused_and_the_old_one_kept(front_end, session, match):
    front_end.ack_replies()
    front_end.start(0)
    memory = session.memory
    step = front_end.set_memory(*BAD_TABLES[match], ack=True)
    nacked(step, match.strip())
    assert session.memory is memory
    assert session.rings[0].runnable


def test_region_that_ends_where_addresses_end_is_legal(front_end, session):
    front_end.set_memory(MemoryRegion(TOP - 0x1000, 0x1000, TOP - 0x1000, 0))
    assert session.translate(TOP - 1, 1) == Place(0, 0xFFF)
    assert session.translate(TOP - 1, 2) is None


@pytest.mark.parametrize("count", [0, 1, 3])
def test_descriptors_must_match_regions(front_end, session, count):
    fds = [os.dup(front_end.file) for _ in range(count)]
    step = front_end.send(Request.SET_MEM_TABLE, MemTable((LOW, HIGH)), fds)
    ended(step, f"2 regions but {count} descriptors")
    assert session.memory == ()


def test_memory_must_be_a_file(front_end, session):
    read, write = os.pipe()
    os.close(write)
    step = front_end.send(Request.SET_MEM_TABLE, MemTable((LOW,)), [read])
    ended(step, "not a file to be mapped")
    assert "not a file" in session.memory_problem


def test_file_on_disk_is_memory_too(front_end, session):
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        step = front_end.send(
            Request.SET_MEM_TABLE, MemTable((LOW,)), [os.dup(file.fileno())]
        )
    assert not step.close
    assert len(session.memory) == 1


def test_empty_table_says_how_to_share_memory(front_end, session):
    front_end.ack_replies()
    step = front_end.set_memory(ack=True)
    nacked(step, NOT_SHARED)
    assert session.memory_problem == NOT_SHARED
    for part in (
        "-object memory-backend-memfd,id=mem,size=SIZE,share=on",
        "-machine memory-backend=mem",
    ):
        assert part in NOT_SHARED
    front_end.set_memory(LOW)
    assert session.memory_problem == ""


def test_addresses_translate_within_one_region(front_end, session):
    assert session.translate(LOW.frontend_va, 1) is None
    front_end.set_memory(LOW, HIGH)
    assert session.translate(LOW.frontend_va, SIZE) == Place(0, 0)
    assert session.translate(HIGH.frontend_va + 16, 16) == Place(1, 16)
    assert session.translate(LOW.frontend_va + 1, SIZE) is None
    assert session.translate(LOW.frontend_va - 1, 1) is None
    assert session.translate(LOW.frontend_va + SIZE, 0) is None


def test_regions_that_touch_are_still_two(front_end, session):
    front_end.set_memory(LOW, MemoryRegion(SIZE, SIZE, LOW.frontend_va + SIZE, SIZE))
    assert len(session.memory) == 2
    assert session.translate(LOW.frontend_va + SIZE - 8, 16) is None


# --- rings ---


def test_started_ring_knows_its_areas(front_end, session):
    front_end.start(0, 1)
    ring = session.rings[1]
    assert ring.runnable
    assert ring.num == 256
    assert ring.areas == RingAreas(
        desc=Place(0, 0x1_0000), avail=Place(0, 0x1_4000), used=Place(0, 0x1_5000)
    )
    assert NO_FD not in {ring.kick_fd, ring.call_fd}
    assert not session.rings[2].runnable


def test_areas_may_be_in_different_regions(front_end, session):
    front_end.start()
    low, high = LOW.frontend_va, HIGH.frontend_va
    for step in front_end.set_up(0):
        step()
    front_end.send(Request.GET_VRING_BASE, VringState(0, 0))
    front_end.send(
        Request.SET_VRING_ADDR,
        VringAddr(0, 0, desc=low, avail=high, used=low + SIZE // 2, log=0),
    )
    front_end.send(Request.SET_VRING_KICK, VringFd(0, False))
    assert session.rings[0].areas == RingAreas(
        Place(0, 0), Place(1, 0), Place(0, SIZE // 2)
    )


ORDERS = {
    "QEMU": "features memory num base addr kick call",
    "cloud-hypervisor": "features memory num addr base call kick",
    "virtio-user": "call features memory num base addr kick",
    "libkrun": "memory features num base addr kick call",
    "crosvm": "features memory num addr base call kick",
}


def steps_of(front_end, index=0):
    names = ("num", "base", "addr", "kick", "call")
    return {
        "features": lambda: front_end.send(Request.SET_FEATURES, U64(FEATURES)),
        "memory": lambda: front_end.set_memory(LOW, HIGH),
        "enable": lambda: front_end.send(
            Request.SET_VRING_ENABLE, VringState(index, 1)
        ),
        **dict(zip(names, front_end.set_up(index), strict=True)),
    }


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_ring_starts_in_the_order_of_each_front_end(front_end, session, order):
    steps = steps_of(front_end)
    for name in order.split():
        assert not steps[name]().close
    assert session.rings[0].runnable


@settings(deadline=None)
@given(
    st.permutations(
        ["features", "memory", "enable", "num", "base", "addr", "kick", "call"]
    )
)
def test_ring_starts_in_any_order_and_not_before(order):
    front_end = FrontEnd(Session(max_pairs=1))
    steps, seen = steps_of(front_end), set()
    needed = {"features", "memory", "num", "addr", "kick"}
    ring = front_end.session.rings[0]
    for name in order:
        assert not steps[name]().close
        seen.add(name)
        assert ring.runnable == (seen >= needed)
        assert ring.enabled == ("enable" in seen)
    front_end.close()


def test_ring_may_start_without_call_and_without_kick_descriptor(front_end, session):
    front_end.start()
    for step in front_end.set_up(0)[:3]:
        step()
    assert not session.rings[0].runnable
    front_end.send(Request.SET_VRING_KICK, VringFd(0, has_fd=False))
    assert session.rings[0].runnable
    assert session.rings[0].kick_fd == NO_FD


def test_enable_precedes_everything_and_survives_a_stop(front_end, session):
    front_end.send(Request.SET_VRING_ENABLE, VringState(0, 1))
    front_end.start(0, 1)
    assert session.rings[0].enabled
    assert not session.rings[1].enabled
    front_end.send(Request.GET_VRING_BASE, VringState(0, 0))
    assert session.rings[0].enabled
    assert not session.rings[0].runnable
    front_end.send(Request.SET_VRING_ENABLE, VringState(0, 0))
    assert not session.rings[0].enabled


def test_disabled_ring_is_still_runnable(front_end, session):
    front_end.start(0)
    assert session.rings[0].runnable
    assert not session.rings[0].enabled


def test_rings_are_enabled_where_protocol_features_are_not_acknowledged(
    front_end, session
):
    front_end.send(Request.SET_FEATURES, U64(virtio.F_VERSION_1))
    assert all(ring.enabled for ring in session.rings)
    front_end.send(Request.SET_FEATURES, U64(FEATURES))
    assert not any(ring.enabled for ring in session.rings)


def test_stop_asks_for_the_position_and_forgets_what_a_start_gives(front_end, session):
    front_end.start(0)
    front_end.set_fd(Request.SET_VRING_ERR, 0)
    step = front_end.send(Request.GET_VRING_BASE, VringState(0, 0xDEAD_BEEF), ack=True)
    assert step == (None, BaseReply(0, 0), None, "", False)
    reply = decode_reply(Request.GET_VRING_BASE, step.base.encode(0x1_0007))
    assert reply == VringState(0, 7)
    ring = session.rings[0]
    assert (ring.started, ring.addr, ring.areas) == (False, None, None)
    assert (ring.kick_fd, ring.call_fd) == (NO_FD, NO_FD)
    assert ring.err_fd != NO_FD
    assert ring.num == 256


def test_stop_of_a_ring_that_was_never_set_up(front_end):
    step = front_end.send(Request.GET_VRING_BASE, VringState(3, 0xDEAD))
    assert step.base == BaseReply(3, 0)
    reply = decode_reply(Request.GET_VRING_BASE, step.base.encode(step.base.fallback))
    assert reply == VringState(3, 0)


def test_stop_of_a_ring_that_was_set_up_but_never_ran(front_end):
    front_end.send(Request.SET_VRING_BASE, VringState(0, 77))
    step = front_end.send(Request.GET_VRING_BASE, VringState(0, 0))
    assert step.base == BaseReply(0, 77)


def test_running_ring_takes_the_same_again_and_nothing_else(front_end, session):
    front_end.start(0)
    same = [
        (Request.SET_VRING_NUM, VringState(0, 256)),
        (Request.SET_VRING_BASE, VringState(0, 0)),
        (Request.SET_VRING_ADDR, ring_addr(0, flags=1)),
    ]
    for request, payload in same:
        assert not front_end.send(request, payload).close
    other = [
        (Request.SET_VRING_NUM, VringState(0, 128)),
        (Request.SET_VRING_BASE, VringState(0, 1)),
        (Request.SET_VRING_ADDR, ring_addr(0, HIGH)),
    ]
    for request, payload in other:
        ended(front_end.send(request, payload), "while it runs")
    assert session.rings[0].areas.desc == Place(0, 0)
    assert session.rings[0].num == 256


@pytest.mark.parametrize("request_id", [12, 13, 14])
def test_descriptor_of_a_running_ring_may_be_replaced(front_end, session, request_id):
    front_end.start(0)
    front_end.set_fd(request_id, 0)
    fds = open_fds()
    for _ in range(100):
        front_end.set_fd(request_id, 0)
    assert open_fds() == fds
    front_end.send(request_id, VringFd(0, has_fd=False))
    assert open_fds() == fds - 1
    assert session.rings[0].runnable


@pytest.mark.parametrize("request_id", [12, 13, 14])
@pytest.mark.parametrize(("has_fd", "count"), [(True, 0), (False, 1)])
def test_ring_descriptor_must_come_as_announced(front_end, request_id, has_fd, count):
    fds = [os.eventfd(0) for _ in range(count)]
    step = front_end.send(request_id, VringFd(0, has_fd), fds)
    ended(step, f"{count} descriptors, not {int(has_fd)}")


@pytest.mark.parametrize("request_id", [12, 13, 14])
def test_ring_descriptor_must_be_an_eventfd(front_end, session, request_id):
    read, write = os.pipe()
    for fd in (read, write, os.open("/dev/zero", os.O_RDWR), memfd(0)):
        ended(front_end.send(request_id, VringFd(0, True), [fd]), "not an eventfd")
    assert not session.rings[0].started


def test_ring_descriptor_that_would_block_is_made_not_to(front_end, session):
    event = os.eventfd(0, os.EFD_CLOEXEC)
    front_end.send(Request.SET_VRING_CALL, VringFd(0, True), [event])
    assert not os.get_blocking(session.rings[0].call_fd)


@pytest.mark.parametrize("num", [0, 3, 1000, 32769, 65536, 2**32 - 1])
def test_impossible_ring_size_is_refused(front_end, session, num):
    front_end.ack_replies()
    front_end.send(Request.SET_FEATURES, U64(FEATURES))
    step = front_end.send(Request.SET_VRING_NUM, VringState(0, num), ack=True)
    nacked(step, f"SET_VRING_NUM: ring 0: size {num}, not")
    assert session.rings[0].num == 0


def test_size_that_only_a_packed_ring_may_have_waits_for_the_features(
    front_end, session
):
    for step in front_end.set_up(0, num=3):
        assert not step().close
    front_end.set_memory(LOW, HIGH)
    front_end.send(Request.SET_FEATURES, U64(FEATURES))
    assert not session.rings[0].runnable
    assert "size 3, not a power of two" in session.problem


@pytest.mark.parametrize("num", [1, 2, 256, 32768])
def test_possible_ring_size_is_taken(front_end, session, num):
    front_end.send(Request.SET_VRING_NUM, VringState(0, num))
    assert session.rings[0].num == num


@pytest.mark.parametrize(
    ("part", "name", "align"),
    [
        ("desc", "descriptor table", 16),
        ("avail", "available ring", 2),
        ("used", "used ring", 4),
    ],
)
def test_unaligned_ring_is_refused(front_end, session, part, name, align):
    fields = {"desc": 0x1000, "avail": 0x2000, "used": 0x3000}
    fields[part] += align // 2
    step = front_end.send(Request.SET_VRING_ADDR, VringAddr(0, 0, log=0, **fields))
    ended(step, f"{name} at {fields[part]:#x}, not a multiple of {align}")
    assert session.rings[0].addr is None


# The last byte of each area of a ring of 256, within a region that ends at `end`.
@pytest.mark.parametrize(
    ("part", "length"), [("desc", 4096), ("avail", 6 + 512), ("used", 6 + 2048)]
)
def test_ring_that_ends_outside_memory_does_not_run_and_says_so(
    front_end, session, part, length
):
    fields = {"desc": 0, "avail": 0x4000, "used": 0x5000}
    last = (SIZE - length) & ~15
    for offset, runs in ((last, True), (last + 16, False)):
        front_end.start()
        for step in front_end.set_up(0):
            step()
        front_end.send(Request.GET_VRING_BASE, VringState(0, 0))
        places = {**fields, part: offset}
        addr = {name: LOW.frontend_va + place for name, place in places.items()}
        front_end.send(Request.SET_VRING_ADDR, VringAddr(0, 0, log=0, **addr))
        front_end.send(Request.SET_VRING_KICK, VringFd(0, False))
        assert session.rings[0].runnable == runs
        assert ("outside guest memory" in session.problem) == (not runs)


def test_ring_whose_parts_overlap_does_not_run_and_says_so(front_end, session):
    front_end.start()
    base = LOW.frontend_va
    front_end.send(Request.SET_VRING_NUM, VringState(0, 256))
    front_end.send(
        Request.SET_VRING_ADDR,
        VringAddr(0, 0, desc=base, avail=base + 4094, used=base + 0x5000, log=0),
    )
    assert session.problem == ""
    front_end.send(Request.SET_VRING_KICK, VringFd(0, False))
    assert session.problem == "ring 0: descriptor table and available ring overlap"
    assert not session.rings[0].runnable


@pytest.mark.parametrize("request_id", [8, 10, 11, 18])
@pytest.mark.parametrize("index", [4, 0x1_0000, 2**32 - 1])
def test_ring_that_does_not_exist_is_refused(front_end, request_id, index):
    step = front_end.send(request_id, VringState(index, 1))
    ended(step, f"ring {index}: there are 4")


@pytest.mark.parametrize("request_id", [12, 13, 14])
def test_descriptor_for_a_ring_that_does_not_exist_is_refused(front_end, request_id):
    ended(front_end.set_fd(request_id, 4), "ring 4: there are 4")


def test_address_for_a_ring_that_does_not_exist_is_refused(front_end):
    step = front_end.send(Request.SET_VRING_ADDR, VringAddr(9, 0, 0, 0, 0, 0))
    ended(step, "ring 9: there are 4")


def test_enable_is_zero_or_one(front_end):
    ended(front_end.send(Request.SET_VRING_ENABLE, VringState(0, 2)), "2, not 0 or 1")


def test_reconnected_virtio_user_begins_by_stopping_what_never_ran(front_end, session):
    for index in range(2):
        front_end.send(Request.SET_VRING_ENABLE, VringState(index, 0))
        step = front_end.send(Request.GET_VRING_BASE, VringState(index, 0x55AA))
        assert step.base == BaseReply(index, 0)
    front_end.start(0, 1)
    assert session.rings[0].runnable


def test_a_session_that_is_closed_wants_nothing(front_end, session):
    front_end.start(0, 1, 2, 3)
    session.close()
    assert session.memory == ()
    assert not any(ring.runnable or ring.started for ring in session.rings)


# --- anything ---

small = st.integers(0, 5)
odd = st.sampled_from([0, 1, 2, 255, 256, 1 << 30, 1 << 32, FEATURES, TOP - 1])
addresses = st.sampled_from(
    [0, LOW.frontend_va, LOW.frontend_va + 0x4000, HIGH.frontend_va, TOP - 16]
)
some_regions = st.sampled_from([LOW, HIGH, MemoryRegion(0, 4096, 4096, 8192)])
payloads = st.one_of(
    st.none(),
    st.builds(U64, odd),
    st.builds(VringState, small, odd.map(lambda n: n & 0xFFFF_FFFF)),
    st.builds(VringAddr, small, small, addresses, addresses, addresses, small),
    st.builds(VringFd, small, st.booleans()),
    st.builds(MemTable, st.lists(some_regions, max_size=3).map(tuple)),
    st.builds(Log, odd, odd),
)
any_messages = st.tuples(
    st.sampled_from([*RULES, 0, 99]),
    payloads,
    st.lists(st.sampled_from(["event", "memory", "pipe"]), max_size=3),
    st.booleans(),
)


def open_file(kind):
    if kind == "event":
        return os.eventfd(0)
    if kind == "memory":
        return memfd(2 * SIZE)
    read, write = os.pipe()
    os.close(write)
    return read


def owned(session):
    """How many descriptors the session's wanted state names."""
    fds = [region.fd for region in session.memory]
    for ring in session.rings:
        fds += [fd for fd in (ring.kick_fd, ring.call_fd, ring.err_fd) if fd != NO_FD]
    assert len(set(fds)) == len(fds)
    return len(fds)


def is_failure(request, step):
    if step.reply is None or request in NATURAL:
        return False
    return int.from_bytes(step.reply[HEADER_LEN:], "little") == 1


@settings(deadline=None)
@given(st.lists(any_messages, max_size=40))
def test_no_sequence_of_messages_leaks_a_descriptor_or_raises(sequence):
    front_end = FrontEnd(Session(max_pairs=2))
    session = front_end.session
    before = open_fds()
    for request, payload, files, ack in sequence:
        step = front_end.send(request, payload, map(open_file, files), ack=ack)
        assert bool(step.refused) == (step.close or is_failure(request, step))
        assert open_fds() == before + owned(session)
        for ring in session.rings:
            assert not ring.runnable or (ring.areas and session.features_known)
    front_end.close()
    assert open_fds() == before - 1


# --- packed rings ---

PACKED = FEATURES | virtio.F_VERSION_1 | virtio.F_RING_PACKED


@pytest.fixture
def packed(front_end):
    """A front-end that chose packed rings and has its memory set."""
    front_end.ack_replies()
    front_end.send(Request.SET_FEATURES, U64(PACKED))
    front_end.set_memory(LOW, HIGH)
    return front_end


@pytest.mark.parametrize(("num", "good"), [(0, 0), (3, 1), (32768, 1), (32769, 0)])
def test_packed_rings_have_any_size_up_to_the_limit(packed, session, num, good):
    step = packed.send(Request.SET_VRING_NUM, VringState(0, num), ack=True)
    assert decode_reply(Request.SET_VRING_NUM, step.reply) == U64(not good)
    assert session.rings[0].num == num * good


def test_a_packed_rings_event_areas_are_four_bytes(packed, session):
    end = LOW.frontend_va + SIZE
    for step in packed.set_up(0, num=100):
        step()
    packed.send(Request.GET_VRING_BASE, VringState(0, 0))
    areas = VringAddr(0, 0, desc=LOW.frontend_va, avail=end - 4, used=end - 8, log=0)
    packed.send(Request.SET_VRING_ADDR, areas)
    packed.set_fd(Request.SET_VRING_KICK, 0)
    assert session.rings[0].runnable
    assert session.rings[0].areas.avail == Place(0, SIZE - 4)


@pytest.mark.parametrize(
    ("base", "kept"), [(0x8000, 0x8000), (0x80058005, 0x8005), (0x7, 0x7)]
)
def test_a_packed_position_is_its_low_half_and_comes_back_in_both(
    packed, session, base, kept
):
    packed.send(Request.SET_VRING_NUM, VringState(0, 256))
    packed.send(Request.SET_VRING_BASE, VringState(0, base))
    assert session.rings[0].base == kept
    step = packed.send(Request.GET_VRING_BASE, VringState(0, 0))
    assert step.base == BaseReply(0, kept, packed=True)
    reply = decode_reply(Request.GET_VRING_BASE, step.base.encode(0x8123))
    assert reply == VringState(0, 0x81238123)


def test_a_packed_position_outside_the_ring_keeps_it_from_running(packed, session):
    for step in packed.set_up(0, num=16):
        step()
    assert session.rings[0].runnable
    packed.send(Request.GET_VRING_BASE, VringState(0, 0))
    for step in packed.set_up(0, num=16)[2:]:
        step()
    packed.send(Request.SET_VRING_BASE, VringState(0, 0x8010), ack=True)
    assert not session.rings[0].runnable
    assert "position 0x8010 outside its 16 entries" in session.problem


# --- memory, region by region ---


def add(front_end, region, **options):
    fds = [os.dup(front_end.file)]
    return front_end.send(Request.ADD_MEM_REG, SingleRegion(region), fds, **options)


def remove(front_end, region, **options):
    return front_end.send(Request.REM_MEM_REG, SingleRegion(region), **options)


def test_regions_come_and_go_once_however_often_it_is_said(front_end, session):
    front_end.ack_replies()
    for _ in range(2):
        step = add(front_end, LOW, ack=True)
        assert decode_reply(Request.ADD_MEM_REG, step.reply) == U64(0)
    add(front_end, HIGH)
    assert [row.gpa for row in session.memory] == [LOW.gpa, HIGH.gpa]
    # The file's offset means nothing when a region goes.
    gone = dataclasses.replace(LOW, mmap_offset=77)
    for _ in range(2):
        step = remove(front_end, gone, ack=True)
        assert decode_reply(Request.REM_MEM_REG, step.reply) == U64(0)
    assert [row.gpa for row in session.memory] == [HIGH.gpa]


def test_a_ring_runs_while_its_memory_is_there(front_end, session):
    front_end.send(Request.SET_FEATURES, U64(FEATURES))
    for step in front_end.set_up(0):
        step()
    assert not session.rings[0].runnable
    add(front_end, LOW)
    assert session.rings[0].runnable
    remove(front_end, LOW)
    assert not session.rings[0].runnable
    assert "outside guest memory" in session.problem or not session.memory


def test_a_region_that_cannot_be_is_refused_and_the_others_stay(front_end, session):
    add(front_end, LOW)
    front_end.ack_replies()
    for match, region in {
        "overlap": dataclasses.replace(LOW, gpa=LOW.gpa + 0x1000),
        "size 0": dataclasses.replace(HIGH, size=0),
        "of a file": dataclasses.replace(HIGH, mmap_offset=2 * SIZE),
    }.items():
        nacked(add(front_end, region, ack=True), match)
    step = front_end.send(Request.ADD_MEM_REG, SingleRegion(HIGH), ack=True)
    nacked(step, "0 descriptors, not 1")
    assert [row.gpa for row in session.memory] == [LOW.gpa]


def test_more_regions_than_slots_are_refused(front_end, session):
    front_end.ack_replies()
    for n in range(33):
        base = n << 32
        step = add(front_end, MemoryRegion(base, 0x1000, base, 0), ack=True)
        assert (decode_reply(Request.ADD_MEM_REG, step.reply) == U64(0)) == (n < 32)
    assert front_end.ask(Request.GET_MAX_MEM_SLOTS) == U64(len(session.memory))


# --- migration ---

LOG = Log((HIGH.gpa + HIGH.size) // 4096 // 8, 0)


def log_memfd(size=LOG.mmap_size):
    return memfd(size + 64)


def set_log(front_end, log=LOG, fd=None):
    fds = [log_memfd() if fd is None else fd]
    return front_end.send(Request.SET_LOG_BASE, log, fds)


def test_log_is_kept_from_log_all_to_its_end(front_end, session):
    front_end.start(0, 1)
    step = set_log(front_end)
    assert decode_reply(Request.SET_LOG_BASE, step.reply) == LOG
    assert session.log is None
    front_end.send(Request.SET_FEATURES, U64(FEATURES | virtio.F_LOG_ALL))
    assert (session.log.size, session.log.mmap_offset) == (LOG.mmap_size, 0)
    assert session.rings[0].runnable
    front_end.send(Request.SET_FEATURES, U64(FEATURES))
    assert session.log is None
    front_end.send(Request.SET_FEATURES, U64(FEATURES | virtio.F_LOG_ALL))
    assert session.log is None  # the next migration brings a log of its own


def test_the_same_log_again_is_no_change(front_end, session):
    fd = log_memfd()
    front_end.send(Request.SET_FEATURES, U64(FEATURES | virtio.F_LOG_ALL))
    set_log(front_end, fd=os.dup(fd))
    before = session.log
    set_log(front_end, fd=os.dup(fd))
    assert session.log == before
    set_log(front_end)
    assert not session.log.same_as(before)
    os.close(fd)


def test_other_features_do_not_change_with_the_log(front_end):
    front_end.start(0, 1)
    other = (FEATURES ^ virtio.F_MRG_RXBUF) | virtio.F_LOG_ALL
    ended(front_end.send(Request.SET_FEATURES, U64(other)), "while a ring runs")


@pytest.mark.parametrize(
    ("log", "match"),
    [
        (Log(LOG.mmap_size - 1, 0), "are needed"),
        (Log(0, 0), "are needed"),
        (Log(LOG.mmap_size, 65), "of a file"),
        (Log(LOG.mmap_size, TOP - 1), "of a file"),
        (Log(TOP - 1, 2), "of a file"),
    ],
)
def test_a_log_that_does_not_fit_is_refused(front_end, session, log, match):
    front_end.set_memory(LOW, HIGH)
    ended(set_log(front_end, log), match)
    assert session.log is None


def test_rings_are_logged_as_their_flag_says_while_they_run(front_end, session):
    front_end.start(0, 1)
    assert not session.rings[0].logged
    front_end.send(Request.SET_VRING_ADDR, ring_addr(0, flags=1))
    assert [ring.logged for ring in session.rings[:2]] == [True, False]
    assert session.rings[0].runnable
    front_end.send(Request.SET_VRING_ADDR, ring_addr(0))
    assert not session.rings[0].logged


def test_guests_that_arrive_are_announced_once(front_end, session):
    front_end.send(Request.SEND_RARP, U64(0x563412005452))
    assert session.take_announced() == [bytes.fromhex("525400123456")]
    assert session.take_announced() == []


def test_reset_keeps_connection_features_and_memory(front_end, session):
    front_end.send(Request.SET_VRING_ENABLE, VringState(0, 1))
    front_end.start(0, 1)
    front_end.send(Request.SET_STATUS, U64(15))
    assert not front_end.send(Request.RESET_DEVICE).close
    assert not any(ring.started or ring.enabled for ring in session.rings)
    assert (session.status, len(session.memory)) == (0, 2)
    assert session.features == FEATURES


# --- configuration space ---


@pytest.fixture
def configured():
    front_end = FrontEnd(Session(2, offered_protocol=OFFERED_PROTOCOL | PF_CONFIG))
    yield front_end
    front_end.close()


def test_configuration_space_says_what_the_device_is_like(configured):
    reply = configured.ask(Request.GET_CONFIG, Config(0, 0, bytes(64)))
    # mac, link up, two pairs, MTU 1500, speed and duplex unknown; zeroes behind.
    fields = bytes(6), 1, 2, 1500, 0xFFFF_FFFF, 0xFF
    assert reply.data == struct.pack("<6sHHHIB", *fields).ljust(64, b"\0")
    part = configured.ask(Request.GET_CONFIG, Config(6, 0, bytes(4)))
    assert (part.offset, part.data) == (6, reply.data[6:10])


def test_only_the_address_may_be_written(configured):
    mac = bytes.fromhex("525400123456")
    assert not configured.send(Request.SET_CONFIG, Config(0, 0, mac)).close
    assert configured.ask(Request.GET_CONFIG, Config(0, 0, bytes(6))).data == mac
    ended(configured.send(Request.SET_CONFIG, Config(2, 0, mac)), "cannot be written")


@pytest.mark.parametrize(("offset", "size"), [(0, 257), (250, 7), (0, 0), (256, 1)])
def test_bytes_outside_the_configuration_space_are_refused(configured, offset, size):
    piece = Config(offset, 0, bytes(size))
    ended(configured.send(Request.GET_CONFIG, piece), f"{size} bytes from {offset}")


def test_configuration_space_is_not_offered_unless_told(front_end):
    ended(front_end.send(Request.GET_CONFIG, Config(0, 0, bytes(6))), "not offered")
