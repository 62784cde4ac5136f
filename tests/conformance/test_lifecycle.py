"""Rings start, stop, and start again; front-ends come and go. Checklist 31 to 50."""

import dataclasses
import itertools
import os
import random
import time

import pytest

from ports.vhost.messages import U64, Request, VringAddr, VringFd, VringState
from tests.conformance import dirty
from tests.conformance.dirty import PAGE, highest, rings_by_hand, rings_of
from tests.conformance.hand import PROTOCOL_FEATURES
from tests.conformance.wire import HUNG_UP, REFUSED
from tests.datapath.packed_rings import LAP
from tests.system.net import (
    BROADCAST,
    Stream,
    assert_flows,
    assert_footprint,
    cpu_seconds,
    exchange_both_ways,
    footprint,
    frame,
    open_fds,
)
from tests.system.quitter import quit_after
from vswitch.guest import DEFAULT_FEATURES, GuestError
from vswitch.guest.frontend import DEFAULT_ORDER, Frontend, eventfd

STATION = b"\x02\x00\x00\x00\x00\x01"
WITHOUT_ENABLE = tuple(step for step in DEFAULT_ORDER if step != "enable")
NO_RING = [16, 17, 255, 256, 65536, 0xFFFFFFFF]
STORM = 1000

# What front-ends send to start a device with one queue pair. Digits are rings.
SEQUENCES = {
    "QEMU": """
        call 0, err 0, call 1, err 1, enable 01, features, memory
        num base addr kick call 0, num base addr kick call 1""",
    "virtio-user": """
        call 0, call 1, features, memory
        num base addr kick 0, num base addr kick 1, enable 01""",
    "cloud-hypervisor": """
        features, memory, num 01
        addr base call kick 0, addr base call kick 1, enable 01""",
    "crosvm": """
        features, memory
        num addr base call kick enable 0, num addr base call kick enable 1""",
    "libkrun": """
        memory, features
        num base addr kick call enable 0, num base addr kick call enable 1""",
    "rings first": """
        enable 01, num base addr kick call 0, num base addr kick call 1
        memory, features""",
}


def play(guest, script):
    """Send the messages of a script on the guest's connection."""
    frontend = guest.frontend
    for line in script.replace("\n", ",").split(","):
        *steps, where = line.split() or [""]
        if where == "features":
            frontend.request(Request.SET_FEATURES, U64(frontend.features))
        elif where == "memory":
            guest.tell_memory()
        for number, step in itertools.product(where if steps else "", steps):
            side = guest.sides[int(number)]
            if step == "err":
                err = VringFd(side.index, has_fd=True)
                frontend.request(Request.SET_VRING_ERR, err, [side.ends.err])
            else:
                setup = guest.setup(side, guest.positions()[side.index])
                frontend.start_ring(setup, [step])


def assert_frames_pass(net, guest, header=12):
    """One frame each way between a guest with rings by hand and a witness."""
    _, other = net.witnesses
    net.drain()
    one, two = frame(other, STATION, 100), frame(STATION, other, 300)
    guest.send(one)
    guest.tx.wait_back()
    assert other.receive(timeout=10.0) == [one]
    guest.post(1)
    other.send_all(two)
    ((_, length, *_),) = guest.rx.wait_back()
    assert guest.buffer(0, length)[header:] == two


def flood(net, count=100):
    """Send broadcasts past every port; when they come back, all copies are made."""
    sender = net.witnesses[0]
    sender.send_all([frame(BROADCAST, sender, 60 + n) for n in range(count)])
    sender.wait_sent()
    net.drain()


def holders(net, fd):
    """How many processes of the switch hold an eventfd of ours."""
    (identity,) = open_fds(os.getpid())[fd][2:]
    pids = (net.switch.pid, *net.switch.worker_pids())
    return sum(
        any(identity in found for found in open_fds(pid).values()) for pid in pids
    )


def set_call(guest, side, fd):
    payload = VringFd(side.index, has_fd=fd is not None)
    guest.frontend.request(Request.SET_VRING_CALL, payload, [] if fd is None else [fd])


