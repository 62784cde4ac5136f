"""Calls, kicks, and sleep. Checklist 66 to 70."""

import contextlib
import os

import pytest

from ports.vhost import virtio
from ports.vhost.messages import Request, VringFd
from tests.conformance.hand import PROTOCOL_FEATURES
from tests.conformance.wire import REFUSED
from tests.datapath.packed_rings import DEFAULT as PACKED
from tests.datapath.packed_rings import LAP
from tests.datapath.rings import DEFAULT, START
from tests.system.net import frame
from vswitch.guest import DEFAULT_FEATURES, GuestError
from vswitch.guest.frontend import eventfd
from vswitch.guest.traffic import hammer

STATION, OTHER = b"\x02\x00\x00\x00\x00\x0a", b"\x02\x00\x00\x00\x00\x0b"
ENABLE, DISABLE, DESC = 0, 1, 2  # of a packed ring's event area
FULL = 2**64 - 2  # an eventfd takes no more
ROUNDS = 2_000  # four times
# A turn with frames ends 1 ms after it began, and after one without any, of 125 us, a
# worker falls asleep; so in some of these gaps it sleeps and in others not.
AROUND_THE_EDGE_US = (200.0, 1500.0)


class Caller:
    """A guest whose rings are made to move one chain at a time; the calls of each."""

    def __init__(self, net, **options):
        self.net = net
        self.guest = net.by_hand("a", **options)
        net.switch.ask("fdb_add", mac=STATION.hex(":"), ifname="a")
        net.switch.ask("fdb_add", mac=OTHER.hex(":"), ifname="w1")

    def settle(self):
        """Return when the worker has finished the turn that it is in."""
        self.net.switch.ask("fdb_flush", ifname="a")

    def sent(self):
        """Send one; how often we were called for it."""
        self.guest.send(frame(OTHER, STATION))
        self.guest.tx.wait_back()
        self.settle()
        self.net.drain()
        return self.guest.tx.calls()

    def received(self):
        """Receive one; how often we were called for it."""
        sender = self.net.witnesses[0]
        self.guest.post(1)
        sender.send_all(frame(STATION, sender))
        self.guest.rx.wait_back()
        self.settle()
        return self.guest.rx.calls()


@pytest.fixture(params=["tx", "rx"])
def direction(request):
    """Which ring is looked at, and the method of Caller that moves it."""
    return request.param, {"tx": Caller.sent, "rx": Caller.received}[request.param]


def test_66_who_wants_no_interrupt_gets_none(net, direction):
    """[VIRTIO]"""
    name, move = direction
    caller = Caller(net)
    side = getattr(caller.guest, name)
    for flags in (0, 1, 1, 0, 1, 0):
        caller.guest.write(side.avail, flags.to_bytes(2, "little"))
        assert move(caller) == 1 - flags


@pytest.mark.parametrize("ahead", range(10))
def test_67_a_call_comes_exactly_when_the_used_event_is_passed(net, direction, ahead):
    """Across 65535, and for the first chain after a start. [VIRTIO][DPDK]"""
    name, move = direction
    caller = Caller(net, features=DEFAULT | PROTOCOL_FEATURES | virtio.F_EVENT_IDX)
    side = getattr(caller.guest, name)
    for begin in (START, START + 10):
        side.set_used_event((begin + ahead) & 0xFFFF)
        called = [move(caller) for _ in range(10)]
        assert called == [int(n in {0, ahead}) for n in range(10)]
        caller.guest.stop()
        caller.guest.start()


def position(side, ahead):
    """Index and lap of the chain that is `ahead` of the next one."""
    lap, index = divmod(side.next + ahead, side.size)
    return index | (side.lap ^ lap & 1) << 15


@pytest.mark.parametrize("size", [16, 5])
def test_68_a_packed_rings_event_says_never_always_or_where(net, direction, size):
    """[VIRTIO]"""
    name, move = direction
    features = PACKED | PROTOCOL_FEATURES | virtio.F_EVENT_IDX
    caller = Caller(net, packed=True, features=features, size=size)
    side = getattr(caller.guest, name)
    for flags in (ENABLE, DISABLE, DISABLE, ENABLE, DISABLE):
        side.set_driver_event(flags)
        assert move(caller) == int(flags == ENABLE)
    for ahead in [*range(5)] * 3:
        side.set_driver_event(DESC, position(side, ahead))
        assert [move(caller) for _ in range(5)] == [int(n == ahead) for n in range(5)]
    # Where it would be a lap away: the same index with the other wrap counter.
    side.set_driver_event(DESC, position(side, 0) ^ LAP)
    assert move(caller) == 0


@pytest.mark.parametrize(
    "features",
    [DEFAULT_FEATURES, DEFAULT_FEATURES & ~virtio.F_EVENT_IDX],
    ids=["event", "flag"],
)
def test_69_no_frame_is_slept_through(net, features):
    """[VIRTIO]"""
    a, b = net.guest("a", features=features), net.guest("b", features=features)
    net.pin(a, b)
    before = net.switch.ask("stats")["workers"]
    for sender, receiver in ((a, b), (b, a)):
        times = hammer(sender, receiver, ROUNDS, AROUND_THE_EDGE_US, timeout=5.0)
        assert times.arrived == ROUNDS
    after = net.switch.ask("stats")["workers"]
    sleeps = sum(after[n]["wakeups"] - before[n]["wakeups"] for n in before)
    assert sleeps > ROUNDS / 10  # the edge was there
    net.switch.assert_copies_balance("a", "b", ROUNDS, ROUNDS)
    net.switch.assert_copies_balance("b", "a", ROUNDS, ROUNDS)


def set_fd(guest, request, fd):
    for side in guest.sides:
        guest.frontend.request(request, VringFd(side.index, has_fd=True), [fd])


@pytest.mark.parametrize(
    "kind", ["pipe", "socket", "full", "full, blocking before", "full, blocking after"]
)
def test_70_a_descriptor_that_would_block_holds_no_worker(net, kind):
    """[INF]"""
    caller = Caller(net)
    guest = caller.guest
    requests = (Request.SET_VRING_CALL, Request.SET_VRING_ERR)
    if kind in {"pipe", "socket"}:
        ends = os.pipe() if kind == "pipe" else os.openpty()
        for request in requests:
            with pytest.raises(GuestError, match=REFUSED):
                set_fd(guest, request, ends[1])
        for end in ends:
            os.close(end)
        assert caller.sent() == 1
        return
    fd = eventfd()
    os.eventfd_write(fd, FULL)
    os.set_blocking(fd, kind == "full, blocking before")
    for request in requests:
        set_fd(guest, request, fd)
    # Whether writes block is of the open file, and the front-end has it too.
    os.set_blocking(fd, kind == "full, blocking after")
    try:
        for _ in range(3):
            guest.send(frame(STATION, STATION))  # comes back, and no further
            guest.post(1)
            net.witnesses[0].send_all(frame(STATION, net.witnesses[0]))
            net.assert_undisturbed()
            if kind != "full, blocking after":  # that ring may be given up
                guest.tx.wait_back()
                guest.rx.wait_back()
        guest.tx.jump(1000)  # and reports it
        net.switch.wait_for_port("a", lambda port: "broken" in port["reason"])
        net.assert_undisturbed()
        assert FULL <= os.eventfd_read(fd) <= FULL + 1
    finally:
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):  # let go whoever waits to write
            os.eventfd_read(fd)
        os.close(fd)
