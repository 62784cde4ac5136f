"""DPDK's virtio-user: a front-end and a driver that share no line with QEMU and Linux."""

import pytest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

FRAMES = 10_000
RECEIVER_MAC = "52:54:00:00:00:02"


def start_pair(lab, *options, mode="server", arguments=()):
    """One testpmd that sends and one that receives; the receiver has the options."""
    lab.add_port("sender")
    lab.add_port("receiver", mode=mode)
    sender = lab.testpmd(
        "sender", forward="txonly", arguments=[f"--eth-peer=0,{RECEIVER_MAC}"]
    )
    arguments = ["--total-num-mbufs=16384", *arguments]  # the largest rings twice
    receiver = lab.testpmd("receiver", *options, mac=RECEIVER_MAC, arguments=arguments)
    for name in ("sender", "receiver"):
        lab.wait_for_state(name, "up")
    return sender, receiver


def assert_frames_arrive(lab, sender, receiver):
    receiver.start()
    sender.start()
    receiver.wait_for(lambda s: s["RX-packets"] >= FRAMES)
    sender.stop()
    sent = sender.statistics()["TX-packets"]
    lab.wait_for(lambda: lab.counters("sender")["rx_frames"] == sent, f"{sent} frames")
    counted = receiver.wait_for(
        lambda s: s["RX-packets"] == lab.counters("receiver")["tx_frames"]
    )
    assert counted["RX-errors"] == 0
    assert sum(lab.counters("sender")[f"rx_{how}"] for how in ("forwarded", "flooded"))
    lab.assert_ledger_balances()


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("mrg_rxbuf=0",),
        ("in_order=0",),
        ("vectorized=1",),
        ("vectorized=1", "mrg_rxbuf=0", "in_order=0"),
        ("queue_size=64",),
        ("queue_size=1024",),
        ("queue_size=4096",),
    ],
    ids=",".join,
)
def test_frames_cross_the_switch(dpdk_lab, options):
    assert_frames_arrive(dpdk_lab, *start_pair(dpdk_lab, *options))


def test_a_testpmd_with_two_queue_pairs_uses_both(dpdk_lab):
    pairs = ["--rxq=2", "--txq=2"]
    one, two = start_pair(dpdk_lab, "queues=2", arguments=pairs)
    assert_frames_arrive(dpdk_lab, one, two)
    assert dpdk_lab.port("receiver")["queues"]["enabled"] == 2
    two.stop()
    two.ask("set fwd txonly")
    before = dpdk_lab.counters("receiver")["rx_frames"]
    two.start()  # on both queues, in turn
    two.wait_for(lambda s: s["TX-packets"] >= 10 * FRAMES)
    two.stop()
    sent = two.statistics()["TX-packets"]
    dpdk_lab.wait_for(
        lambda: dpdk_lab.counters("receiver")["rx_frames"] - before == sent,
        lambda: f"{sent} frames, there are {dpdk_lab.counters('receiver')}",
    )
    dpdk_lab.assert_ledger_balances()


def test_testpmd_may_listen_and_the_switch_connect(dpdk_lab):
    pair = start_pair(dpdk_lab, "server=1", mode="client")
    assert_frames_arrive(dpdk_lab, *pair)


def test_a_listening_testpmd_gets_the_switch_back_when_its_port_is_added_again(
    dpdk_lab,
):
    sender, receiver = start_pair(dpdk_lab, "server=1", mode="client")
    assert_frames_arrive(dpdk_lab, sender, receiver)
    dpdk_lab.ask("del_port", name="receiver")
    dpdk_lab.add_port("receiver", mode="client")
    dpdk_lab.wait_for_state("receiver", "up")
    before = receiver.statistics()["RX-packets"]
    sender.start()
    receiver.wait_for(lambda s: s["RX-packets"] >= before + FRAMES)


def test_the_next_testpmd_on_a_port_works_when_one_is_killed(dpdk_lab):
    sender, receiver = start_pair(dpdk_lab)
    receiver.kill()
    dpdk_lab.wait_for_state("receiver", "waiting-for-frontend")
    again = dpdk_lab.testpmd("receiver", mac=RECEIVER_MAC)
    dpdk_lab.wait_for_state("receiver", "up")
    again.start()
    sender.start()
    again.wait_for(lambda s: s["RX-packets"] >= FRAMES)


def test_what_testpmd_sends_back_finds_its_way(dpdk_lab):
    sender, receiver = start_pair(dpdk_lab)
    for pmd in (sender, receiver):
        pmd.ask("set fwd macswap")
    receiver.start()
    sender.ask("start tx_first")  # one burst, which then goes back and forth
    sender.wait_for(lambda s: s["RX-packets"] >= FRAMES)
    dpdk_lab.assert_ledger_balances()
