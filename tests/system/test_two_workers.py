"""Two workers: guests spread over them, and nothing is lost between."""

import pytest

from ports.base import RING_RUNNING, RX
from tests.switch import Switch, dropped, remove_directory, short_directory
from tests.system.net import ALL_CPUS, RECEIVER, SENDER, Stream
from vswitch import shared


@pytest.fixture(scope="module")
def switch():
    directory = short_directory()
    with Switch(directory, "--workers", 2, "--cpus", ALL_CPUS) as it:
        it.wait_for_workers(2, 1)
        yield it
    remove_directory(directory)


def owners(switch):
    """Which workers poll which guest's transmit queues, by port slot."""
    rings = shared.attach(switch.run_dir).rings[RX::2]
    running = rings[rings["state"] == RING_RUNNING]
    return {
        int(slot): running["owner"][running["port"] == slot].tolist()
        for slot in set(running["port"].tolist())
    }


def assert_all_accounted(net, totals, names):
    """Nothing out of order, twice or damaged; what is missing was counted."""
    assert (totals.reordered, totals.duplicates) == (0, 0)
    assert (totals.corrupt, totals.foreign) == (0, 0)

    def balance():
        ports = [net.switch.counters(name) for name in names]
        counted = sum(dropped(port, way) for port in ports for way in ("rx", "tx"))
        return (
            (totals.sent, sum(port["rx_frames"] for port in ports)),
            (totals.received, sum(port["tx_frames"] for port in ports)),
            (totals.sent - totals.received, counted),
        )

    net.switch.wait_for(lambda: all(a == b for a, b in balance()), balance)


def test_guests_are_spread_over_the_workers(net):
    for name in "abcd":
        net.guest(name)
    assert owners(net.switch) == {0: [0], 1: [1], 2: [0], 3: [1]}
    for name in "ac":
        net.switch.ask("del_port", name=name)
    for name in "ef":
        net.guest(name)
    assert owners(net.switch) == {0: [0], 1: [1], 2: [0], 3: [1]}


def test_the_pairs_of_one_guest_are_spread_over_the_workers(net):
    net.guest("a", queue_pairs=4)
    assert owners(net.switch) == {0: [0, 1, 0, 1]}


@pytest.mark.parametrize("options", [{}, {"raw": False, "verify": True}], ids=str)
def test_streams_in_both_directions_lose_nothing_that_is_not_counted(net, options):
    a, b = net.guest("a", **SENDER), net.guest("b", **SENDER)
    net.pin(a, b)
    if "verify" in options:
        options |= {"length": (60, 1514)}
    with Stream((a, b), (b, a), **options) as flow:
        flow.wait_for_more(net.switch, 200_000 if not options else 50_000)
        totals = flow.stop()
    assert_all_accounted(net, totals, "ab")


def test_three_senders_share_one_receivers_ring(net):
    receiver = net.guest("r", **RECEIVER)
    senders = [net.guest(name, **SENDER) for name in "abc"]
    net.pin(receiver)
    assert {0, 1} == {owner for (owner,) in owners(net.switch).values()}
    with Stream(*((sender, receiver) for sender in senders)) as flow:
        flow.wait_for_more(net.switch, 100_000)
        totals = flow.stop()
    assert_all_accounted(net, totals, "rabc")


def test_a_receiver_with_a_ring_for_each_worker_sees_every_flow_in_order(net):
    # By these addresses the flows fall to both rings.
    receiver = net.guest("r", mac="02:00:00:00:00:0f", queue_pairs=2, **RECEIVER)
    senders = [
        net.guest(name, mac=f"02:00:00:00:00:0{n}", **SENDER)
        for n, name in enumerate("abc", start=1)
    ]
    net.pin(receiver)
    flows = ((sender, receiver) for sender in senders)
    with Stream(*flows, queues=2) as flow:
        flow.wait_for_more(net.switch, 100_000)
        totals = flow.stop()
    assert all(sink.record["frames"] for sink in flow.sinks)
    assert_all_accounted(net, totals, "rabc")


def test_everybody_sends_to_everybody(net):
    guests = [net.guest(name, **SENDER) for name in "abcd"]
    net.pin(*guests)
    flows = [(a, b) for a in guests for b in guests if a is not b]
    with Stream(*flows, raw=False, verify=True, length=300) as flow:
        flow.wait_for_more(net.switch, 10_000)
        totals = flow.stop()
    assert_all_accounted(net, totals, "abcd")
