"""Whatever changes in a guest's memory while a log is kept is marked in the log.

The oracle is the memory itself: pages that differ afterwards must be marked, pages that
nobody was granted must not be.
"""

import numpy as np
import pytest

from ports.base import LOG_ROW
from ports.vhost.virtio import F_EVENT_IDX
from tests.datapath import packed_rings, rings
from tests.datapath.bench import A, B
from tests.datapath.rings import GPA, MEMORY, WRITE, frame_to
from vswitch.datapath import loop

PAGE = 4096
FIRST = GPA // PAGE
PAGES = MEMORY // PAGE
LOG_LEN = (FIRST + PAGES) // 8
FORMATS = {"split": rings.Guest, "packed": packed_rings.PackedGuest}


class Log:
    """A guest's memory as it was, and the bitmap of what was written since."""

    def __init__(self, guest, length=LOG_LEN, *, rings=True):
        self.guest = guest
        self.bits = np.zeros(LOG_LEN + 64, np.uint8)
        row = int(guest.plane.shared.ports[guest.slot]["regions"]) >> 8
        log = guest.plane.shared.regions[row + LOG_ROW]
        log["addr"], log["size"] = self.bits.ctypes.data, length
        for side in (guest.rx, guest.tx):
            side.record["logged"] = int(rings)
            # As QEMU does it: packed rings give the device's event area.
            packed = int(side.record["packed"])
            side.record["log_used"] = GPA + (side.device if packed else side.used)
            side.record["log_desc"] = GPA + side.desc
        self.begin()

    def begin(self):
        self.bits[:] = 0
        self.before = self.guest.memory.copy()

    def marked(self):
        assert not self.bits[LOG_LEN:].any()
        bits = np.unpackbits(self.bits[:LOG_LEN], bitorder="little")
        assert not bits[:FIRST].any()
        return set(np.flatnonzero(bits[FIRST:]).tolist())

    def changed(self):
        differs = (self.guest.memory != self.before).reshape(PAGES, PAGE)
        return set(np.flatnonzero(differs.any(axis=1)).tolist())


def pages(offset, length):
    return set(range(offset // PAGE, (offset + length - 1) // PAGE + 1))


def used_pages(side):
    """What says that chains came back."""
    if int(side.record["packed"]):
        return pages(side.desc, 16 * side.size)
    return pages(side.used, 6 + 8 * side.size)


@pytest.fixture(params=FORMATS)
def guests(request, bench):
    """A sends to B; the address of B is known."""
    a, b = (FORMATS[request.param](bench.plane, slot) for slot in (A, B))
    bench.guests += [a, b]
    a.post(8)
    b.post(8)
    b.send(frame_to(0xA, 0xB))
    bench.turn()
    return a, b


@pytest.mark.parametrize("length", [64, 1500, 2036])
def test_pages_of_a_frame_and_of_the_ring_are_marked(bench, guests, length):
    a, b = guests
    log = Log(b)
    a.send(frame_to(0xB, 0xA, length, fill=b"\x5a" * (length - 14)))
    bench.turn()
    assert bench.tally(B)["tx_frames"] == 1
    assert log.changed() <= log.marked()
    assert log.marked() == pages(0x40000, length + 12) | used_pages(b.rx)


def test_a_frame_over_several_buffers_is_marked_in_all_of_them(bench, guests):
    a, b = guests
    log = Log(b)
    for n in range(2):
        a.send(frame_to(0xB, 0xA, 6000, fill=b"\x5a" * 5986), n, 0x20000 + 0x2000 * n)
    bench.turn()
    assert bench.tally(B)["tx_frames"] == 2
    assert log.changed() <= log.marked()
    filled = pages(0x40000, 3 * 2048 - 132) | pages(0x40000 + 3 * 2048, 3 * 2048 - 132)
    assert log.marked() == filled | used_pages(b.rx)


def test_giving_a_frame_back_marks_the_senders_ring_alone(bench, guests):
    a, _ = guests
    log = Log(a)
    a.send(frame_to(0xB, 0xA), 1)
    log.begin()
    bench.turn()
    assert log.changed() <= log.marked() == used_pages(a.tx)


def test_wishes_for_kicks_are_marked(bench, guests):
    a, _ = guests
    log = Log(a)
    polled = loop.polled_rings(bench.plane.shared, 0)
    for wish in (loop.ask_for_kicks, loop.stop_kicks):
        log.begin()
        wish(bench.plane.ctx, 0, polled)
        assert log.changed() <= log.marked()
        assert log.marked()


def test_event_words_of_a_split_ring_are_marked_where_they_are(bench):
    # A ring of 1024 entries: the event word is two pages behind the flags.
    guest = bench.guest(A, size=1024, features=rings.DEFAULT | F_EVENT_IDX)
    bench.turn()
    log = Log(guest)
    loop.ask_for_kicks(bench.plane.ctx, 0, loop.polled_rings(bench.plane.shared, 0))
    assert log.changed() <= log.marked()
    assert pages(guest.tx.used + 4 + 8 * 1024, 2) <= log.marked()


def test_what_a_dead_worker_may_have_written_is_marked(bench, guests):
    a, b = guests
    logs = [Log(a), Log(b)]
    loop.repair_rings(bench.plane.ctx, 5, 0)
    for log, guest in zip(logs, (a, b), strict=True):
        assert used_pages(guest.rx) | used_pages(guest.tx) <= log.marked()


def test_rings_are_marked_only_where_the_front_end_says_so(bench, guests):
    a, b = guests
    log = Log(b, rings=False)
    a.send(frame_to(0xB, 0xA))
    bench.turn()
    assert log.marked() == pages(0x40000, 76)


def test_nothing_is_marked_while_nobody_asks(bench, guests):
    a, b = guests
    log = Log(b, length=0)
    a.send(frame_to(0xB, 0xA))
    bench.turn()
    assert bench.tally(B)["tx_frames"] == 1
    assert not log.bits.any()


def test_nothing_is_written_beyond_a_log_that_is_too_short(bench, guests):
    a, b = guests
    short = (FIRST + 0x20) // 8
    log = Log(b, length=short)
    a.send(frame_to(0xB, 0xA))
    bench.turn()
    assert bench.tally(B)["tx_frames"] == 1
    assert not log.bits[short:].any()


def test_memory_that_the_guest_has_twice_is_marked_twice(bench, guests):
    a, b = guests
    shared = bench.plane.shared
    row = int(shared.ports[B]["regions"]) >> 8
    alias = shared.regions[row + 1]
    alias["gpa"], alias["size"], alias["addr"] = (
        GPA - MEMORY,
        MEMORY,
        b.memory.ctypes.data,
    )
    shared.ports[B]["regions"] = row << 8 | 2
    log = Log(b)
    a.send(frame_to(0xB, 0xA, 3000))  # two buffers, so their pieces are looked up
    bench.turn()
    bits = np.unpackbits(log.bits, bitorder="little")
    assert bits[FIRST + 0x40]
    assert bits[FIRST - PAGES + 0x40]


def test_a_buffer_may_cross_a_page(bench):
    a, b = bench.guest(A), bench.guest(B)
    b.rx.describe(0, GPA + 0x41FC0, 2048, WRITE)
    b.rx.offer(0)
    bench.turn()
    log = Log(b)
    a.send(frame_to(0xB, 0xA, 100, fill=b"\x5a" * 86))
    bench.turn()
    assert {0x41, 0x42} <= log.changed() <= log.marked()
