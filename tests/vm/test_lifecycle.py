"""How network devices, guests and QEMU itself come and go, with traffic after each."""

import re
from datetime import datetime

import pytest

from tests.vm.checks import assert_moves_a_file, assert_pings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


def assert_both_ways(one, two):
    assert_pings(one, two.machine.address.split("/")[0])
    assert_pings(two, one.machine.address.split("/")[0])


@pytest.mark.parametrize("server", [False, True], ids=["connects", "listens"])
def test_a_network_device_is_taken_out_and_put_in_while_its_guest_runs(lab, server):
    (one,) = lab.boot(lab.machine(1))
    (two,) = lab.boot(lab.machine(2, server=server, halted=True), wait=False)
    lab.wait_for_state("vm2", "waiting-for-driver")
    two.resume()
    two.wait_ready()
    assert_both_ways(one, two)

    two.unplug_device()
    lab.wait_for_state("vm2", "waiting-for-driver")
    lab.plug(two)  # on the same connection
    assert_both_ways(one, two)

    two.unplug_device()
    two.unplug_backend()
    lab.wait_for_state("vm2", "waiting-for-frontend")
    two.plug_backend()
    lab.plug(two)
    assert_both_ways(one, two)
    assert_moves_a_file(one, two)
    assert_moves_a_file(two, one)
    lab.assert_ledger_balances()


def test_the_host_chooses_the_mtu(lab):
    machines = [lab.machine(number, device="host_mtu=9000") for number in (1, 2)]
    one, two = lab.boot(*machines)
    for guest in (one, two):
        assert guest.check("cat /sys/class/net/eth0/mtu") == "9000"
    assert_pings(one, "10.77.0.2", size=8972)
    assert_pings(two, "10.77.0.1", size=8972)

    two.unplug_device()
    lab.plug(two, "host_mtu=1500")
    assert two.check("cat /sys/class/net/eth0/mtu") == "1500"
    assert_pings(one, "10.77.0.2", size=1472)
    before = lab.counters("vm2")["tx_drop_too_long"]
    one.check("ping -c 1 -W 1 -s 1500 10.77.0.2; true")
    assert lab.counters("vm2")["tx_drop_too_long"] == before + 1
    one.check("ip link set eth0 mtu 1500")
    assert_moves_a_file(one, two)  # in frames of 64 KiB that are cut later
    assert_moves_a_file(two, one)
    lab.assert_ledger_balances()


LINE = re.compile(r"(\S+ \S+),(\d+) \S+ port vm2: connected")


def connected_at(lab):
    """When the log says that a front-end was connected to last, seconds."""
    date, milliseconds = LINE.findall(lab.log)[-1]
    return datetime.fromisoformat(date).timestamp() + int(milliseconds) / 1000


def test_a_port_that_connects_finds_each_new_qemu_at_once(lab):
    one, two = lab.boot(lab.machine(1), lab.machine(2, server=True))
    for _ in range(2):
        two.kill()
        lab.wait_for_state("vm2", "waiting-for-frontend")
        (two,) = lab.boot(two.machine)
        assert_both_ways(one, two)
        appeared = two.machine.socket_path.stat().st_ctime
        waited = connected_at(lab) - appeared
        assert waited < 1.0  # 20 ms on a machine that has nothing else to do
    lab.assert_ledger_balances()
