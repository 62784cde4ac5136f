"""Uplinks when the manager is killed: frames go on, and the next one has them again."""

import signal

import pytest

from tests.netns.checks import Traffic, assert_passes_both_ways, program
from tests.switch import wait_for

pytestmark = pytest.mark.netns

KINDS = ("tap", "eth", "xdp")


@pytest.mark.parametrize("kind", KINDS)
def test_an_uplink_outlives_the_manager(start, make_bench, namespace, far, kind):
    switch = start()
    bench = make_bench(switch)
    if kind == "tap":
        bench.uplink("tap", "next0")
    else:
        bench.cable("next0", far)
        bench.uplink(kind, "next0")
    guest = bench.guest("vm")
    wire = bench.wire("next0", None if kind == "tap" else far)
    assert_passes_both_ways(guest, wire)
    namespace.ip("address add 10.9.0.1/24 dev next0")
    switch.wait_for_workers(1, 1)
    workers = switch.worker_pids()
    for _ in range(2):
        with Traffic(guest):
            switch.end(signal.SIGKILL)
            assert len(wire.receive(10)) == 10
            switch.start()
            switch.wait_for_state("next0", "up")
            assert len(wire.receive(10)) == 10
        guest.wait_sent()
        assert switch.worker_pids() == workers
        assert "10.9.0.1/24" in namespace.ip("address show dev next0")
        assert namespace.link("next0")["promiscuity"] == (kind != "tap")
        assert bool(program(namespace, "next0")) == (kind == "xdp")
        assert_passes_both_ways(guest, wire)
    switch.ask("del_port", name="next0")
    if kind == "tap":
        wait_for(lambda: namespace.link("next0") is None, "the tap's end")
    else:
        assert namespace.link("next0")["promiscuity"] == 0
        assert not program(namespace, "next0")