def test_31_enable_is_remembered_whenever_it_comes(net):
    """[M]"""
    guest = net.prepared_by_hand("a")
    frontend = guest.connect()
    for index in (0, 1):  # the first messages of all
        frontend.request(Request.SET_VRING_ENABLE, VringState(index, 1))
    frontend.negotiate(guest.features)
    guest.tell_memory()
    guest.start(WITHOUT_ENABLE)
    assert_frames_pass(net, guest)


def test_32_a_ring_that_was_stopped_is_still_enabled(net):
    """[M]"""
    guest = net.by_hand("a")
    for _ in range(5):
        assert_frames_pass(net, guest)
        bases = guest.stop()
        guest.start(WITHOUT_ENABLE, bases)
    assert_frames_pass(net, guest)


@pytest.mark.parametrize("pair", range(4))
def test_33_a_disabled_pair_gets_nothing_and_sends_nothing(net, pair):
    """[SPEC]"""
    a, b = net.guest("a", queue_pairs=4), net.guest("b")
    net.pin(a, b)
    for index in (2 * pair, 2 * pair + 1):
        a.enable(index, on=False)
    before = a.layouts[2 * pair].device_position()
    for flow in range(256):  # from many stations, that many flows
        b.send_all(frame(a, b"\x02\x00\x00\x00\x01" + bytes([flow])))
    b.wait_sent()
    assert a.layouts[2 * pair].device_position() == before
    sent = [frame(b, a, 60 + n) for n in range(5)]
    a.send_all(sent, queue=pair)
    a.wait_sent()
    net.wait_for_count("a", "rx_drop_disabled", 5)
    assert b.receive(timeout=0) == []
    for index in (2 * pair, 2 * pair + 1):
        a.enable(index, on=True)
    a.receive(timeout=0)
    a.send_all(sent, queue=pair)
    assert b.receive(timeout=10.0, at_least=5) == sent
    assert_flows(b, a)


def test_34_with_all_rings_disabled_nothing_of_the_guest_is_touched(net):
    """How cloud-hypervisor pauses a guest. [CH][INF]"""
    guest = net.by_hand("a")
    _, other = net.witnesses
    guest.post(8)
    for index in (0, 1):
        guest.frontend.enable_ring(index, enable=False)
    one = frame(other, STATION, 100)
    guest.send(one)
    before = guest.read(0, guest.length)
    flood(net)
    guest.tx.kick()
    flood(net)
    assert guest.read(0, guest.length) == before
    guest.rx.calls(), guest.tx.calls()
    for index in (1, 0):  # the other way round, what waits would be dropped
        guest.frontend.enable_ring(index, enable=True)
    assert other.receive(timeout=10.0) == [one]
    guest.tx.wait_back()
    flood(net, 8)
    assert len(guest.rx.wait_back(8)) == 8


def test_35_without_bit_30_rings_need_not_be_enabled(net):
    """[SPEC]"""
    features = DEFAULT_FEATURES & ~PROTOCOL_FEATURES
    a, b = net.guest("a", features=features), net.guest("b", features=features)
    assert not a.features & PROTOCOL_FEATURES
    exchange_both_ways(a, b)
    a.stop()
    a.start()
    a.wait_ready()
    exchange_both_ways(a, b)


def test_36_the_call_descriptor_may_come_early_change_and_go(net):
    """[M]"""
    guest = net.prepared_by_hand("a")
    guest.open(order=("call", "num", "base", "addr", "kick", "enable"))
    side, first = guest.tx, guest.tx.ends.call
    guest.send(frame(BROADCAST, STATION))
    guest.tx.wait_back()
    net.switch.wait_for(side.calls, "a call")
    assert holders(net, first)
    for _ in range(20):
        fresh = eventfd()
        set_call(guest, side, fresh)
        assert holders(net, side.ends.call) == 0
        assert holders(net, fresh)
        if side.ends.call != first:
            os.close(side.ends.call)
        side.ends = side.ends._replace(call=fresh)
        guest.send(frame(BROADCAST, STATION))
        guest.tx.wait_back()
        net.switch.wait_for(side.calls, "a call on the new descriptor")
    set_call(guest, side, None)
    assert holders(net, fresh) == 0
    guest.send(frame(BROADCAST, STATION))
    guest.tx.wait_back()
    assert side.calls() == 0
    os.close(fresh)
    side.ends = side.ends._replace(call=first)
    set_call(guest, side, first)
    assert_frames_pass(net, guest)


