"""A guest that scribbles over its rings while real workers serve them; a seed repeats it.

A jitted mutator on a thread of its own changes descriptors, indexes and event areas of
both rings, so often that some changes fall between a worker's look and its use. Two other
guests exchange numbered frames meanwhile, a third sends to the scribbler.
"""

import random
import threading
from collections import Counter

import numpy as np

from ports.native import (
    eventfd_signal,
    jit,
    load_u8,
    load_u16,
    pause,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
)
from ports.vhost.messages import MemoryRegion, MemTable
from tests.switch import dropped
from tests.system.net import Stream, assert_flows, frame
from vswitch.guest import ring as driver

SIZE = 64  # entries
MEMORY = 1 << 20
MARGIN = 0x1800  # bytes at both ends of the file that are no guest memory
CANARY = 0xA5
STEPS = 40_000  # changes a round
FATAL = (1 << 15) - 1  # one of so many breaks the ring
REPEATABLE = 1 << 31

# What is changed, by the row of the counts.
KINDS = (
    *("descriptor bits", "available bits", "used bits", "descriptors"),
    *("offers", "events", "jumps", "kicks"),
)
_LENGTHS = np.array([0, 1, 11, 12, 13, 26, 72, 1526, 2048, 4096, 65536, 1 << 32])
_FLAGS = np.array([0, 1, 2, 3, 4, 5, 6, 7])  # NEXT, WRITE, INDIRECT
# A ring's row for the mutator.
FIELDS = (
    *("desc", "desc_len", "avail", "avail_len", "used", "used_len"),
    *("size", "packed", "kick_fd", "gpa", "gpa_len", "place", "lap"),
)
DESC, DESC_LEN, AVAIL, AVAIL_LEN, USED, USED_LEN = range(6)
ENTRIES, PACKED, KICK_FD, GUEST, GUEST_LEN, PLACE, LAP = range(6, 13)
OWNER = 0x8080  # packed: AVAIL and USED


@jit
def _next(state: int) -> int:
    return state * 6364136223846793005 + 1442695040888963407


@jit
def _below(state: int, limit: int) -> int:
    return (state >> 33 & 0x7FFFFFFF) % limit


@jit
def _flip(addr: int, length: int, state: int) -> None:
    at = addr + _below(state, length)
    store_u8(at, load_u8(at) ^ 1 << (state >> 20 & 7))


@jit
def _flip_descriptor(ring: np.ndarray, state: int) -> None:
    """Not whose it is, where that is said in it."""
    row = ring[DESC] + 16 * _below(state, ring[ENTRIES])
    _flip(row, 14 if ring[PACKED] != 0 else 16, _next(state))


@jit
def _flip_used(ring: np.ndarray, state: int) -> None:
    """Not the index: from it, `_offer` sees how much the device has."""
    if ring[PACKED] != 0:
        _flip(ring[USED], ring[USED_LEN], state)
    else:
        _flip(ring[USED] + 4, ring[USED_LEN] - 4, state)


@jit
def _describe(ring: np.ndarray, lengths: np.ndarray, flags: np.ndarray, s: int) -> None:
    """A descriptor that may be right, at an edge, or anywhere."""
    row = _below(s, ring[ENTRIES])
    at = ring[DESC] + 16 * row
    s = _next(s)
    where = ring[GUEST] + _below(s, ring[GUEST_LEN])
    if s & 0xF00 == 0:
        where = ring[GUEST] + ring[GUEST_LEN] - (s >> 40 & 0x7F)
    elif s & 0xF00 == 0x100:
        where = s  # anywhere
    s = _next(s)
    store_u64(at, where)
    store_u32(at + 8, lengths[_below(s, lengths.size)])
    s = _next(s)
    flag = flags[_below(s, flags.size)]
    if ring[PACKED] != 0:
        store_u16(at + 12, s >> 12 & 0x3F)
        store_u16(at + 14, flag | load_u16(at + 14) & OWNER)
    else:
        store_u16(at + 14, s >> 12 & (ring[ENTRIES] - 1))
        store_u16(at + 12, flag)


