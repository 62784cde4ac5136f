"""DPDK's virtio-user: a front-end and a driver that share no line with QEMU and Linux."""

from collections import Counter
from pathlib import Path

import pytest

from tests import requirements
from tests.switch import remove_directory, short_directory
from tests.vm.lab import Lab
from tests.vm.testpmd import TESTPMD

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

FRAMES = 10_000
SENDER_MAC, RECEIVER_MAC = "52:54:00:00:00:01", "52:54:00:00:00:02"
TO_RECEIVER, TO_SENDER = (f"--eth-peer=0,{mac}" for mac in (RECEIVER_MAC, SENDER_MAC))

# DPDK's vectors for packed rings are those of AVX-512, or are not taken.
VECTORS = "vectorized" if "avx512f" in Path("/proc/cpuinfo").read_text() else "standard"


def start_sender(lab):
    lab.add_port("sender")
    sender = lab.testpmd(
        "sender", mac=SENDER_MAC, forward="txonly", arguments=[TO_RECEIVER]
    )
    lab.wait_for_state("sender", "up")
    return sender


def start_receiver(lab, *options, arguments=()):
    """A testpmd with options of its own; its port is there."""
    largest = "--total-num-mbufs=16384"  # the largest rings twice
    receiver = lab.testpmd(
        "receiver",
        *options,
        mac=RECEIVER_MAC,
        arguments=[TO_SENDER, largest, *arguments],
    )
    lab.wait_for_state("receiver", "up")
    return receiver


def assert_frames_arrive(lab, sender, receiver):
    """Send frames one way and compare what three parties counted."""

    def counted():
        """How many the sender sent and the switch took, gave and the receiver got."""
        took, gave = lab.counters(sender.name), lab.counters(receiver.name)
        sent, got = sender.statistics(), receiver.statistics()
        assert got["RX-errors"] == 0
        return Counter(
            sent=sent["TX-packets"],
            took=took["rx_frames"],
            gave=gave["tx_frames"],
            got=got["RX-packets"],
        )

    before = counted()
    receiver.start()
    sender.start()
    receiver.wait_for(lambda s: s["RX-packets"] >= before["got"] + FRAMES)
    sender.stop()

    def agree():
        now = counted() - before
        return now["sent"] == now["took"] and now["gave"] == now["got"]

    lab.wait_for(agree, lambda: f"equal numbers: {counted()} after {before}")
    receiver.stop()
    lab.assert_ledger_balances()


def assert_frames_arrive_both_ways(lab, sender, receiver):
    assert_frames_arrive(lab, sender, receiver)
    sender.ask("set fwd rxonly")
    receiver.ask("set fwd txonly")
    assert_frames_arrive(lab, receiver, sender)
    sender.ask("set fwd txonly")


@pytest.fixture(scope="module")
def sending():
    """A switch and a testpmd that sends, for many others to receive."""
    requirements.require_command(TESTPMD, "dpdk-dev")
    directory = short_directory()
    with Lab(directory) as lab:
        yield lab, start_sender(lab)
    remove_directory(directory)


@pytest.fixture
def port(sending):
    """The receiver's port, which listens."""
    lab, _ = sending
    lab.add_port("receiver")
    yield
    lab.ask("del_port", name="receiver")


@pytest.fixture
def connecting_port(sending):
    """The receiver's port, which connects to a testpmd that listens."""
    lab, _ = sending
    lab.add_port("receiver", mode="client")
    yield
    lab.ask("del_port", name="receiver")
    lab.socket("receiver").unlink(missing_ok=True)  # DPDK leaves it when it is killed


@pytest.fixture
def receiver(sending, port, request):
    """A testpmd with the options of the test's first parameter."""
    lab, _ = sending
    with start_receiver(lab, *request.param) as pmd:
        yield pmd


@pytest.mark.parametrize(
    ("receiver", "rx", "tx"),
    [
        ((), "inorder", "inorder"),
        (("mrg_rxbuf=0",), "inorder", "inorder"),
        (("in_order=0",), "mergeable buffer", "standard"),
        (("in_order=0", "mrg_rxbuf=0"), "standard", "standard"),
        (("in_order=0", "mrg_rxbuf=0", "vectorized=1"), "vectorized", "standard"),
        (("packed_vq=1",), "mergeable buffer", "standard"),
        (("packed_vq=1", "mrg_rxbuf=0"), "standard", "standard"),
        (("packed_vq=1", "in_order=0"), "mergeable buffer", "standard"),
        (("packed_vq=1", "in_order=0", "mrg_rxbuf=0"), "standard", "standard"),
        (("packed_vq=1", "vectorized=1"), "mergeable buffer", VECTORS),
        (("packed_vq=1", "vectorized=1", "mrg_rxbuf=0"), VECTORS, VECTORS),
    ],
    indirect=["receiver"],
    ids=str,
)
def test_frames_cross_the_switch_on_every_path(sending, receiver, rx, tx, request):
    lab, sender = sending
    packed = "ring_packed" in lab.port("receiver")["features"]
    assert packed == ("packed_vq=1" in request.node.callspec.params["receiver"])
    ring = "packed ring " if packed else ""
    assert f"using {ring}{rx} Rx path" in receiver.banner
    assert f"using {ring}{tx} Tx path" in receiver.banner
    assert_frames_arrive_both_ways(lab, sender, receiver)


