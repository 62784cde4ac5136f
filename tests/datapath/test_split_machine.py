"""Any history of two split rings, step for step against a naive device.

Before each poll the naive device works on a copy of both guests' memory; afterwards the
two must be equal in every byte: frames, headers and order are right, each chain came
back once, and nothing outside the buffers that the driver granted was touched.
"""

import itertools
import struct

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from ports.base import RING_STARTING, RING_STOPPED
from ports.vhost.virtio import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_MRG_RXBUF,
    F_VERSION_1,
)
from tests import naive
from tests.datapath.bench import A, B, Bench
from tests.datapath.conftest import make_plane
from tests.datapath.rings import GPA, INDIRECT, NEXT, WRITE, Guest, frame_to
from vswitch.datapath import loop

SIZE = 8
SLOTS, SLOT = 64, 2048  # where a piece of a buffer may lie
BUFFERS, TABLES = 0x40000, 0x30000
ANY = F_VERSION_1 | F_INDIRECT_DESC
FEATURES = st.sampled_from(
    [0, ANY, ANY | F_MRG_RXBUF, ANY | F_MRG_RXBUF | F_EVENT_IDX, F_MRG_RXBUF]
)
LENGTHS = st.one_of(st.integers(14, 80), st.integers(14, 1600))
CUTS = st.lists(st.integers(1, 90), max_size=4, unique=True)
# A receive buffer has room for a header at least; a driver's is larger.
ROOMS = st.one_of(
    st.just([1600]),
    st.lists(st.sampled_from([1, 2, 11, 64, 700, SLOT]), max_size=3).map(
        lambda rest: [12, *rest]
    ),
)


class Driver:
    """One ring of a guest: which descriptors are free, which chains are out."""

    def __init__(self, guest, side, indirect):
        self.guest, self.side, self.indirect = guest, side, indirect
        self.free = list(range(guest.size))
        self.out = []  # (head, its descriptors), as offered
        self.slots = itertools.cycle(range(SLOTS))

    def can_take(self, pieces, indirect):
        return len(self.free) >= (1 if indirect and self.indirect else pieces)

    def offer(self, lengths, flags, indirect, content=b""):
        """Offer a chain of pieces; `content` is spread over them."""
        chain = []
        for length in lengths:
            # Odd addresses: nothing promises more.
            offset = BUFFERS + next(self.slots) * SLOT + (SLOT - length) // 2
            self.guest.write(offset, content[:length])
            content = content[length:]
            chain.append((GPA + offset, length))
        if indirect and self.indirect:
            taken = [self.free.pop()]
            entries = [
                struct.pack("<QIHH", gpa, length, flags | NEXT, i + 1)
                for i, (gpa, length) in enumerate(chain)
            ]
            entries[-1] = struct.pack("<QIHH", *chain[-1], flags, 0)
            table = self.guest.put(TABLES + taken[0] * 128, b"".join(entries))
            self.side.describe(taken[0], table, 16 * len(chain), INDIRECT)
        else:
            taken = [self.free.pop() for _ in chain]
            for i, (at, piece) in enumerate(zip(taken, chain, strict=True)):
                last = i == len(chain) - 1
                following = 0 if last else taken[i + 1]
                self.side.describe(at, *piece, flags | (not last), following)
        self.side.offer(taken[0])
        self.out.append((taken[0], taken))

    def reap(self):
        """Lengths of the chains that came back, in the order in which they were out."""
        back = self.side.reap()
        done, self.out = self.out[: len(back)], self.out[len(back) :]
        assert [head for head, _ in back] == [head for head, _ in done]
        self.free = [index for _, taken in done for index in taken] + self.free
        return [length for _, length in back]