@jit
def _offer(ring: np.ndarray, s: int) -> None:
    """A few more chains, whatever they are, and no more than the ring has room for."""
    if ring[PACKED] != 0:
        for _ in range(1 + (s >> 12 & 3)):
            s = _next(s)
            _offer_packed(ring, s)
        return
    index = load_u16(ring[AVAIL] + 2)
    out = (index - load_u16(ring[USED] + 2)) & 0xFFFF
    few = min(1 + (s >> 12 & 3), ring[ENTRIES] - out)
    for n in range(few):
        slot = (index + n) & (ring[ENTRIES] - 1)
        head = (s >> 20) + 7 * n & (ring[ENTRIES] - 1)
        store_u16(ring[AVAIL] + 4 + 2 * slot, head)
    if few > 0:
        store_u16(ring[AVAIL] + 2, index + few)


@jit
def _offer_packed(ring: np.ndarray, s: int) -> None:
    """The next descriptor, unless the device has not come to it since the last lap.

    In the middle of a chain it never says so: now and then we go on all the same.
    """
    at = ring[DESC] + 16 * ring[PLACE] + 14
    flags = load_u16(at)
    mine, theirs = flags >> 7 & 1, flags >> 15 & 1
    if mine != theirs and mine != ring[LAP] and s & 0xF000 != 0:
        return
    owner = 0x80 if ring[LAP] != 0 else 0x8000
    store_u16(at, flags & 7 | owner)
    ring[PLACE] += 1
    if ring[PLACE] == ring[ENTRIES]:
        ring[PLACE] = 0
        ring[LAP] = 1 - ring[LAP]


@jit
def _break(ring: np.ndarray, s: int) -> int:
    """What ends a ring, or lets it rest; which kind."""
    if s >> 16 & 1:
        _flip(ring[AVAIL], ring[AVAIL_LEN], s)
        return 1
    if ring[PACKED] != 0:
        at = ring[DESC] + 16 * _below(s, ring[ENTRIES]) + 14
        store_u16(at, load_u16(at) ^ s >> 20 & OWNER)
    else:
        store_u16(ring[AVAIL] + 2, s >> 20)
    return 6


@jit
def scribble(
    rings: np.ndarray,
    steps: int,
    state: int,
    counts: np.ndarray,
    lengths: np.ndarray,
    flags: np.ndarray,
) -> None:
    """Change the rings so often; `counts` by KINDS."""
    for _ in range(steps):
        state = _next(state)
        ring = rings[state >> 40 & 1]
        dice = _below(state, 1024)
        state = _next(state)
        if state >> 20 & FATAL == 0:
            kind = _break(ring, state)
        elif dice < 100:
            kind = 0
            _flip_descriptor(ring, state)
        elif dice < 200:
            kind = 2
            _flip_used(ring, state)
        elif dice < 500:
            kind = 3
            _describe(ring, lengths, flags, state)
        elif dice < 900:
            kind = 4
            _offer(ring, state)
        elif dice < 980:
            kind = 5  # split: the last word of each area; packed: the area itself
            store_u16(ring[AVAIL] + ring[AVAIL_LEN] - 2, state >> 16)
            store_u16(ring[USED] + ring[USED_LEN] - 2, state >> 32)
        else:
            kind = 7
            eventfd_signal(ring[KICK_FD])
        counts[kind] += 1
        for _ in range(state >> 50 & 31):
            pause()


