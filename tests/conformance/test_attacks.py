"""What a hostile front-end may try beside what the checklist numbers.

`tests/test_security_list.py` says which attack is shown where to come to nothing.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import mmap
import os
import socket

import pytest

from ports.base import MAX_REGIONS, RINGS_PER_PORT
from ports.vhost.messages import MemTable, Request, VringFd
from tests.conformance import dirty
from tests.conformance.dirty import highest, rings_by_hand
from tests.conformance.wire import NATURAL, REFUSED, SERVED, good_message
from tests.system.net import BROADCAST, footprint, frame, status_kib
from vswitch.guest import GuestError
from vswitch.guest.frontend import eventfd

REPEATS = 200
SLACK_KIB = 2 << 10  # an arena of Python's and one of the C library's
FLOOD = 100
TEBIBYTE = 1 << 40
STATION = b"\x02\x00\x00\x00\x00\x01"
RING_FDS = (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)


def test_whatever_is_repeated_takes_the_place_of_what_was_there(net):
    """[CVE-2019-14818][CVE-2020-10726]"""
    guest = net.prepared_by_hand("a")
    frontend = guest.connect()
    frontend.negotiate(guest.features)
    settings = sorted(set(SERVED) - set(NATURAL))
    settings += [Request.SET_LOG_BASE]

    def say_all():
        for request in settings:
            payload, fds = good_message(guest, request)
            frontend.request(request, payload, fds)

    for _ in range(2):
        say_all()
    before, kib = footprint(net.switch), status_kib(net.switch.pid, "RssAnon")
    for _ in range(REPEATS):
        say_all()
    assert footprint(net.switch) == before
    assert status_kib(net.switch.pid, "RssAnon") - kib < SLACK_KIB


def test_a_front_end_has_as_many_descriptors_as_its_rings_and_regions_need(net):
    """And more of them are refused, or take the place of others."""
    guest = net.prepared_by_hand("a")
    before = footprint(net.switch)[net.switch.pid][0]
    frontend = guest.connect()
    frontend.negotiate(guest.features)
    (region,) = guest.table.regions
    rows = [
        dataclasses.replace(region, size=4096, gpa=n << 20, frontend_va=n << 20)
        for n in range(MAX_REGIONS + 1)
    ]
    with contextlib.ExitStack() as owned:
        files = [fresh(owned, guest.fd) for _ in rows]
        frontend.set_memory(MemTable(tuple(rows[:-1])), files[:-1])
        with pytest.raises(GuestError, match=REFUSED):
            frontend.set_memory(MemTable(tuple(rows)), files)
        for _ in range(2):
            for request, index in itertools.product(RING_FDS, range(RINGS_PER_PORT)):
                ring = VringFd(index, has_fd=True)
                frontend.request(request, ring, [fresh(owned)])
    held = footprint(net.switch)[net.switch.pid][0] - before
    # The manager has everything twice, should its keeper die; and what workers have, too,
    # a third time, for those to come.
    assert held - 2 <= 3 * (MAX_REGIONS + len(RING_FDS) * RINGS_PER_PORT)


def fresh(owned, fd=None):
    """A descriptor that ends with `owned`: an eventfd, or the same file as `fd`."""
    new = eventfd() if fd is None else os.dup(fd)
    owned.callback(os.close, new)
    return new


def test_of_a_flood_of_connections_one_is_served(net):
    path = net.add_port("a")
    before = footprint(net.switch)
    with contextlib.ExitStack() as owned:
        refused = 0
        for _ in range(FLOOD):
            one = owned.enter_context(socket.socket(socket.AF_UNIX))
            one.setblocking(False)
            try:
                one.connect(str(path))
            except BlockingIOError:
                refused += 1
        assert refused > FLOOD // 2
        net.switch.wait_for_state("a", "negotiating")
        now = footprint(net.switch)
        # And a copy for the next keeper.
        assert now[net.switch.pid][0] - before[net.switch.pid][0] == 2
        net.assert_undisturbed()
    guest = net.behind(path)
    guest.open()  # when those who gave up have been heard out
    net.switch.wait_for_state("a", "up")


def test_huge_pages_that_nobody_has_are_refused(net):
    """Whoever touched such memory would end by SIGBUS."""
    guest = net.by_hand("a")
    (region,) = guest.table.regions
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    os.ftruncate(fd, TEBIBYTE)
    table = MemTable((dataclasses.replace(region, size=TEBIBYTE),))
    with pytest.raises(GuestError, match=REFUSED):
        guest.frontend.set_memory(table, [fd])
    os.close(fd)


@pytest.mark.parametrize("sealed", [False, True], ids=["opened", "sealed"])
def test_memory_that_may_only_be_read_is_refused(net, sealed):
    """A used ring in it would end whoever wrote it."""
    guest = net.by_hand("a")
    fd = os.memfd_create("read", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, guest.length)
    mine = os.open(f"/proc/self/fd/{fd}", os.O_RDWR if sealed else os.O_RDONLY)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(GuestError, match=REFUSED):
        guest.frontend.set_memory(guest.table, [mine])
    for one in (fd, mine):
        os.close(one)


def test_a_log_that_is_truncated_takes_down_only_its_port(net, make_log):
    guest = net.by_hand("a")
    sender = net.witnesses[0]
    log = make_log(highest(guest.table))
    dirty.begin(guest.frontend, log, rings_by_hand(guest))
    guest.post(8)
    os.ftruncate(log.fd, 0)
    for _ in range(8):
        sender.send_all(frame(BROADCAST, sender))
        sender.wait_sent(timeout=30)
    net.switch.wait_for_state("a", "quarantined")
    assert "truncated" in net.switch.port("a")["reason"]


def test_a_hole_where_the_rings_were_costs_nobody_else(net):
    """The rings are all zeroes at once, as after a balloon's mistake."""
    guest = net.by_hand("a")
    sender = net.witnesses[0]
    guest.post(8)
    sender.send_all(frame(BROADCAST, sender))
    guest.rx.wait_back()
    with mmap.mmap(guest.fd, guest.length) as memory:
        memory.madvise(mmap.MADV_REMOVE)
    guest.tx.kick()
    for _ in range(20):
        sender.send_all(frame(BROADCAST, sender))
        sender.wait_sent()
    net.assert_undisturbed()
    guest.stop()
    guest.lay_out()
    guest.start()
    guest.send(frame(BROADCAST, STATION))
    assert guest.tx.wait_back() == [(0, 0)]
