"""Front-ends come in any order of messages and go at any moment."""

import dataclasses
import itertools

import pytest

from ports.vhost.messages import MemTable
from tests.system.net import (
    RECEIVER,
    SENDER,
    Stream,
    assert_footprint,
    exchange_both_ways,
    footprint,
)
from tests.system.quitter import quit_after
from vswitch.guest import DEFAULT_FEATURES
from vswitch.guest.frontend import DEFAULT_ORDER, Frontend

MQ = 1 << 22


@pytest.mark.parametrize("mode", ["client", "server"])
def test_a_guest_comes_and_goes_on_a_port_that_listens_or_connects(net, mode):
    a, b = net.guest("a"), net.guest("b", mode=mode)
    for _ in range(20):
        exchange_both_ways(a, b)
        b.disconnect()
        b.open()
        net.switch.wait_for_state("b", "up")
    b.disconnect()
    # A port that connects is at the guest's socket again at once.
    net.switch.wait_for_port("b", lambda port: port["state"] != "up")


def test_a_port_that_connects_waits_until_somebody_listens(net):
    path = net.add_port("b", mode="client")
    reason = net.switch.wait_for_port("b", lambda port: "ENOENT" in port["reason"])
    assert reason["state"] == "waiting-for-frontend"
    b = net.behind(path, mode="server")
    b.open()
    exchange_both_ways(net.guest("a"), b)


def test_ports_removed_while_a_front_end_sets_up_leak_nothing(net):
    a = net.guest("a")
    before = footprint(net.switch)
    for messages in range(21):
        path = net.add_port("b")
        b = net.behind(path, ack=False)
        quit_after(b, path, messages, 0, ack=False)
        net.switch.ask("del_port", name="b")
        net.forget(b)
    assert_footprint(net.switch, before)
    exchange_both_ways(a, net.guest("b"))


def test_a_front_end_that_goes_away_under_traffic_finds_its_place_again(net):
    a, b = net.pair()
    with Stream((a, b)) as flow:
        for _ in range(10):
            flow.wait_for_more(net.switch)
            b.disconnect()
            net.switch.wait_for_state("b", "waiting-for-frontend")
            b.open()
        flow.wait_for_more(net.switch)
        totals = flow.stop()
    assert (totals.reordered, totals.duplicates, totals.foreign) == (0, 0, 0)
    net.switch.assert_copies_balance("a", "b", totals.sent, totals.received)


def test_a_sender_can_be_removed_while_others_flow_without_loss(net):
    a, b = net.pair()
    with Stream((a, b)) as undisturbed:
        for _ in range(5):
            ends = net.guest("sender", **SENDER), net.guest("receiver", **RECEIVER)
            net.pin(*ends)
            with Stream(ends) as other:
                other.wait_for_more(net.switch)
                net.switch.ask("del_port", name="sender")
                undisturbed.wait_for_more(net.switch)
            net.switch.ask("del_port", name="receiver")
        totals = undisturbed.stop()
    assert totals.clean
    net.switch.assert_copies_balance("a", "b", totals.sent, totals.received)


def test_a_receiver_can_be_removed_while_others_flow_in_order(net):
    a, b = net.pair()
    with Stream((a, b)) as undisturbed:
        for _ in range(5):
            ends = net.guest("sender", **SENDER), net.guest("receiver", **RECEIVER)
            net.pin(*ends)
            with Stream(ends, first=7) as other:
                other.wait_for_more(net.switch)
                net.switch.ask("del_port", name="receiver")
                # What nobody is known for is flooded, to b too.
                undisturbed.wait_for_more(net.switch)
            net.switch.ask("del_port", name="sender")
        totals = undisturbed.stop()
    assert totals.foreign > 0
    assert (totals.reordered, totals.duplicates, totals.corrupt) == (0, 0, 0)
    lost = totals.sent - totals.received
    assert 0 <= lost <= net.switch.counters("b")["tx_drop_ring_full"]


def test_a_region_may_begin_in_the_middle_of_a_page_of_its_file(net):
    a, b = net.guest("a"), net.prepared("b")
    b.memory.allocate(0x1800)  # nothing of it is told
    (whole,) = b.memory.table.regions
    begins = dataclasses.replace(
        whole,
        gpa=whole.gpa + 0x1800,
        size=whole.size - 0x1800,
        frontend_va=whole.frontend_va + 0x1800,
        mmap_offset=0x1800,
    )
    b.memory.table = MemTable((begins,))
    b.open()
    exchange_both_ways(a, b)


def test_ring_messages_may_come_in_every_order(net):
    a, path = net.guest("a"), net.add_port("b")
    for number, order in enumerate(itertools.permutations(DEFAULT_ORDER)):
        b = net.behind(path, order=order, memory_first=bool(number % 2))
        b.open()
        exchange_both_ways(a, b)
        net.forget(b)


def test_memory_may_come_after_the_rings(net):
    a, b = net.guest("a"), net.prepared("b")
    b.frontend = Frontend.connect(net.switch.socket("b"))
    b.frontend.negotiate(DEFAULT_FEATURES & ~MQ)
    b._lay_out(b.features)
    b.start()
    assert net.switch.port("b")["state"] == "waiting-for-driver"
    b.frontend.set_memory(b.memory.table, [b.memory.fd])
    exchange_both_ways(a, b)
