"""Packed rings, as Linux's driver and DPDK's use them."""

import pytest

from tests.vm.checks import assert_moves_a_file, assert_pings
from tests.vm.test_dpdk import assert_frames_arrive, start_pair

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


def test_two_linux_guests_with_packed_rings(lab):
    machines = [lab.machine(number, packed=True) for number in (1, 2)]
    one, two = lab.boot(*machines)
    for name in ("vm1", "vm2"):
        assert "ring_packed" in lab.port(name)["features"]
    assert_pings(one, "10.77.0.2")
    assert_moves_a_file(two, one)
    one.pause()
    one.resume()
    assert_pings(one, "10.77.0.2")
    two.reset()
    two.wait_ready()
    assert_pings(one, "10.77.0.2")
    lab.assert_ledger_balances()


def test_a_packed_and_a_split_guest_talk(lab):
    one, two = lab.boot(lab.machine(1, packed=True), lab.machine(2))
    assert_pings(one, "10.77.0.2")
    assert_moves_a_file(one, two)
    assert_moves_a_file(two, one)


@pytest.mark.parametrize(
    "options",
    [
        ("packed_vq=1",),
        ("packed_vq=1", "mrg_rxbuf=0"),
        ("packed_vq=1", "in_order=0"),
        ("packed_vq=1", "in_order=0", "mrg_rxbuf=0"),
        ("packed_vq=1", "vectorized=1"),
        ("packed_vq=1", "queue_size=1024"),
    ],
    ids=str,
)
def test_frames_cross_the_switch_to_dpdk(dpdk_lab, options):
    pair = start_pair(dpdk_lab, *options)
    assert "ring_packed" in dpdk_lab.port("receiver")["features"]
    assert_frames_arrive(dpdk_lab, *pair)