def test_37_a_ring_without_a_kick_is_polled(net):
    """[SPEC]"""
    a, b = net.prepared("a"), net.guest("b")
    for ring in a.rings:
        os.close(int(ring["kick_fd"]))
    a.rings["kick_fd"] = -1
    a.open()
    # Longer apart than a worker stays awake, or a ring would be seen by chance.
    for number in range(10):
        one = frame(b, a, 60, number)
        net.switch.wait_for(
            lambda: net.switch.workers("active")[0]["state"] == "sleeping",
            "a worker that naps",
        )
        a.send(one)
        assert b.receive(timeout=10.0) == [one]


@pytest.mark.parametrize("name", SEQUENCES)
def test_38_rings_start_in_the_order_of_every_front_end(net, name):
    """[M][CH][LIBKRUN]"""
    guest = net.prepared_by_hand("a")
    for _ in range(3):  # and again when it reconnects
        guest.connect().negotiate(guest.features, set_features=False)
        play(guest, SEQUENCES[name])
        net.switch.wait_for_state("a", "up")
        assert_frames_pass(net, guest)
        guest.hang_up()
        net.switch.wait_for_state("a", "waiting-for-frontend")


def test_39_a_ring_that_was_never_configured_stands_at_0(net):
    """And one that never ran where it was told to. [M]"""
    a, b = net.guest("a"), net.guest("b", start_index=500)
    exchange_both_ways(a, b)
    b.disconnect()
    net.switch.wait_for_state("b", "waiting-for-frontend")
    frontend = net.connect("b")
    assert [frontend.stop_ring(index) for index in range(16)] == [0] * 16
    frontend.request(Request.SET_VRING_BASE, VringState(3, 1234))
    assert frontend.stop_ring(3) == 1234
    frontend.close()
    b.open()
    exchange_both_ways(a, b)


def test_40_the_number_in_a_request_for_the_position_means_nothing(net):
    """[M]"""
    guest = net.by_hand("a")
    assert_frames_pass(net, guest)
    for garbage in (0xDEADBEEF, 0xFFFFFFFF, 1, 1 << 31):
        wanted = guest.positions()
        found = [
            guest.frontend.request(
                Request.GET_VRING_BASE, VringState(side.index, garbage)
            )
            for side in guest.sides
        ]
        assert found == [VringState(n, base) for n, base in enumerate(wanted)]
        never = guest.frontend.request(Request.GET_VRING_BASE, VringState(5, garbage))
        assert never == VringState(5, 0)
        guest.start()
        assert_frames_pass(net, guest)


def test_41_a_stopped_ring_is_not_touched_and_nobody_is_called(net, make_log):
    """[SPEC]"""
    guest = net.by_hand("a")
    sender = net.witnesses[0]
    log = make_log(highest(guest.table))
    dirty.begin(guest.frontend, log, rings_by_hand(guest))
    for number in range(20):
        guest.lay_out()
        guest.post(16)
        for slot in range(16):
            guest.tx.describe(slot, guest.put(0x20000, bytes(64)), 64)
        if number:
            guest.start()
            dirty.log_rings(guest.frontend, rings_by_hand(guest), on=True)
        guest.tx.offer(*range(16))
        sender.send([frame(BROADCAST, sender, 60 + n) for n in range(64)])
        bases = guest.stop()
        before = guest.read(0, guest.length)
        assert bases == guest.positions()
        for side in guest.sides:
            side.calls()
        log.fetch()
        guest.tx.kick()
        flood(net)
        assert log.fetch() == []
        assert guest.read(0, guest.length) == before
        assert [side.calls() for side in guest.sides] == [0, 0]
        assert [side.errors() for side in guest.sides] == [0, 0]


