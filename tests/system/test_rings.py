"""Rings of a port: stopped, disabled, reset, of any feature, and several of them."""

import pytest

from ports.vhost.features import feature_names
from ports.vhost.messages import U64, Request
from tests.system.net import (
    SENDER,
    Stream,
    assert_flows,
    exchange_both_ways,
    frame,
)
from vswitch.guest import DEFAULT_FEATURES, GuestError

MRG, MQ, INDIRECT, EVENT_IDX = 1 << 15, 1 << 22, 1 << 28, 1 << 29
PROTOCOL_FEATURES, VERSION_1 = 1 << 30, 1 << 32
EVERYTHING = DEFAULT_FEATURES


def test_a_disabled_receive_queue_gets_nothing_until_it_is_enabled(net):
    a, b = net.pair()
    exchange_both_ways(a, b)
    b.enable(0, on=False)
    a.send_all([frame(b, a)] * 5)
    a.wait_sent()
    assert b.receive(timeout=0) == []
    b.enable(0, on=True)
    exchange_both_ways(a, b)
    assert net.switch.counters("b")["tx_drop_not_ready"] == 5


def test_what_a_disabled_transmit_queue_sends_is_dropped_until_it_is_enabled(net):
    a, b = net.pair()
    a.enable(1, on=False)
    a.send_all([frame(b, a)] * 5)
    a.wait_sent()
    a.enable(1, on=True)
    exchange_both_ways(a, b)
    assert net.switch.counters("a")["rx_drop_disabled"] == 5


def test_a_driver_may_reset_again_and_again(net):
    a, b = net.pair()
    for number in range(50):
        assert_flows(a, b, 3)
        b.send([frame(a, b, fill=number)] * 20)
        (a, b)[number % 2].reset()
        a.receive(timeout=0)
    net.switch.wait_for_state("b", "up")
    a.receive(timeout=0)
    assert_flows(a, b)


@pytest.mark.parametrize(
    "features",
    [
        EVERYTHING & ~MRG,
        EVERYTHING & ~INDIRECT,
        EVERYTHING & ~EVENT_IDX,
        EVERYTHING & ~(VERSION_1 | MRG),
        EVERYTHING & ~VERSION_1,
        EVERYTHING & ~PROTOCOL_FEATURES,
        VERSION_1 | PROTOCOL_FEATURES,
        0,
    ],
    ids=lambda mask: ",".join(feature_names(mask)) or "none",
)
@pytest.mark.parametrize("start_index", [0, 65530])
def test_guests_may_use_any_part_of_the_features(net, features, start_index):
    a = net.guest("a", features=features, start_index=start_index, **SENDER)
    b = net.guest("b", start_index=start_index, **SENDER)
    net.pin(a, b)
    with Stream((a, b), (b, a), raw=False, verify=True, length=(60, 1514)) as flow:
        flow.wait_for_more(net.switch, 3000)
        totals = flow.stop()
    assert totals.corrupt == totals.reordered == totals.duplicates == 0
    counted = sum(net.switch.counters(name)["tx_drop_ring_full"] for name in "ab")
    assert totals.sent - totals.received == counted
    negotiated = feature_names(features & ~MQ)
    assert net.switch.port("a")["features"] == negotiated


def test_a_guest_may_have_several_queue_pairs(net):
    a, b = net.guest("a", queue_pairs=4), net.guest("b")
    assert net.switch.port("a")["queues"] == {"enabled": 4, "max": 8}
    for queue in range(4):
        frames = [frame(b, a, 60 + n, queue) for n in range(30)]
        a.send_all(frames, queue)
        assert b.receive(timeout=10.0, at_least=30) == frames
    exchange_both_ways(b, a)
    for index in (6, 7):
        a.enable(index, on=False)
    assert net.switch.port("a")["queues"]["enabled"] == 3
    a.send_all(frames[:3], queue=3)
    a.wait_sent()
    exchange_both_ways(b, a)
    assert net.switch.counters("a")["rx_drop_disabled"] == 3


def test_a_port_may_allow_fewer_queue_pairs(net):
    with pytest.raises(GuestError, match="the switch allows 2"):
        net.guest("a", port={"queues": 2}, queue_pairs=3)
    net.guests.pop().close()
    net.behind(net.switch.socket("a"), queue_pairs=2).open()
    assert net.switch.port("a")["queues"] == {"enabled": 2, "max": 2}


def test_the_mtu_that_a_front_end_asks_for_limits_what_it_gets(net):
    a, b = net.guest("a"), net.guest("b")
    b.frontend.request(Request.NET_SET_MTU, U64(1000))
    frames = [frame(b, a, length) for length in (1018, 1019, 60, 1500, 1017)]
    a.send_all(frames)
    assert b.receive(timeout=10.0, at_least=3) == [frames[n] for n in (0, 2, 4)]
    net.switch.assert_copies_balance("a", "b", 5, 3)
    assert net.switch.counters("b")["tx_drop_too_long"] == 2
    assert_flows(b, a)