@pytest.mark.parametrize(
    "receiver",
    [
        ("queue_size=64",),
        ("queue_size=64", "in_order=0", "mrg_rxbuf=0", "vectorized=1"),
        ("queue_size=512",),
        ("queue_size=1024",),
        ("queue_size=4096",),
        ("queue_size=64", "packed_vq=1"),
        ("queue_size=96", "packed_vq=1", "in_order=0"),  # no power of two
        ("queue_size=1024", "packed_vq=1", "vectorized=1", "mrg_rxbuf=0"),
        ("queue_size=4096", "packed_vq=1"),
    ],
    indirect=True,
    ids=str,
)
def test_frames_cross_the_switch_in_rings_of_every_size(sending, receiver):
    lab, sender = sending
    assert_frames_arrive_both_ways(lab, sender, receiver)


@pytest.mark.parametrize("pairs", [2, 4, 8])
@pytest.mark.parametrize("ring", [(), ("packed_vq=1",)], ids=["split", "packed"])
@pytest.mark.usefixtures("port")
def test_a_testpmd_uses_all_its_queue_pairs(sending, pairs, ring):
    lab, sender = sending
    queues = [f"--rxq={pairs}", f"--txq={pairs}"]
    with start_receiver(lab, f"queues={pairs}", *ring, arguments=queues) as receiver:
        lab.wait_for_port("receiver", lambda port: port["queues"]["enabled"] == pairs)
        assert_frames_arrive_both_ways(lab, sender, receiver)  # sends on each, in turn


@pytest.mark.usefixtures("port")
def test_the_next_testpmd_on_a_port_works_when_one_is_killed(sending):
    lab, sender = sending
    with start_receiver(lab) as receiver:
        receiver.start()
        receiver.kill()
    lab.wait_for_state("receiver", "waiting-for-frontend")
    with start_receiver(lab) as receiver:
        assert_frames_arrive(lab, sender, receiver)


@pytest.mark.parametrize("ring", [(), ("packed_vq=1",)], ids=["split", "packed"])
@pytest.mark.usefixtures("connecting_port")
def test_testpmd_may_listen_and_the_switch_connect(sending, ring):
    lab, sender = sending
    with start_receiver(lab, "server=1", *ring) as receiver:
        assert_frames_arrive(lab, sender, receiver)
        receiver.kill()
    lab.wait_for_state("receiver", "waiting-for-frontend")
    lab.socket("receiver").unlink()  # DPDK does not listen where a file is
    with start_receiver(lab, "server=1", *ring) as receiver:
        assert_frames_arrive(lab, sender, receiver)


@pytest.mark.parametrize("ring", [(), ("packed_vq=1",)], ids=["split", "packed"])
@pytest.mark.usefixtures("connecting_port")
def test_a_listening_testpmd_gets_the_switch_back_when_its_port_is_added_again(
    sending, ring
):
    lab, sender = sending
    with start_receiver(lab, "server=1", *ring) as receiver:
        assert_frames_arrive(lab, sender, receiver)
        if not ring:
            receiver.start()  # and so it stays
        # DPDK sets packed rings up anew, and gives a thread that is in the middle of one
        # a millisecond to leave it (virtio_user_reset_queues_packed): let none be there.
        lab.ask("del_port", name="receiver")
        lab.add_port("receiver", mode="client")
        lab.wait_for_state("receiver", "up")
        assert_frames_arrive(lab, sender, receiver)


def test_what_testpmd_sends_back_finds_its_way(dpdk_lab):
    dpdk_lab.add_port("receiver")
    pair = start_sender(dpdk_lab), start_receiver(dpdk_lab)
    for pmd in pair:
        pmd.ask("set fwd macswap")
    sender, receiver = pair
    receiver.start()
    sender.ask("start tx_first")  # one burst, which then goes back and forth
    sender.wait_for(lambda s: s["RX-packets"] >= FRAMES)
    dpdk_lab.assert_ledger_balances()