def test_42_a_split_ring_stands_at_its_used_index(net):
    """[SPEC]"""
    a, b = net.pair({"start_index": 65500}, {"start_index": 65000})
    with Stream((a, b)) as flow:
        for number in range(20):
            guest = (a, b)[number % 2]
            flow.wait_for_more(net.switch, 2000)
            bases = guest.stop()
            assert bases == [layout.device_position() for layout in guest.layouts]
            guest.start()
        flow.wait_for_more(net.switch)
        totals = flow.stop()
    assert (totals.reordered, totals.duplicates, totals.foreign) == (0, 0, 0)
    net.switch.assert_copies_balance("a", "b", totals.sent, totals.received)


@pytest.mark.parametrize("high", [0, LAP << 16], ids=["0x8000", "0x80008000"])
@pytest.mark.parametrize("size", [16, 5])
def test_43_a_packed_ring_has_a_position_for_either_side(net, high, size):
    """virtio-user gives one half, QEMU both. [M][SPEC]"""
    guest = net.prepared_by_hand("a", packed=True, size=size)
    guest.connect().negotiate(guest.features)
    guest.tell_memory()
    guest.start(bases=[LAP | high] * 2)
    net.switch.wait_for_state("a", "up")
    for count in range(1, 2 * size):
        assert_frames_pass(net, guest)
        lap, index = divmod(count, size)
        wanted = index | (0 if lap % 2 else LAP)
        assert guest.stop() == [wanted | wanted << 16] * 2
        given = wanted | wanted << 16 if high else wanted
        guest.start(bases=[given] * 2)


@pytest.mark.parametrize("base", [0, 777])
def test_44_a_wrong_position_at_a_reconnect_does_no_harm(net, base):
    """virtio-user says 0, cloud-hypervisor the available index. [M][CH][DPDK]"""
    a, b = net.guest("a"), net.guest("b")
    exchange_both_ways(a, b)
    for guest in (a, b):
        guest.disconnect()
        guest.open(base=base)
    exchange_both_ways(a, b)


def test_45_a_running_rings_addresses_may_be_told_again_to_switch_its_log(
    net, make_log
):
    """[M]"""
    a, b = net.pair({"start_index": 65500}, {"start_index": 65000})
    log, rings = make_log(highest(b.memory.table)), rings_of(b)
    page = rings[0][1] // PAGE  # nothing is sent by the other
    dirty.begin(b.frontend, log, [])
    with Stream((a, b)) as flow:
        for _ in range(20):
            dirty.log_rings(b.frontend, rings, on=True)
            flow.wait_for_more(net.switch, 3000)
            assert page in log.fetch()
            dirty.log_rings(b.frontend, rings, on=False)
            log.fetch()
            flow.wait_for_more(net.switch, 3000)
            assert page not in log.fetch()
        assert flow.stop().clean
    moved, address = rings[0]
    with pytest.raises(GuestError, match=REFUSED):  # anything else of it may not change
        dirty.log_rings(
            b.frontend,
            [(dataclasses.replace(moved, used=moved.used + PAGE), address)],
            on=True,
        )


def test_46_status_0_before_the_stop_loses_nothing(net):
    """As QEMU 7.2 stops a device; it starts without telling the memory again. [M]"""
    a, b = net.pair()
    a._order = b._order = WITHOUT_ENABLE
    with Stream((a, b)) as flow:
        for guest in (a, b) * 5:
            flow.wait_for_more(net.switch, 2000)
            guest.frontend.request(Request.SET_STATUS, U64(0))
            flow.wait_for_more(net.switch, 2000)  # it is only a record
            bases = guest.stop()
            assert bases == [layout.device_position() for layout in guest.layouts]
            guest.start()
        flow.wait_for_more(net.switch)
        totals = flow.stop()
    assert (totals.reordered, totals.duplicates, totals.foreign) == (0, 0, 0)
    net.switch.assert_copies_balance("a", "b", totals.sent, totals.received)


