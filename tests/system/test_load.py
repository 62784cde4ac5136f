"""Many ports, and ports that come and go; the long run is `make soak`."""

import time

from tests.system.load import SMALL, come_and_go, connect_and_hang_up
from tests.system.net import (
    BROADCAST,
    RECEIVER,
    SENDER,
    Stream,
    exchange_both_ways,
    frame,
)

PORTS = 128
ANSWER_S = 1.0
SECONDS = 5
CYCLES = 200


def test_ports_come_and_go_and_others_lose_no_frame(net):
    rounds, totals = come_and_go(net, SECONDS)
    assert rounds >= 10
    assert totals.received > 10_000


def test_front_ends_come_and_go_and_leave_nothing_behind(net):
    connect_and_hang_up(net, CYCLES)


def test_of_128_ports_most_may_be_idle(net):
    senders = [net.guest(name, **SENDER) for name in ("s0", "s1")]
    receivers = [net.guest(name, **RECEIVER) for name in ("r0", "r1")]
    idle = [net.guest(f"i{n}", **SMALL) for n in range(PORTS - 4)]
    net.pin(*net.guests)
    with Stream(*zip(senders, receivers, strict=True)) as stream:
        stream.wait_for_more(net.switch, 50_000)
        ports = answer(net, "show")["ports"]
        counters = answer(net, "stats")["ports"]
        totals = stream.stop()
    assert totals.clean, totals
    assert [port["state"] for port in ports] == ["up"] * PORTS
    assert all(counters[f"s{n}"]["rx_frames"] >= 50_000 for n in range(2))
    first, *_, last = idle
    exchange_both_ways(first, last)
    call = frame(BROADCAST, first)
    first.send_all(call)
    for guest in (*senders, *receivers, *idle[1:]):
        assert guest.receive(timeout=10.0) == [call]


def answer(net, command):
    """What the manager says, in time."""
    begin = time.monotonic()
    said = net.switch.ask(command)
    assert time.monotonic() - begin < ANSWER_S
    return said
