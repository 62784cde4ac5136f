"""The memory table: told, repeated, changed, wrong. Checklist 20 to 30."""

import dataclasses
import os

import pytest

from ports.vhost.messages import (
    PF_CONFIGURE_MEM_SLOTS,
    U64,
    MemTable,
    Request,
    SingleRegion,
)
from tests.conformance.wire import REFUSED, cut_region
from tests.system.net import (
    BROADCAST,
    HUGE,
    Stream,
    assert_footprint,
    exchange_both_ways,
    footprint,
    frame,
    guest_mappings,
)
from vswitch.guest import GuestError
from vswitch.guest import memory as guest_memory
from vswitch.guest.frontend import DEFAULT_PROTOCOL, eventfd
from vswitch.guest.memory import HOLE, GuestMemory

PAGE, TOP = 4096, 1 << 64
STATION = b"\x02\x00\x00\x00\x00\x01"
RESTARTS = 10_000


def assert_frames_pass(net, guest):
    """One frame each way between a guest with rings by hand and a witness."""
    _, other = net.witnesses
    net.drain()
    one, two = frame(other, STATION, 100), frame(STATION, other, 300)
    guest.send(one)
    assert guest.tx.wait_back() == [(0, 0)]
    assert other.receive(timeout=10.0) == [one]
    guest.post(1)
    other.send_all(two)
    assert guest.rx.wait_back() == [(0, 12 + 300)]
    assert guest.buffer(0, 312)[12:] == two


def is_mapped(net, fd):
    """In how many processes of the switch a file is mapped."""
    inode = str(os.fstat(fd).st_ino)
    pids = (net.switch.pid, *net.switch.worker_pids())
    return sum(any(row[3] == inode for row in guest_mappings(pid)) for pid in pids)


def replaced(region, **changes):
    return dataclasses.replace(region, **changes)


@pytest.mark.parametrize(
    ("regions", "gap", "page"),
    [
        *((n, HOLE, PAGE) for n in range(1, 9)),
        *((4, 0, PAGE), (8, 0, PAGE), (32, HOLE, PAGE), (2, HOLE, HUGE)),
    ],
)
def test_20_memory_may_lie_in_up_to_32_regions(net, request, regions, gap, page):
    """[SPEC][RVMM]"""
    options = {"regions": regions, "gap": gap, "queue_size": 64}
    if page == HUGE:
        request.getfixturevalue("huge_memory")
    a, b = net.guest("a", **options), net.guest("b", **options)
    assert os.fstat(b.memory.fd).st_blksize == page
    assert len(b.memory.table.regions) == regions
    exchange_both_ways(a, b)
    with Stream((a, b), (b, a), raw=False, verify=True, length=(60, 1514)) as flow:
        flow.wait_for_more(net.switch, 3000)
        totals = flow.stop()
    assert totals.corrupt == totals.reordered == totals.duplicates == 0
    cut = tuple(replaced(r, size=r.size - PAGE) for r in b.memory.table.regions)
    b.frontend.set_memory(MemTable(cut), [b.memory.fd] * regions)
    exchange_both_ways(a, b)


@pytest.fixture
def huge_memory(huge_pages, monkeypatch):
    """Guests made meanwhile have huge pages."""
    make = os.memfd_create
    monkeypatch.setattr(guest_memory, "PAGE", HUGE)
    monkeypatch.setattr(
        os, "memfd_create", lambda name, flags: make(name, flags | os.MFD_HUGETLB)
    )


def test_21_regions_and_descriptors_must_be_as_many_or_the_old_table_stays(net):
    """[DPDK]"""
    guest = net.by_hand("a")
    (region,) = guest.table.regions
    small = replaced(region, size=PAGE)
    tables = {
        "no rows": ([], 1),
        "no descriptors": ([region], 0),
        "a descriptor more": ([region], 2),
        "a row more": ([small, replaced(small, gpa=0, frontend_va=0)], 1),
        "33 rows": (
            [replaced(small, gpa=n << 20, frontend_va=n << 20) for n in range(33)],
            33,
        ),
    }
    before = footprint(net.switch)
    for name, (rows, count) in tables.items():
        with pytest.raises(GuestError, match=REFUSED):
            guest.frontend.set_memory(MemTable(tuple(rows)), [guest.fd] * count)
        assert net.switch.port("a")["state"] == "up", name
        assert_footprint(net.switch, before)
        assert_frames_pass(net, guest)


