"""Packed rings, as Linux's driver uses them."""

import pytest

from tests.vm.checks import assert_moves_a_file, assert_pings

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
