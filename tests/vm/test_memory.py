"""Memory that comes and goes under a running guest."""

import pytest

from tests.vm.checks import assert_moves_a_file, assert_pings
from vswitch import shared

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

BLOCKS = "/sys/devices/system/memory"
FREE = "sed -n 's/MemFree: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"


def regions(lab, slot):
    """Rows of a port's memory table."""
    return int(shared.attach(lab.run_dir).ports[slot]["regions"]) & 0xFF


def test_a_guest_gets_more_memory_under_traffic_and_gives_it_back(lab):
    one, two = lab.boot(lab.machine(1, slots=2), lab.machine(2))
    assert_pings(one, "10.77.0.2")
    before, blocks = regions(lab, 0), set(one.check(f"ls {BLOCKS}").split())
    two.check("ping -i 0.05 10.77.0.1 > /tmp/ping & echo $! > /tmp/pinger")
    one.plug_memory("dimm0", 128)
    lab.wait_for(lambda: regions(lab, 0) == before + 1, "a region more")
    new = lab.wait_for(
        lambda: set(one.check(f"ls {BLOCKS}").split()) - blocks,
        lambda: f"memory in the guest; it said {one.check('dmesg | tail -5')}",
    )
    for block in sorted(new):
        # Only for what can be moved away again.
        one.check(f"echo online_movable > {BLOCKS}/{block}/state")
    assert int(one.check(FREE)) > 128 << 10
    assert_moves_a_file(two, one)
    assert_moves_a_file(one, two)
    one.check("rm -f /tmp/blob; echo 3 > /proc/sys/vm/drop_caches")
    for block in sorted(new):
        one.check(f"echo offline > {BLOCKS}/{block}/state")
    one.unplug_memory("dimm0")
    lab.wait_for(lambda: regions(lab, 0) == before, "as many regions as before")
    assert_pings(one, "10.77.0.2")
    two.check("kill $(cat /tmp/pinger)")
    lost = two.check(
        'awk \'/seq=/ { split($5, s, "="); if (NR > 2 && s[2] != n + 1) '
        "print s[2] - n - 1; n = s[2] }' /tmp/ping"
    )
    assert not lost
    assert_moves_a_file(two, one)
    lab.assert_ledger_balances()
