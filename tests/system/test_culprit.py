"""Workers that die in the middle of the same port's rings: that port is parted from."""

import os
import signal
import time
from pathlib import Path

import pytest

from ports.base import RINGS_PER_PORT, RX, TX
from tests.switch import dropped
from tests.system.net import Stream, exchange_both_ways, is_alive
from vswitch import shared

A, B = 0, 1  # slots


@pytest.fixture
def scene(own_net):
    """Two guests whose frames keep a worker busy, two bystanders, the records."""
    net = own_net("--spares", "2", "--poll", "busy")
    a, b = net.pair()
    others = net.guest("c"), net.guest("d")
    net.pin(*others)
    exchange_both_ways(*others)
    yield net, a, b, shared.attach(net.switch.run_dir)
    exchange_both_ways(*others)


def end_at(net, records, flow, port, queue, number):
    """Send a worker a signal while it is at a ring, and wait for its end."""
    net.switch.wait_for(lambda: net.switch.workers("spare"), "a spare")
    flow.wait_for_more(net.switch, 1000)
    (worker,) = net.switch.workers("active")
    pid, record = worker["pid"], records.workers[worker["id"]]
    mark = port * RINGS_PER_PORT + queue + 1
    deadline = time.monotonic() + 60
    while True:
        while int(record["serving"]) != mark:
            assert time.monotonic() < deadline, record
        os.kill(pid, signal.SIGSTOP)
        wait_stopped(pid)
        if int(record["serving"]) == mark:
            break
        os.kill(pid, signal.SIGCONT)
    os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)
    net.switch.wait_for_log(f"died: {signal.Signals(number).name} pid={pid}")


def wait_stopped(pid):
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert is_alive(pid), pid


@pytest.mark.parametrize(
    ("name", "port", "queue"), [("a", A, RX), ("b", B, TX)], ids=["sender", "receiver"]
)
def test_the_second_death_at_the_rings_of_one_port_quarantines_it(
    scene, name, port, queue
):
    net, a, b, records = scene
    other = {"a": "b", "b": "a"}[name]
    with Stream((a, b), raw=False) as flow:
        end_at(net, records, flow, port, queue, signal.SIGSEGV)
        net.switch.wait_for_log(f"port {name}: a worker died (SIGSEGV) while it served")
        end_at(net, records, flow, port, queue, signal.SIGSEGV)
        found = net.switch.wait_for_state(name, "quarantined")
        assert (
            f"a worker died (SIGSEGV) while it served virtqueue {queue}"
            in (found["reason"])
        )
        assert net.switch.port(other)["state"] == "up"
        net.switch.wait_for_workers(1, 2)
    assert net.switch.log.count(" died: ") == 2
    for guest in (a, b):
        guest.disconnect()  # their rings were left in the middle of a stream
    for guest in (a, b):
        guest.open()
    net.switch.wait_for_state(name, "up")
    exchange_both_ways(a, b)


def test_deaths_that_no_port_is_to_blame_for_quarantine_none(scene):
    net, a, b, records = scene
    with Stream((a, b)) as flow:
        for _ in range(3):
            end_at(net, records, flow, A, RX, signal.SIGKILL)
        end_at(net, records, flow, A, RX, signal.SIGSEGV)
        end_at(net, records, flow, B, TX, signal.SIGSEGV)
        flow.wait_for_more(net.switch)
        totals = flow.stop()
    assert [net.switch.port(name)["state"] for name in "ab"] == ["up", "up"]
    assert totals.corrupt == totals.foreign == 0
    assert dropped(net.switch.counters("b"), "tx") <= totals.sent - totals.received
