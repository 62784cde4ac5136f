"""Any history of two guests of either ring format, each with the built-in driver.

Before each round the model works on a copy of both guests' memory; afterwards the two are
equal in every byte, but for the ring entries of what was used: frames, headers and order
are right, and nothing outside the buffers that the driver granted was touched. The
driver, written from the specification alone, then has to find exactly the same.
"""

import os
from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from ports.vhost.virtio import (
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_MRG_RXBUF,
    F_RING_PACKED,
    F_VERSION_1,
)
from tests.conftest import INTERPRETED
from tests.datapath.bench import A, B, Bench
from tests.datapath.conftest import make_plane
from tests.datapath.driven import TX_BUFFER, Config, DrivenGuest, frame_of
from vswitch.datapath import loop
from vswitch.guest import ring as driver
from vswitch.guest.layout import Shape

BURST = 64
SPLIT_SIZES = st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128])
PACKED_SIZES = st.sampled_from([1, 2, 3, 7, 12, 31, 64, 100, 127])
RX_BUFFERS = st.sampled_from([61, 128, 301, 700, TX_BUFFER])
LENGTH = st.one_of(st.integers(14, 80), st.integers(14, 1600))
LENGTHS = st.builds(
    list.__mul__, st.lists(LENGTH, min_size=1, max_size=4), st.integers(1, 25)
)
SIDES = st.sampled_from([A, B])
RINGS = st.sampled_from(["rx", "tx"])


@st.composite
def shapes(draw, size, indirect):
    indirect = bool(indirect and draw(st.booleans()))
    apart = draw(st.booleans()) and size > 1
    # No chain may be longer than the ring, in a table or not.
    longest = min(9 if indirect else 4, size - apart)
    return Shape(draw(st.integers(1, longest)), apart, indirect)


