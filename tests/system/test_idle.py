"""Asleep a worker costs nothing, and it never sleeps through a frame."""

import time

from tests.system.net import cpu_seconds, exchange_both_ways

WINDOW_S = 3.0


def busiest(pids):
    """The largest share of a CPU that one of the processes took for a while."""
    before = [cpu_seconds(pid) for pid in pids]
    begin = time.monotonic()
    time.sleep(WINDOW_S)  # what is measured is this time
    took = time.monotonic() - begin
    return max(cpu_seconds(pid) - b for pid, b in zip(pids, before, strict=True)) / took


def test_idle_processes_use_less_than_one_percent_of_a_cpu(net):
    exchange_both_ways(net.guest("a"), net.guest("b"))
    pids = [net.switch.pid, *net.switch.worker_pids()]
    assert busiest(pids) < 0.01 or busiest(pids) < 0.01
