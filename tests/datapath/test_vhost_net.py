"""A tap with vhost-net in a worker's turn, and a model of the kernel's thread behind it."""

import struct
from collections import deque

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ports import vhost_net_data
from ports.base import (
    KIND_VHOST_USER,
    NO_FD,
    RING_BROKEN,
    RING_STARTING,
    RINGS_PER_PORT,
    TABLE_ROWS,
)
from ports.burst import BURST_SIZE, MAX_FRAME
from ports.vhost.features import SENDER
from ports.vhost.virtio import F_EVENT_IDX, F_MRG_RXBUF, F_VERSION_1
from ports.vhost_net_memory import SLOT_LEN, SLOTS
from tests.datapath.bench import A, B, Bench
from tests.datapath.conftest import make_plane
from tests.datapath.rings import DEFAULT, GPA, NEXT, frame_to, mac
from tests.datapath.test_offload import (
    CAPABLE,
    PAYLOAD,
    received,
    receiver,
    super_frame,
)
from tests.datapath.vhost_nets import HEADER_LEN, VhostNet, count
from vswitch.datapath import loop

TAP = 5
HEADER = bytes(HEADER_LEN)
LENGTHS = (14, 60, 1514, SLOT_LEN - 12, SLOT_LEN - 11, 9014, MAX_FRAME)


class Tap:
    """Port TAP of a bench: its records, a model of the kernel, and a worker's hands."""

    def __init__(self, bench):
        self.bench, self.net = bench, VhostNet()
        self.port = bench.plane.shared.ports[TAP]
        self.tx, self.rx = bench.plane.shared.rings[TAP * RINGS_PER_PORT :][:2]
        self.net.attach(self.port, self.rx, self.tx)
        self.rx["port"] = self.tx["port"] = TAP
        self.scratch = bench.plane.keep[2]
        bench.guests.append(self.net)  # which are closed at the end

    def take(self):
        """Take a burst; the frames."""
        tally = self.bench.plane.tally(TAP)
        n = vhost_net_data.receive(self.rx, self.bench.plane.ctx, tally)
        return [b"".join(self.pieces(i)) for i in range(n)]

    def pieces(self, i):
        """The bytes of frame `i` of the burst, piece by piece."""
        frame = self.scratch["burst"][i]
        pieces = [(frame["addr"], frame["length"])]
        if frame["segments"] > 1:
            rows = self.scratch["segments"][frame["first_segment"] :]
            pieces = rows[: frame["segments"]].tolist()
        return [self.net.read(int(addr), int(length)) for addr, length in pieces]

    def give_back(self):
        vhost_net_data.release(self.rx)

    def put(self, *frames):
        """Transmit frames in one piece each; how many found room."""
        data = [np.frombuffer(frame, np.uint8) for frame in frames]
        for i, bytes_of_it in enumerate(data):
            row = self.scratch["burst"][i]
            row["addr"] = row["eth"] = bytes_of_it.ctypes.data
            row["length"], row["segments"], row["offload"] = bytes_of_it.size, 1, 0
            self.scratch["picked"][i] = i
        tally, ctx = self.bench.plane.tally(TAP), self.bench.plane.ctx
        return vhost_net_data.transmit(self.tx, self.port, ctx, len(data), tally)

    def repair(self):
        """Another worker, of the same number here, takes over."""
        loop.repair_rings(self.bench.plane.ctx, 0, 0)


@pytest.fixture
def tap(bench):
    return Tap(bench)


def a_frame(number, length):
    """A frame to nobody that is known, unlike any other if it is 18 bytes or more."""
    fill = (np.arange(length - 14) * 7 + number).astype(np.uint8).tobytes()
    mark = struct.pack("<I", number)[: length - 14]
    return frame_to(9, 7, fill=mark + fill[len(mark) :])


def fill_up(tap, most=10 * SLOTS):
    """Send small frames until there is no more room; how many there were."""
    n = 0
    while n < most and tap.put(a_frame(n, 60)):
        n += 1
    return n


# --- receive ---