def test_22_the_same_table_again_maps_nothing_and_leaks_nothing(net):
    """[M]"""
    a, b = net.pair()
    before = footprint(net.switch)
    mapped = [guest_mappings(pid) for pid in net.switch.worker_pids()]
    with Stream((a, b)) as flow:
        for count in range(RESTARTS):
            fresh = os.dup(b.memory.fd)
            b.frontend.set_memory(b.memory.table, [fresh])
            os.close(fresh)
            if count % 100 == 0:
                b.stop()
                b.start()
        flow.wait_for_more(net.switch)
        totals = flow.stop()
    assert (totals.reordered, totals.duplicates, totals.corrupt) == (0, 0, 0)
    net.switch.assert_copies_balance("a", "b", totals.sent, totals.received)
    assert [guest_mappings(pid) for pid in net.switch.worker_pids()] == mapped
    assert_footprint(net.switch, before)


def test_23_a_change_is_acknowledged_when_nobody_uses_the_old_table(net):
    """[M]"""
    a, b = net.pair()
    extra = GuestMemory(1 << 20)
    (own,) = b.memory.table.regions
    (added,) = extra.table.regions
    added = replaced(added, gpa=own.gpa + (1 << 40))
    half = own.size // 2 // PAGE * PAGE
    halves = (
        replaced(own, size=half),
        replaced(
            own,
            gpa=own.gpa + half,
            size=own.size - half,
            frontend_va=own.frontend_va + half,
            mmap_offset=half,
        ),
    )
    fd, other = b.memory.fd, extra.fd
    with Stream((a, b)) as flow:
        for _ in range(50):  # the rings stay where they are
            b.frontend.set_memory(MemTable((own, added)), [fd, other])
            assert is_mapped(net, other) == len(net.switch.worker_pids())
            b.frontend.set_memory(MemTable((own,)), [fd])
            assert is_mapped(net, other) == 0
        flow.wait_for_more(net.switch)
        assert flow.stop().clean
    with Stream((a, b)) as flow:
        for _ in range(50):  # the same memory in other mappings, rings and all
            b.frontend.set_memory(MemTable(halves), [fd, fd])
            b.frontend.set_memory(MemTable((own,)), [fd])
        flow.wait_for_more(net.switch)
        totals = flow.stop()
    assert (totals.reordered, totals.duplicates, totals.corrupt) == (0, 0, 0)
    extra.close()


def test_24_guest_addresses_may_be_huge_and_sparse(net):
    """As virtio-user's, which are its own addresses. [M]"""
    base = 0x11_8020_0000
    guest = net.prepared_by_hand("a", gpa=base, va=base)
    low = replaced(guest.table.regions[0], gpa=0x1_0033_8000, frontend_va=0x1_0033_8000)
    guest.table = MemTable((low, *guest.table.regions))
    guest.open()
    assert_frames_pass(net, guest)


def test_25_two_regions_of_one_file_have_each_its_offset(net):
    """[M]"""
    guest = net.prepared_by_hand("a")
    (whole,) = guest.table.regions
    # Receive buffers lie behind the cut, everything else before it.
    rings, buffers = cut_region(whole, 0x40000)
    for rows in ((rings, buffers), (buffers, rings)):
        guest.table = MemTable(rows)
        guest.open()
        assert_frames_pass(net, guest)
        guest.hang_up()


def with_slots(guest):
    """A front-end that tells memory region by region."""
    protocol = DEFAULT_PROTOCOL | PF_CONFIGURE_MEM_SLOTS
    frontend = guest.connect()
    frontend.negotiate(guest.features, protocol)
    assert frontend.request(Request.GET_MAX_MEM_SLOTS) == U64(32)
    return frontend


def test_26_a_region_may_be_added_twice_and_removed_twice(net):
    """As QEMU 7.2 does, once for each queue pair. [M]"""
    guest, extra = net.prepared_by_hand("a"), GuestMemory(1 << 20)
    frontend = with_slots(guest)
    own = SingleRegion(guest.table.regions[0])
    added = SingleRegion(replaced(extra.table.regions[0], gpa=1 << 40))
    for _ in range(2):
        frontend.request(Request.ADD_MEM_REG, own, [guest.fd])
    guest.start()
    net.switch.wait_for_state("a", "up")
    for _ in range(3):
        for _ in range(2):
            frontend.request(Request.ADD_MEM_REG, added, [extra.fd])
            assert is_mapped(net, extra.fd) == len(net.switch.worker_pids())
        assert_frames_pass(net, guest)
        for _ in range(2):
            frontend.request(Request.REM_MEM_REG, added)
        assert is_mapped(net, extra.fd) == 0
        assert_frames_pass(net, guest)
    for _ in range(2):
        frontend.request(Request.REM_MEM_REG, own)
    assert is_mapped(net, guest.fd) == 0
    extra.close()


