"""Linux's own segmentation and checksums, with every mix of who can and who cannot."""

import itertools

import pytest

from tests.vm.checks import assert_moves_a_file, assert_pings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

SUPER_FRAME = 10_000  # bytes a frame on average, if most are super-frames


def bytes_per_frame(lab, name):
    port = lab.counters(name)
    return port["rx_bytes"] / port["rx_frames"]


def test_super_frames_pass_between_guests_that_can(lab):
    one, two = lab.boot(lab.machine(1), lab.machine(2))
    assert_moves_a_file(two, one)
    assert bytes_per_frame(lab, "vm2") > SUPER_FRAME
    assert lab.counters("vm1")["tx_gso_split"] == 0
    lab.assert_ledger_balances()


@pytest.mark.parametrize("packed", [False, True])
def test_who_cannot_gets_segments_and_whole_checksums(lab, packed):
    able, unable = lab.boot(
        lab.machine(1, packed=packed), lab.machine(2, offloads=False)
    )
    assert "guest_tso4" not in lab.port("vm2")["features"]
    for source, target in itertools.permutations((able, unable)):
        assert_pings(source, target.machine.address.split("/")[0])
        assert_moves_a_file(source, target)
    assert bytes_per_frame(lab, "vm1") > SUPER_FRAME
    assert lab.counters("vm2")["tx_gso_split"] > 0
    assert lab.counters("vm2")["tx_csum_completed"] > 0
    assert lab.counters("vm1")["tx_gso_split"] == 0
    lab.assert_ledger_balances()