class RingFuzz:
    """A switch's bystanders, and the one that scribbles."""

    def __init__(self, net, seed, *, packed):
        self.net, self._random = net, random.Random(seed)
        self._counts = np.zeros(len(KINDS), np.int64)
        self.rounds = self.frames = 0
        self._pair = net.pair({"packed": packed}, {"packed": packed})
        self._other = net.guest("c")
        self._bad = net.prepared(
            "bad", packed=packed, queue_size=SIZE, memory_size=MEMORY
        )
        self._fence_off(self._bad.memory)
        self._bad.open()
        net.switch.wait_for_state("bad", "up")
        net.pin(self._other, self._bad)
        self._pids = net.switch.worker_pids()

    @property
    def counts(self):
        return Counter(dict(zip(KINDS, self._counts.tolist(), strict=True)))

    @property
    def tried(self):
        """Chains of the scribbler's that were looked at, and rings that broke."""
        seen = self.net.switch.counters("bad")
        refused = seen["tx_drop_bad_chain"] + seen["tx_drop_too_long"]
        chains = seen["rx_frames"] + seen["tx_frames"] + refused
        return {"chains": chains, "broken": seen["broken_rings"]}

    def _fence_off(self, memory):
        """Tell the switch of less than the file has; the rest is never to change."""
        memory.allocate(MARGIN)
        self._margins = memory.bytes[:MARGIN], memory.bytes[-MARGIN:]
        for margin in self._margins:
            margin[:] = CANARY
        (whole,) = memory.table.regions
        self._region = MemoryRegion(
            whole.gpa + MARGIN,
            whole.size - 2 * MARGIN,
            whole.frontend_va + MARGIN,
            MARGIN,
        )
        memory.table = MemTable((self._region,))

    def run(self, rounds, going=lambda: True):
        """Scribble and begin anew so often, while `going`, beside a checked stream."""
        sender, receiver = self._pair
        with Stream((sender, receiver), raw=False, verify=True) as stream:
            while self.rounds < rounds and going():
                self._round()
                stream.wait_for_more(self.net.switch, 200)
                self.rounds += 1
            totals = stream.stop()
        self.frames += totals.received
        self._check(totals)

    def _round(self):
        scribbling = threading.Thread(target=self._scribble)
        scribbling.start()
        frames = [frame(self._bad, self._other, 60 + 90 * n) for n in range(16)]
        while scribbling.is_alive():
            self._other.send(frames)
            self._other.receive(timeout=0)
        for margin in self._margins:
            assert (margin == CANARY).all(), "written outside the guest's memory"
        self._begin_anew()

    def _scribble(self):
        rings = [self._row(ring) for ring in self._bad.rings]
        scribble(
            np.array(rings, np.int64),
            STEPS,
            self._random.randrange(REPEATABLE),
            self._counts,
            _LENGTHS,
            _FLAGS,
        )

    def _row(self, ring):
        areas = [int(ring[name]) for name in ("desc", "avail", "used")]
        lengths = driver.area_lengths(ring)
        return [
            *(word for pair in zip(areas, lengths, strict=True) for word in pair),
            *(int(ring[name]) for name in ("size", "packed", "kick_fd")),
            *(self._region.gpa, self._region.size),
            *(int(ring["avail_idx"]), int(ring["avail_lap"])),
        ]

    def _begin_anew(self):
        """What a reset of the guest's driver does; then everything works as before."""
        bad, other = self._bad, self._other
        bad.stop()
        bad._empty_rings()
        for name in ("bad_used", "bad_len", "bad_header"):
            bad.rings[name] = 0
        bad.start()
        while other.receive(timeout=0):
            pass
        other.wait_sent()
        while bad.receive(timeout=0):
            pass
        assert_flows(other, bad)
        assert_flows(bad, other)

    def _check(self, totals):
        assert totals.corrupt == totals.reordered == totals.duplicates == 0, totals
        # What the scribbler sends floods the receiver at times: then some is counted.
        counted = dropped(self.net.switch.counters("b"), "tx")
        assert totals.sent - totals.received <= counted, (totals, counted)
        assert self.net.switch.worker_pids() == self._pids, self.net.switch.log
        assert "died" not in self.net.switch.log, self.net.switch.log