@st.composite
def configs(draw):
    packed = draw(st.booleans())
    size = draw(PACKED_SIZES if packed else SPLIT_SIZES)
    features = F_RING_PACKED | F_VERSION_1 if packed else 0
    for bit in (F_VERSION_1, F_MRG_RXBUF, F_INDIRECT_DESC, F_EVENT_IDX, F_IN_ORDER):
        features |= bit * draw(st.booleans())
    indirect = features & F_INDIRECT_DESC
    start = draw(st.one_of(st.integers(65520, 65535), st.integers(0, 2 * size)))
    return Config(
        features,
        size,
        draw(RX_BUFFERS),
        rx_shape=draw(shapes(size, indirect)),
        tx_shape=draw(shapes(size, indirect)),
        start=start,
        regions=draw(st.sampled_from([1, 3])),
        posted=draw(st.sampled_from([size, size, size, size // 2, 1, 0])),
    )


class Rings(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.bench = Bench(make_plane())
        self.guests, self.transit = {}, {A: deque(), B: deque()}
        self.number = 0
        self.asleep = False

    @initialize(a=configs(), b=configs())
    def attach(self, a, b):
        for side, config in ((A, a), (B, b)):
            self.renegotiate(side, config)

    # --- the driver's steps ---

    @rule(side=SIDES, lengths=LENGTHS)
    def send(self, side, lengths):
        frames = [frame_of(A + B - side, side, n, self.next()) for n in lengths]
        taken = self.guests[side].send(frames)
        self.transit[side] += frames[:taken]
        self.check_kick(side, taken)

    def check_kick(self, side, taken):
        """A device that asked for it and had nothing to do is told."""
        tx = self.guests[side].tx
        kicked = drain(tx.ring["kick_fd"])
        if self.asleep and tx.running and taken:
            assert kicked
            self.wake()

    @rule(side=SIDES, lengths=LENGTHS)
    def exchange(self, side, lengths):
        """What mostly happens: frames, and nobody late."""
        self.send(side, lengths)
        self.poll()
        self.guests[side].reap()
        self.guests[A + B - side].receive(len(lengths))

    @rule(side=SIDES, count=st.integers(1, 200))
    def post(self, side, count):
        self.guests[side].post(count)

    @rule(side=SIDES, most=st.integers(1, 40))
    def receive(self, side, most):
        self.guests[side].receive(most)

    @rule(side=SIDES)
    def reap(self, side):
        self.guests[side].reap()

    @rule(side=SIDES, which=RINGS)
    def ask_for_a_call(self, side, which):
        ring = getattr(self.guests[side], which)
        drain(ring.ring["call_fd"])
        assert bool(driver.ask_for_calls(ring.ring)) == bool(ring.used)
        ring.asked = not ring.used

    @rule(side=SIDES, which=RINGS)
    def refuse_calls(self, side, which):
        ring = getattr(self.guests[side], which)
        driver.refuse_calls(ring.ring)
        ring.asked = False

    # --- the device's steps ---

    @rule()
    def poll(self):
        self.wake()
        guests = list(self.guests.values())
        rings = [ring for guest in guests for ring in guest.rings]
        copies = {guest: guest.memory.bytes.copy() for guest in guests}
        positions = [ring.offered_positions() for ring in rings]
        tallies = [int(self.tally(guest)["tx_frames"]) for guest in guests]
        sent, arrived = self.move(copies)
        assert self.bench.round() == sent
        for ring, before in zip(rings, positions, strict=True):
            gone = len(before) - len(ring.offered)
            self.check_call(ring, gone)
            for at, length in ring.may_write(before, gone):
                span = slice(at, at + length)
                copies[ring.guest][span] = ring.memory.bytes[span]
        for guest, tally in zip(guests, tallies, strict=True):
            assert int(self.tally(guest)["tx_frames"]) - tally == arrived[guest]
            assert (copies[guest] == guest.memory.bytes).all()

    def move(self, copies):
        """One burst of each running ring, in the model; frames sent and arrived."""
        sent, arrived = 0, dict.fromkeys(self.guests.values(), 0)
        for side, guest in self.guests.items():
            other = self.guests[A + B - side]
            for _ in range(min(BURST, len(guest.tx.offered)) * guest.tx.running):
                guest.tx.use()
                frame = self.transit[side].popleft()
                arrived[other] += other.deliver(frame, copies[other])
                sent += 1
        return sent, arrived

    def check_call(self, ring, gone):
        """A driver that asked for it is called."""
        called = drain(ring.ring["call_fd"])
        if gone and ring.asked:
            assert called
            ring.asked = False

    @rule()
    def sleep(self):
        waiting = loop.ask_for_kicks(self.bench.plane.ctx, 0, self.polled())
        rings = [guest.tx for guest in self.guests.values()]
        assert waiting == sum(ring.running and len(ring.offered) > 0 for ring in rings)
        self.asleep = waiting == 0
        for ring in rings:
            drain(ring.ring["kick_fd"])
        if not self.asleep:
            self.wake()

    def wake(self):
        loop.stop_kicks(self.bench.plane.ctx, 0, self.polled())
        self.asleep = False

    @rule(side=SIDES, which=RINGS)
    def stop(self, side, which):
        self.wake()
        ring = getattr(self.guests[side], which)
        if ring.running:
            ring.stop()

    @rule(side=SIDES, which=RINGS, wrong=st.integers(0, 0xFFFF))
    def start(self, side, which, wrong):
        self.wake()
        ring = getattr(self.guests[side], which)
        if not ring.running:
            # A split ring knows by itself where it stands, whatever it is told.
            ring.start(ring.base if ring.packed else wrong)

    @rule()
    def hand_over(self):
        """Another worker takes the rings up, at a moment when nothing is under way."""
        self.wake()
        loop.repair_rings(self.bench.plane.ctx, 1, 0)

    @rule(side=SIDES, config=configs())
    def renegotiate(self, side, config):
        if side in self.guests:
            self.wake()
            self.guests.pop(side).close()
        self.guests[side] = DrivenGuest(self.bench.plane, side, config)
        self.transit[side].clear()
        self.post(side, config.posted)

    # --- what holds ---

    @invariant()
    def nobody_complains(self):
        for guest in self.guests.values():
            assert not any(guest.faults())

    def teardown(self):
        if self.guests:
            self.settle()
        for guest in self.guests.values():
            guest.close()
        self.bench.check_ledger()
        self.bench.close()

    def settle(self):
        """Everything that was offered comes back."""
        for side in self.guests:
            for which in ("rx", "tx"):
                self.start(side, which, 0)
                self.refuse_calls(side, which)
        while any(guest.tx.offered or guest.inbox for guest in self.guests.values()):
            self.poll()
            for guest in self.guests.values():
                guest.receive(BURST)
        for guest in self.guests.values():
            guest.reap()
            assert guest.tx.layout.outstanding == 0
            assert not guest.rx.used

    # --- helpers ---

    def next(self):
        self.number += 1
        return self.number

    def tally(self, guest):
        return self.bench.plane.tally(guest.slot)

    def polled(self):
        return loop.polled_rings(self.bench.plane.shared, 0)


def drain(fd):
    """Whether an eventfd was signalled since the last time."""
    try:
        return os.eventfd_read(int(fd)) > 0
    except BlockingIOError:
        return False


TestRings = Rings.TestCase
# Compiled, a step takes a millisecond or two; interpreted, a hundred.
TestRings.settings = settings(
    max_examples=5 if INTERPRETED else 3 * settings().max_examples,
    stateful_step_count=50,
)