class SplitRings(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.bench = Bench(make_plane())

    @initialize(features=FEATURES)
    def attach(self, features):
        header_len = 12 if features & (F_VERSION_1 | F_MRG_RXBUF) else 10
        for slot in (A, B):
            guest = Guest(
                self.bench.plane,
                slot,
                features=features,
                size=SIZE,
                header_len=header_len,
            )
            guest.write(0x20000, b"\xc5" * (len(guest.memory) - 0x20000))  # canaries
            self.bench.guests.append(guest)
        self.a, self.b = self.bench.guests
        self.features, self.header_len = features, header_len
        indirect = features & F_INDIRECT_DESC
        self.tx = Driver(self.a, self.a.tx, indirect)
        self.rx = Driver(self.b, self.b.rx, indirect)
        self.bench.round()

    @rule(length=LENGTHS, cuts=CUTS, indirect=st.booleans(), byte=st.integers(0, 255))
    def send(self, length, cuts, indirect, byte):
        data = bytes(self.header_len) + frame_to(B, A, fill=bytes([byte]) * length)
        edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
        lengths = [end - begin for begin, end in itertools.pairwise(edges)]
        if self.tx.can_take(len(lengths), indirect):
            self.tx.offer(lengths, 0, indirect, data)

    @rule(rooms=ROOMS, indirect=st.booleans())
    def post(self, rooms, indirect):
        if self.rx.can_take(len(rooms), indirect):
            self.rx.offer(rooms, WRITE, indirect)

    @rule()
    def poll(self):
        copies = [guest.memory.copy() for guest in (self.a, self.b)]
        sent, arrived = self._poll_naively(*copies)
        before = int(self.bench.plane.tally(B)["tx_frames"])
        assert self.bench.round() == sent
        assert int(self.bench.plane.tally(B)["tx_frames"]) - before == arrived
        for guest, side, copy in zip(
            (self.a, self.b), (self.a.tx, self.b.rx), copies, strict=True
        ):
            # What used entries beyond the index hold is nobody's business.
            entries = slice(side.used + 4, side.used + 4 + 8 * SIZE)
            first, idx = side.seen, struct.unpack("<H", guest.read(side.used + 2, 2))[0]
            for number in range((idx - first) & 0xFFFF):
                at = side.used + 4 + 8 * ((first + number) % SIZE)
                assert bytes(copy[at : at + 8]) == guest.read(at, 8)
            copy[entries] = guest.memory[entries]
            assert (copy == guest.memory).all()

    def _poll_naively(self, a, b):
        rings = []
        for memory, side in ((a, self.a.tx), (b, self.b.rx)):
            words = naive.Memory([(GPA, 0, memoryview(memory))])
            areas = [GPA + at for at in (side.desc, side.avail, side.used)]
            rings.append(naive.Ring(words, SIZE, *areas, self.features))
        tx, rx = rings
        device = naive.Device(rx, tx, self.features)
        frames = device.collect()
        arrived = 0
        for frame in frames:
            device.waiting.append(frame)
            arrived += device.deliver()
            device.waiting.clear()  # what finds no room is dropped
        tx.publish()
        rx.publish()
        return len(frames), arrived

    @rule()
    def reap(self):
        assert not any(self.tx.reap())
        assert all(self.rx.reap())

    @rule()
    def nap(self):
        polled = loop.polled_rings(self.bench.plane.shared, 0)
        waiting = loop.ask_for_kicks(self.bench.plane.ctx, 0, polled)
        pending = (self.a.tx.offered - self._used(self.a.tx)) & 0xFFFF
        assert waiting == (pending > 0)
        loop.stop_kicks(self.bench.plane.ctx, 0, polled)

    @precondition(lambda self: self.bench.guests)
    @rule(which=st.sampled_from(["a", "b"]), wrong=st.integers(0, 0xFFFF))
    def stop_and_restart(self, which, wrong):
        side = self.a.tx if which == "a" else self.b.rx
        side.record["state"] = RING_STOPPED
        self.bench.round()
        side.record["next_avail"] = side.record["next_used"] = wrong
        side.record["state"] = RING_STARTING
        self.bench.round()

    @invariant()
    def chains_that_are_shown_are_no_more_than_were_offered(self):
        for driver in (self.tx, self.rx) if self.bench.guests else ():
            shown = (self._used(driver.side) - driver.side.seen) & 0xFFFF
            assert shown <= len(driver.out)

    def _used(self, side):
        return struct.unpack("<H", side.guest.read(side.used + 2, 2))[0]

    def teardown(self):
        if self.bench.guests:
            self.poll()
            self.reap()
            assert self.tx.out == []
            self.bench.check_ledger()
        self.bench.close()


TestSplitRings = SplitRings.TestCase
TestSplitRings.settings = settings(
    max_examples=settings().max_examples // 2, stateful_step_count=20
)
