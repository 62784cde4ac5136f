"""A worker may be killed at any moment: guests stay connected and traffic goes on."""

import os
import signal

import pytest

from ports.base import RINGS_PER_PORT, TX
from tests.switch import dropped
from tests.system.net import (
    ALL_CPUS,
    BURST,
    RECEIVER,
    SENDER,
    Stream,
    exchange_both_ways,
    frame,
    is_alive,
)
from vswitch import shared
from vswitch.datapath import fdb

SPARES = 3
DEATHS = 4  # many more: test_mayhem
RINGS = 2  # on a frame's way


def killed(switch, worker):
    """Kill a worker and wait until the manager knows."""
    os.kill(worker["pid"], signal.SIGKILL)
    switch.wait_for(
        lambda: worker["pid"] not in switch.worker_pids(), "the death to be seen"
    )


def wait_until_dead(switch, pids):
    switch.wait_for(lambda: not any(map(is_alive, pids)), f"{pids} to end")


def test_an_active_worker_can_be_killed_again_and_again_under_traffic(own_net):
    # With several spares there is one at hand while others start.
    net = own_net("--spares", SPARES)
    net.switch.wait_for_workers(1, SPARES)
    a, b = net.pair()
    since = [net.switch.port(name)["since"] for name in "ab"]
    with Stream((a, b)) as flow:
        for _ in range(DEATHS):
            flow.wait_for_more(net.switch)
            net.switch.wait_for(lambda: net.switch.workers("spare"), "a spare")
            (active,) = net.switch.workers("active")
            others = {w["pid"] for w in net.switch.ask("show")["workers"]}
            others.remove(active["pid"])
            killed(net.switch, active)
            (heir,) = net.switch.workers("active")
            assert heir["pid"] in others
            assert os.sched_getaffinity(heir["pid"]) == {active["cpu"]}
        flow.wait_for_more(net.switch)
        totals = flow.stop()
    assert [net.switch.port(name)["since"] for name in "ab"] == since
    for guest in (a, b):
        guest.wait_ready()  # on the connection that it always had
    exchange_both_ways(a, b)
    counted = dropped(net.switch.counters("b"), "tx")
    bound = DEATHS * RINGS * BURST + counted
    assert totals.reordered == 0
    assert totals.duplicates + totals.sent - totals.received <= bound


@pytest.mark.parametrize("workers", [1, 2])
def test_all_workers_can_be_killed_at_once_under_traffic(own_net, workers):
    net = own_net("--workers", workers, "--cpus", ALL_CPUS)
    receiver = net.guest("r", **RECEIVER)
    senders = [net.guest(name, **SENDER) for name in "abc"]
    net.pin(receiver)
    with Stream(*((sender, receiver) for sender in senders)) as flow:
        for _ in range(3):
            net.switch.wait_for_workers(workers, 1)
            flow.wait_for_more(net.switch)
            pids = net.switch.worker_pids()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            wait_until_dead(net.switch, pids)
            flow.wait_for_more(net.switch)
        totals = flow.stop()
    assert totals.foreign == totals.corrupt == 0
    # Between the deaths a worker may have waited in vain for one that had no CPU.
    busy = net.switch.counters("r")["tx_drop_lock_busy"]
    for sender in senders:
        exchange_both_ways(sender, receiver)
    assert net.switch.counters("r")["tx_drop_lock_busy"] == busy


def test_locks_of_the_dead_are_freed_even_when_their_heirs_die_with_them(own_net):
    net = own_net("--workers", 2, "--cpus", ALL_CPUS)
    a, b = net.guest("a"), net.guest("b")
    net.switch.wait_for_workers(2, 1)
    exchange_both_ways(a, b)
    pids = net.switch.worker_pids()
    records = shared.attach(net.switch.run_dir, writable=True)
    for pid in (net.switch.pid, *pids):
        os.kill(pid, signal.SIGSTOP)
    # As if each had died in the middle of something.
    for ring, worker in ((TX, 0), (RINGS_PER_PORT + TX, 1)):
        records.rings["lock"][ring] = worker + 1
    records.fdb["lock"][::2] = fdb.CONTROL
    records.fdb["lock"][1::2] = 1 + 1
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    os.kill(net.switch.pid, signal.SIGCONT)
    exchange_both_ways(a, b)
    a.send_all(frame(b, b"\x02" * 6))
    assert len(b.receive(timeout=10.0)) == 1
    assert "02:02:02:02:02:02" in [e["mac"] for e in net.switch.ask("fdb_show")]
    assert not records.fdb["lock"].any()
    assert net.switch.counters("a")["tx_drop_lock_busy"] == 0


def test_without_spares_the_others_take_over_and_a_new_worker_comes(own_net):
    net = own_net("--workers", 2, "--spares", 0)
    a, b = net.pair()
    with Stream((a, b)) as flow:
        for number in range(4):
            net.switch.wait_for_workers(2, 0)
            flow.wait_for_more(net.switch)
            killed(net.switch, net.switch.workers("active")[number % 2])
            flow.wait_for_more(net.switch)
        assert flow.stop().reordered == 0


def test_a_killed_spare_is_replaced_and_nobody_notices(own_net):
    net = own_net()
    net.switch.wait_for_workers(1, 1)
    a, b = net.pair()
    with Stream((a, b)) as flow:
        for _ in range(3):
            (spare,) = net.switch.workers("spare")
            killed(net.switch, spare)
            net.switch.wait_for_workers(1, 1)
            assert net.switch.workers("spare")[0]["pid"] != spare["pid"]
        flow.wait_for_more(net.switch)
        totals = flow.stop()
    assert totals.clean
    net.switch.assert_copies_balance("a", "b", totals.sent, totals.received)


def test_guests_come_go_and_reset_while_workers_die(own_net):
    net = own_net("--workers", 2, "--cpus", ALL_CPUS)
    a, b = net.guest("a"), net.guest("b")
    net.pin(a, b)
    for number in range(4):
        net.switch.wait_for_workers(2, 1)
        for worker in net.switch.workers("active")[: 1 + number % 2]:
            os.kill(worker["pid"], signal.SIGKILL)
        (a.reset, b.disconnect)[number % 2]()
        if number % 2:
            b.open()
        exchange_both_ways(a, b)
        c = net.guest("c")
        net.pin(c)
        exchange_both_ways(a, c)
        net.switch.ask("del_port", name="c")
        net.forget(c)