def bad_regions(region):
    """Rows of a memory table that cannot be, and how many descriptors come along."""
    small = replaced(region, size=PAGE)
    return {
        "empty": [replaced(region, size=0)],
        "same guest addresses": [small, replaced(small, frontend_va=0)],
        "same front-end addresses": [small, replaced(small, gpa=0)],
        "a page in common": [
            replaced(region, size=2 * PAGE),
            replaced(small, gpa=region.gpa + PAGE, frontend_va=0),
        ],
        "guest addresses wrap": [replaced(region, gpa=TOP - PAGE)],
        "front-end addresses wrap": [replaced(region, frontend_va=TOP - PAGE)],
        "offset wraps": [replaced(region, mmap_offset=TOP - PAGE)],
        "behind the end": [replaced(region, mmap_offset=PAGE)],
        "larger than the file": [replaced(region, size=region.size + 1)],
        "largest": [replaced(region, gpa=0, frontend_va=0, size=TOP - 1)],
    }


def test_27_regions_that_overlap_or_wrap_or_are_empty_are_refused(net):
    """[SPEC][CVE-2020-10722]"""
    guest = net.by_hand("a")
    before = footprint(net.switch)
    for name, rows in bad_regions(guest.table.regions[0]).items():
        with pytest.raises(GuestError, match=REFUSED):
            guest.frontend.set_memory(MemTable(tuple(rows)), [guest.fd] * len(rows))
        with pytest.raises(GuestError, match=REFUSED):  # beside what is there
            guest.frontend.request(
                Request.ADD_MEM_REG, SingleRegion(rows[-1]), [guest.fd]
            )
        assert net.switch.port("a")["state"] == "up", name
    assert_footprint(net.switch, before)
    assert_frames_pass(net, guest)


def test_28_a_descriptor_with_a_removal_is_closed_and_the_region_removed(net):
    """[SPEC]"""
    guest = net.prepared_by_hand("a")
    frontend = with_slots(guest)
    own, spare = SingleRegion(guest.table.regions[0]), eventfd()
    before = footprint(net.switch)
    for fd in (guest.fd, spare):
        frontend.request(Request.ADD_MEM_REG, own, [guest.fd])
        assert is_mapped(net, guest.fd)
        # What is said of the offset means nothing.
        odd = SingleRegion(replaced(own.region, mmap_offset=PAGE))
        frontend.request(Request.REM_MEM_REG, odd, [fd])
        assert is_mapped(net, guest.fd) == 0
        assert footprint(net.switch) == before
    os.close(spare)


def test_29_a_ring_whose_memory_is_removed_stops(net):
    """[DPDK]"""
    guest = net.by_hand("a")
    _, other = net.witnesses
    (region,) = guest.table.regions
    elsewhere = replaced(region, gpa=1 << 50, frontend_va=1 << 50)
    for part in (elsewhere, replaced(region, size=0x8000)):  # no ring, or one of them
        guest.tell_memory(MemTable((part,)))
        assert net.switch.port("a")["state"] == "waiting-for-driver"
        assert "outside guest memory" in net.switch.port("a")["reason"]
        before = guest.read(0, guest.length)
        guest.tx.kick()
        other.send_all([frame(BROADCAST, other)] * 10)
        other.wait_sent()
        assert guest.read(0, guest.length) == before
        guest.tell_memory()
        net.switch.wait_for_state("a", "up")
        assert_frames_pass(net, guest)


@pytest.mark.parametrize("left", [0, 0x20000], ids=["nothing", "the rings"])
def test_30_memory_that_is_truncated_takes_down_only_its_port(net, left):
    """[M]"""
    guest = net.by_hand("a")
    one, other = net.witnesses
    assert_frames_pass(net, guest)
    guest.post(8)
    os.ftruncate(guest.fd, left)
    os.eventfd_write(guest.tx.ends.kick, 1)
    for _ in range(20):
        other.send_all(frame(BROADCAST, other))
        other.wait_sent(timeout=30)
        assert one.receive(timeout=30) == [frame(BROADCAST, other)]
    net.switch.wait_for_state("a", "quarantined")
    assert "truncated" in net.switch.port("a")["reason"]