def test_frames_come_in_as_they_were_delivered(tap):
    frames = [a_frame(n, length) for n, length in enumerate(LENGTHS)]
    for frame in frames:
        assert tap.net.deliver(frame)
    assert tap.take() == frames
    assert tap.net.rx.waiting() < SLOTS
    tap.give_back()
    assert tap.net.rx.waiting() == SLOTS
    assert tap.take() == []


def test_a_burst_is_taken_at_a_time(tap):
    for n in range(BURST_SIZE + 3):
        tap.net.deliver(a_frame(n, 60))
    assert len(tap.take()) == BURST_SIZE
    tap.give_back()
    assert tap.take() == [a_frame(BURST_SIZE + n, 60) for n in range(3)]


def test_more_than_a_lap_comes_in_in_order(tap):
    # 31 slots each, so that every place of the ring is the first of some frame.
    length = 30 * SLOT_LEN + 5
    two_pieces = 0
    for n in range(2 * SLOTS // 31):
        tap.net.deliver(a_frame(n, length))
        assert tap.take() == [a_frame(n, length)]
        two_pieces += len(tap.pieces(0)) - 1
        tap.give_back()
    assert two_pieces == 1


def test_all_slots_are_used_and_no_more(tap):
    delivered = 0
    while tap.net.deliver(a_frame(delivered, 60)):
        delivered += 1
    assert delivered == SLOTS
    for begin in range(0, SLOTS, BURST_SIZE):
        assert tap.take() == [a_frame(begin + n, 60) for n in range(BURST_SIZE)]
        tap.give_back()


def test_what_is_no_frame_is_counted_and_its_slots_offered_again(bench, tap):
    for length in (13, MAX_FRAME + 1):
        tap.net.deliver(bytes(length))
    tap.net.deliver(a_frame(1, 60))
    assert bench.round() == 3
    assert bench.drops(TAP) == {"rx_drop_too_short": 1, "rx_drop_too_long": 1}
    assert tap.net.rx.waiting() == SLOTS


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("slot", [0, SLOTS - 1])
def test_super_frames_come_in_as_the_receiver_can(bench, able, slot):
    b = receiver(bench, B, CAPABLE if able else DEFAULT)
    tap = Tap(bench)
    for n in range(slot):
        tap.net.deliver(a_frame(n, 60))
        tap.take()
        tap.give_back()
    data, head = super_frame("v6", payload=PAYLOAD[:3500])
    tap.net.deliver(data, head)
    bench.turn()
    sizes = [len(frame) for _, frame in received(b)]
    if able:
        assert sizes == [len(data)]
    else:
        headers = len(data) - 3500
        assert sizes == [headers + 1400, headers + 1400, headers + 700]


@pytest.mark.parametrize(
    ("head", "length"), [(1, 60), (SLOTS, 60), (0, SLOT_LEN + 1), (0, 1 << 31)]
)
def test_a_used_entry_that_cannot_be_breaks_the_ring(bench, tap, head, length):
    tap.net.write(tap.net.addr_of(tap.net.rx, 0) + 10, struct.pack("<H", 1))
    tap.net.rx.use([(head, length)])
    assert tap.take() == []
    assert tap.rx["state"] == RING_BROKEN
    assert bench.tally(TAP)["broken_rings"] == 1


@pytest.mark.parametrize("buffers", [0, 3])
def test_a_number_of_buffers_that_cannot_be_breaks_the_ring(tap, buffers):
    tap.net.deliver(a_frame(1, 2 * SLOT_LEN - 12))
    at = tap.net.addr_of(tap.net.rx, 0) + 10
    tap.net.write(at, struct.pack("<H", buffers))
    assert tap.take() == []
    assert tap.rx["state"] == RING_BROKEN


def test_an_index_that_is_ahead_of_all_buffers_breaks_the_ring(tap):
    tap.net.rx.use([(0, 60)] * (SLOTS + 1))
    assert tap.take() == []
    assert tap.rx["state"] == RING_BROKEN


# --- transmit ---


def test_frames_go_out_with_a_header_each(bench, tap):
    frames = [a_frame(n, length) for n, length in enumerate(LENGTHS)]
    assert tap.put(*frames) == len(frames)
    assert tap.net.send() == [(HEADER, frame) for frame in frames]
    assert bench.tally(TAP) == {"tx_frames": len(frames), "tx_bytes": sum(LENGTHS)}


def test_a_frame_in_pieces_goes_out_in_one_and_as_it_was_judged(bench, tap):
    bench.plane.shared.ports[TAP]["max_frame"] = 1514
    a = bench.guest(A)
    frame = frame_to(9, A, 300)
    pieces = (bytes(12) + frame[:5], frame[5:200], frame[200:])
    for i, piece in enumerate(pieces):
        a.write(0x20000 + 1024 * i, piece)
        flags = NEXT if i < 2 else 0
        a.tx.describe(i, GPA + 0x20000 + 1024 * i, len(piece), flags, i + 1)
    a.tx.offer(0)
    a.send(frame_to(9, A, 1515), index=4, offset=0x30000)
    bench.turn()
    assert tap.net.send() == [(HEADER, frame)]
    assert bench.drops(TAP) == {"tx_drop_too_long": 1}


def test_a_super_frame_goes_out_with_its_header(bench, tap):
    a = bench.guest(A, features=DEFAULT | SENDER)
    data, head = super_frame("v4", payload=PAYLOAD[:3000])
    data = mac(9) + data[6:]
    a.tx.describe(0, a.put(0x20000, head + data), len(head + data))
    a.tx.offer(0)
    bench.turn()
    hdr_len = struct.pack("<H", 54)
    assert tap.net.send() == [(head[:2] + hdr_len + head[4:10] + bytes(2), data)]


def test_frames_of_every_length_go_round_the_ring_in_order(tap):
    n = 0
    for lap in range(40):
        frames = [a_frame(n + k, LENGTHS[(lap + k) % 7]) for k in range(7)]
        assert tap.put(*frames) == 7
        n += 7
        assert [frame for _, frame in tap.net.send()] == frames


def test_a_full_ring_drops_what_does_not_fit_and_takes_what_does(bench, tap):
    assert fill_up(tap) == SLOTS - 1  # the frame sent last stays as it is
    tap.net.send(20)
    frames = [a_frame(n, length) for n, length in enumerate((MAX_FRAME, 60, 60))]
    before = bench.tally(TAP)["tx_drop_ring_full"]
    assert tap.put(*frames) == 2
    assert bench.tally(TAP)["tx_drop_ring_full"] == before + 1
    sent = [frame for _, frame in tap.net.send()]
    assert sent == [a_frame(n, 60) for n in range(20, SLOTS - 1)] + frames[1:]


def test_a_completion_out_of_order_breaks_the_ring(bench, tap):
    tap.put(a_frame(1, 60), a_frame(2, 60))
    (first, *_), (second, *_) = tap.net.tx.peek(), tap.net.tx.peek(1)
    tap.net.tx.use([(second, 0), (first, 0)])
    assert tap.put(a_frame(3, 60)) == 0
    assert tap.tx["state"] == RING_BROKEN
    assert bench.drops(TAP) == {"tx_drop_not_ready": 1}
    assert tap.net.tx.waiting() == 2


def test_frames_for_a_link_that_is_down_are_counted(bench, tap):
    a = bench.guest(A)
    for enabled in (0, 1):
        tap.tx["enabled"] = enabled
        a.send(frame_to(9, A))
        bench.turn()
        assert len(tap.net.send()) == enabled
    assert bench.drops(TAP) == {"tx_drop_link_down": 1}


def test_each_worker_sends_by_a_queue_of_its_own(bench, tap):
    a, b = bench.guest(A), bench.guest(B)
    second = VhostNet()
    bench.guests.append(second)
    tx, rx = bench.plane.shared.rings[TAP * RINGS_PER_PORT :][2:4]
    second.attach(tap.port, rx, tx)
    tap.port["pairs"] = 2
    for ring, owner in ((tap.tx, 1), (tap.rx, 1), (tx, 0), (rx, 0)):
        ring["owner"], ring["port"], ring["shared"] = owner, TAP, 1
    for side in (b.rx, b.tx):
        side.record["owner"] = 1
    a.send(frame_to(9, A))
    b.send(frame_to(9, B, 100))
    for worker in (0, 1):
        bench.turn(worker=worker)
    for net, frame in ((second, frame_to(9, A)), (tap.net, frame_to(9, B, 100))):
        assert [data for _, data in net.send()] == [frame]


# --- who wakes whom ---


def test_the_kernel_is_woken_when_it_sleeps_and_only_then(tap):
    tx, rx = tap.net.tx, tap.net.rx
    tx.sleep()
    tap.put(a_frame(1, 60), a_frame(2, 60))
    assert count(tx.wake) == 1
    tap.put(a_frame(3, 60))
    assert count(tx.wake) == 0
    tap.put(a_frame(4, MAX_FRAME + 1))  # which does not go out
    tap.net.deliver(a_frame(1, 60))
    tap.take()
    tap.give_back()
    assert count(rx.wake) == 0
    while tap.net.deliver(a_frame(1, 60)):
        pass
    rx.sleep()
    tap.take()
    tap.give_back()
    assert (count(rx.wake), count(tx.wake)) == (1, 0)


def test_the_worker_is_woken_when_it_sleeps_and_only_then(bench, tap):
    ctx, signal = bench.plane.ctx, tap.net.rx.signal
    polled = loop.polled_rings(bench.plane.shared, 0)
    loop.stop_kicks(ctx, 0, polled)
    tap.net.deliver(a_frame(1, 60))
    assert count(signal) == 0
    assert loop.ask_for_kicks(ctx, 0, polled) == 1
    bench.round()
    assert loop.ask_for_kicks(ctx, 0, polled) == 0
    tap.net.deliver(a_frame(2, 60))
    assert count(signal) == 1
    loop.stop_kicks(ctx, 0, polled)
    tap.net.deliver(a_frame(3, 60))
    assert count(signal) == 0


# --- a worker's death ---


def test_an_heir_takes_the_frames_that_were_not_given_back(tap):
    frames = [a_frame(n, length) for n, length in enumerate(LENGTHS)]
    for frame in frames:
        tap.net.deliver(frame)
    tap.take()
    tap.repair()
    assert tap.take() == frames
    tap.give_back()
    assert (tap.take(), tap.net.rx.waiting()) == ([], SLOTS)


def test_an_heir_sends_from_where_the_dead_had_published(tap):
    sent = [a_frame(n, LENGTHS[n % 7]) for n in range(9)]
    tap.put(*sent[:5])
    tap.net.send(3)
    published = tap.net.tx.avail_idx()
    # As much as there is room for, all but the last store.
    while tap.put(a_frame(77, MAX_FRAME)):
        pass
    fill_up(tap)
    tap.net.write(tap.net.tx.area.avail + 2, struct.pack("<H", published))
    tap.repair()
    assert tap.put(*sent[5:]) == 4
    assert [frame for _, frame in tap.net.send()] == sent[3:]


def test_an_heir_wakes_the_kernel_for_what_the_dead_had_published(tap):
    count(tap.net.rx.wake), count(tap.net.tx.wake)
    tap.repair()
    assert (count(tap.net.rx.wake), count(tap.net.tx.wake)) == (1, 1)


class Deaths(RuleBasedStateMachine):
    """Frames both ways, of any length, and a worker that dies at any of four places.

    What came in is delivered at least once and in order, and again only where it was
    not given back; what was published goes out once and in order.
    """

    def __init__(self):
        super().__init__()
        self.bench = Bench(make_plane())
        self.tap = Tap(self.bench)
        self.coming, self.going = deque(), deque()
        self.number = 0

    def teardown(self):
        self.bench.close()

    def next_frame(self, length):
        self.number += 1
        return a_frame(self.number, length)

    lengths = st.sampled_from(LENGTHS[1:]) | st.integers(18, MAX_FRAME)

    @rule(lengths=st.lists(lengths, max_size=40))
    def deliver(self, lengths):
        for length in lengths:
            frame = self.next_frame(length)
            if self.tap.net.deliver(frame):
                self.coming.append(frame)

    @rule(dies=st.booleans())
    def receive(self, dies):
        frames = self.tap.take()
        assert frames == list(self.coming)[:BURST_SIZE]
        if dies:
            return  # there is nothing to repair
        self.tap.give_back()
        for _ in frames:
            self.coming.popleft()

    @rule(lengths=st.lists(lengths, min_size=1, max_size=BURST_SIZE))
    def transmit(self, lengths):
        frames = [self.next_frame(length) for length in lengths]
        drops = self.drops()
        arrived = self.tap.put(*frames)
        assert arrived + self.drops() - drops == len(frames)
        if arrived == len(frames):
            self.going.extend(frames)
            return
        # Which of them is told by what the kernel sees.
        sent = [frame for _, frame in self.tap.net.send()]
        kept = sent[len(self.going) :]
        assert sent[: len(self.going)] == list(self.going)
        assert len(kept) == arrived
        in_order = iter(frames)
        assert all(frame in in_order for frame in kept)
        self.going.clear()

    @rule(lengths=st.lists(lengths, min_size=1, max_size=BURST_SIZE))
    def die_before_publishing(self, lengths):
        published = self.tap.net.tx.avail_idx()
        self.tap.put(*(self.next_frame(length) for length in lengths))
        at = self.tap.net.tx.area.avail + 2
        self.tap.net.write(at, struct.pack("<H", published))

    @rule(most=st.integers(0, 100))
    def send(self, most):
        sent = [frame for _, frame in self.tap.net.send(most)]
        assert sent == [self.going.popleft() for _ in sent]
        assert len(sent) == most or not self.going

    def drops(self):
        return self.bench.tally(TAP).get("tx_drop_ring_full", 0)

    @invariant()
    def nothing_broke(self):
        assert "broken_rings" not in self.bench.tally(TAP)
        assert self.tap.net.rx.waiting() <= SLOTS


TestDeaths = Deaths.TestCase


# --- and a device that was not written for it ---


@pytest.fixture
def cable(bench):
    """Two switches: a tap of the first is a vhost-user port of the second."""
    tap, other = Tap(bench), Bench(make_plane())
    shared = other.plane.shared
    row = TAP * 2 * TABLE_ROWS
    region, port = shared.regions[row], shared.ports[TAP]
    region["gpa"] = region["addr"] = tap.net.addr
    region["size"] = len(tap.net.memory)
    port["kind"], port["up"], port["pairs"] = KIND_VHOST_USER, 1, 1
    port["regions"] = row << 8 | 1
    rings = shared.rings[TAP * RINGS_PER_PORT :][:2]
    for device, driver in zip(rings, (tap.rx, tap.tx), strict=True):
        for part in ("desc", "avail", "used", "size", "header_len"):
            device[part] = driver[part]
        device["features"] = F_VERSION_1 | F_MRG_RXBUF | F_EVENT_IDX
        device["state"], device["enabled"], device["port"] = RING_STARTING, 1, TAP
        device["call_fd"], device["err_fd"] = int(driver["kick_fd"]), NO_FD
    yield bench, other
    other.check_ledger()
    other.close()


def test_our_own_device_at_the_other_end_carries_frames_both_ways(cable):
    here, there = cable
    a, b = here.guest(A, size=64), there.guest(B, size=64)
    for guest in (a, b):
        guest.post(64, length=4096)
    for lap in range(2 * SLOTS // 16):
        for k in range(16):
            length = (60, 1514, 3000, 4000)[(lap + k) % 4]
            a.send(frame_to(B, A, length), k, 0x20000 + 0x1000 * k)
            b.send(frame_to(A, B, length), k, 0x20000 + 0x1000 * k)
        for bench in (here, there, here):
            bench.turn()
        for guest, source in ((a, B), (b, A)):
            back = guest.rx.reap()
            assert len(back) == 16
            other = A if source == B else B
            for k, (head, length) in enumerate(back):
                size = (60, 1514, 3000, 4000)[(lap + k) % 4]
                frame = guest.buffer(head, length, 4096)[12:]
                assert frame == frame_to(other, source, size)
            guest.rx.offer(*(head for head, _ in back))
            guest.tx.reap()
    for bench in cable:
        assert bench.drops(TAP) == {}
        assert bench.tally(TAP)["rx_frames"] == 16 * (2 * SLOTS // 16)