def test_47_a_ring_size_that_cannot_be_is_refused(net):
    """A packed ring's need not be a power of two. [DPDK][VIRTIO]"""
    guest = net.prepared_by_hand("a")
    guest.connect().negotiate(guest.features)
    for size in (0, 3, 255, 32769, 65535, 65536, 1 << 31):
        with pytest.raises(GuestError, match=REFUSED):
            guest.frontend.request(Request.SET_VRING_NUM, VringState(0, size))
    for size in (1, 2, 32768):
        guest.frontend.request(Request.SET_VRING_NUM, VringState(0, size))
    packed = net.by_hand("b", packed=True, size=3)
    for _ in range(7):
        assert_frames_pass(net, packed)
    for size in (0, 32769, 65536):
        packed.stop()
        with pytest.raises(GuestError, match=REFUSED):
            packed.frontend.request(Request.SET_VRING_NUM, VringState(0, size))


@pytest.mark.parametrize("index", NO_RING)
def test_48_a_ring_that_does_not_exist_is_refused(net, index):
    """[CVE-2020-10723]"""
    guest = net.by_hand("a")
    frontend, spare = guest.frontend, eventfd()
    for request in (
        Request.SET_VRING_NUM,
        Request.SET_VRING_BASE,
        Request.SET_VRING_ENABLE,
    ):
        with pytest.raises(GuestError, match=REFUSED):
            frontend.request(request, VringState(index, 1))
    with pytest.raises(GuestError, match=REFUSED):
        frontend.request(Request.SET_VRING_ADDR, VringAddr(index, 0, 0, 0, 0, 0))
    for request in (
        Request.SET_VRING_KICK,
        Request.SET_VRING_CALL,
        Request.SET_VRING_ERR,
    ):
        if index <= 255:
            with pytest.raises(GuestError, match=REFUSED):
                frontend.request(request, VringFd(index, has_fd=True), [spare])
            with pytest.raises(GuestError, match=REFUSED):
                frontend.request(request, VringFd(index, has_fd=False))
    os.close(spare)
    assert_frames_pass(net, guest)
    with pytest.raises(GuestError, match=HUNG_UP):
        frontend.stop_ring(index)


def test_49_whenever_a_front_end_goes_away_nothing_of_it_is_left(net):
    """[M]"""
    path = net.add_port("b")
    a, b = net.guest("a"), net.behind(path)
    quit_after(b, path, 99, 0, ack=True)
    net.switch.wait_for_state("b", "waiting-for-frontend")
    before = footprint(net.switch)
    moments = list(itertools.product(range(21), (0, 1, 11, 12, 13), (True, False)))
    random.Random(1).shuffle(moments)
    for number, (whole, part, ack) in enumerate(moments):
        if number % 10 == 0:  # now and then other memory
            net.forget(b)
            b = net.behind(path)
        quit_after(b, path, whole, part, ack)
    net.switch.wait_for_state("b", "waiting-for-frontend")
    assert_footprint(net.switch, before)
    b.open()
    exchange_both_ways(a, b)
    assert "b" in [entry["ifname"] for entry in net.switch.ask("fdb_show")]
    b.disconnect()
    net.switch.wait_for_state("b", "waiting-for-frontend")
    assert "b" not in [entry["ifname"] for entry in net.switch.ask("fdb_show")]
    assert_footprint(net.switch, before)


def test_50_a_storm_of_reconnects_costs_little_and_says_little(net):
    """As of a QEMU with more queues than the port has. [M]"""
    a, b = net.pair()
    net.add_port("c", queues=1)
    lines, spent = net.switch.log.count("\n"), cpu_seconds(net.switch.pid)
    begin = time.monotonic()
    with Stream((a, b)) as flow:
        for _ in range(STORM):
            frontend = Frontend.connect(net.switch.socket("c"))
            frontend.negotiate(DEFAULT_FEATURES)
            frontend.close()
        took = time.monotonic() - begin
        flow.wait_for_more(net.switch)
        assert flow.stop().clean
    net.switch.wait_for_state("c", "waiting-for-frontend")
    assert net.switch.log.count("\n") - lines <= 25 * (1 + took / 10)
    assert cpu_seconds(net.switch.pid) - spent < 0.02 * STORM
