"""A worker that hangs is killed and replaced; one that gets no CPU is left alone."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.switch import RefusedError
from tests.system.net import Stream, exchange_both_ways
from vswitch import shared

FAULTS = Path(__file__).parent / "faults"
SPIN, WAIT = signal.SIGUSR1, signal.SIGUSR2
STARVED_S = 2.0


@pytest.fixture
def net(own_net, monkeypatch):
    """A switch whose workers have faults to begin, and sleep only without a ring."""
    monkeypatch.setenv("PYTHONPATH", str(FAULTS), prepend=os.pathsep)
    return own_net("--poll", "busy")


@pytest.mark.parametrize(
    ("number", "state"), [(SPIN, "R"), (WAIT, "S"), (signal.SIGSTOP, "T")]
)
def test_a_worker_that_hangs_is_killed_and_its_rings_are_served_again(
    net, number, state
):
    a, b = net.pair()
    since = [net.switch.port(name)["since"] for name in "ab"]
    net.switch.wait_for_workers(1, 1)
    (worker,) = net.switch.workers("active")
    with Stream((a, b)) as flow:
        flow.wait_for_more(net.switch)
        # To its main thread: one with a signal pending would be passed over.
        assert ctypes.CDLL(None).tgkill(worker["pid"], worker["pid"], number) == 0
        net.switch.wait_for_log(f"died: SIGKILL pid={worker['pid']}")
        found = f"hangs: no turn .* state {state} .*pid={worker['pid']}"
        assert re.search(found, net.switch.log)
        flow.wait_for_more(net.switch)
        flow.stop()
    assert [net.switch.port(name)["since"] for name in "ab"] == since
    assert net.switch.log.count("hangs:") == 1
    exchange_both_ways(a, b)


@pytest.mark.parametrize(
    ("command", "arguments", "answer", "known"),
    [
        ("fdb_add", {"mac": "02:00:00:00:00:77", "ifname": "a"}, {}, 3),
        ("fdb_flush", {"ifname": "a"}, {"flushed": 1}, 1),
    ],
)
def test_what_a_worker_was_told_when_it_hung_another_does(
    net, command, arguments, answer, known
):
    exchange_both_ways(net.guest("a"), net.guest("b"))
    net.switch.wait_for_workers(1, 1)
    (worker,) = net.switch.workers("active")
    os.kill(worker["pid"], signal.SIGSTOP)
    assert net.switch.ask(command, **arguments) == answer
    assert len(net.switch.ask("fdb_show")) == known
    assert worker["pid"] not in net.switch.worker_pids()


def test_a_front_end_may_leave_while_there_is_no_worker(own_net):
    net = own_net("--spares", 0)
    a, b = net.guest("a"), net.guest("b")
    exchange_both_ways(a, b)
    (worker,) = net.switch.workers("active")
    os.kill(worker["pid"], signal.SIGSTOP)  # the first that it is told, it hangs at
    b.disconnect()
    net.switch.wait_for_state("b", "waiting-for-frontend")
    net.switch.wait_for_workers(1, 0)
    b.open()
    exchange_both_ways(a, b)


def test_a_flush_that_nobody_can_do_is_refused(own_net):
    net = own_net("--spares", 0)
    exchange_both_ways(net.guest("a"), net.guest("b"))
    (worker,) = net.switch.workers("active")
    os.kill(worker["pid"], signal.SIGSTOP)
    with pytest.raises(RefusedError, match="no worker is running"):
        net.switch.ask("fdb_flush", ifname="a")
    net.switch.wait_for_workers(1, 0)


def test_spares_that_sleep_do_not_hang_unless_they_are_stopped(net):
    net.switch.wait_for_workers(1, 1)
    (spare,) = net.switch.workers("spare")
    os.kill(spare["pid"], signal.SIGSTOP)
    net.switch.wait_for_log(f"died: SIGKILL pid={spare['pid']}")
    net.switch.wait_for_workers(1, 1)
    assert net.switch.log.count("hangs:") == 1


def test_a_worker_that_gets_no_cpu_does_not_hang(net):
    a, b = net.pair()
    net.switch.wait_for_workers(1, 1)
    (worker,) = net.switch.workers("active")
    record = shared.attach(net.switch.run_dir).workers[worker["id"]]
    before = net.switch.worker_pids()
    with Stream((a, b)) as flow:
        flow.wait_for_more(net.switch)
        with ExitStack() as hogs:
            for _ in range(4):
                hogs.enter_context(hog(worker["cpu"]))
            # Among these it gets a thousandth, and that in a piece now and then.
            os.sched_setscheduler(worker["pid"], os.SCHED_IDLE, os.sched_param(0))
            assert longest_turn_s(record, STARVED_S, timeout=60.0) >= STARVED_S
        assert flow.stop().clean
    assert net.switch.worker_pids() == before
    assert "hangs" not in net.switch.log
    exchange_both_ways(a, b)


@contextmanager
def hog(cpu):
    """A process that takes all it can get of one CPU."""
    code = f"import os\nos.sched_setaffinity(0, [{cpu}])\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def longest_turn_s(record, enough_s, timeout):
    """The longest time that a worker made no turn, as soon as it is enough."""
    longest, turns, since = 0.0, -1, time.monotonic()
    deadline = since + timeout
    while longest < enough_s and time.monotonic() < deadline:
        now = time.monotonic()
        if int(record["turns"]) != turns:
            turns, since = int(record["turns"]), now
        longest = max(longest, now - since)
        time.sleep(0.001)
    return longest
