"""Linux's own segmentation and checksums, with every mix of who can and who cannot."""

import itertools

import pytest

from tests.vm.checks import (
    assert_moves_a_file,
    assert_moves_a_file_from_the_host,
    assert_moves_a_file_to_the_host,
    assert_pings,
)

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

SUPER_FRAME = 3_000  # bytes a frame on average; an ordinary one has 1514 at most


def bytes_per_frame(lab, name, since=None):
    """Of the frames that came from a port, since it had the given counters."""
    port, since = lab.counters(name), since or {"rx_bytes": 0, "rx_frames": 0}
    return (port["rx_bytes"] - since["rx_bytes"]) / (
        port["rx_frames"] - since["rx_frames"]
    )


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


@pytest.mark.parametrize("offloads", [True, False])
def test_super_frames_pass_between_a_guest_and_the_host(
    uplink_lab, namespace, offloads
):
    uplink_lab.add_port("uplink0", "tap:uplink0")
    namespace.run("ip", "address", "add", "10.77.0.254/24", "dev", "uplink0")
    (guest,) = uplink_lab.boot(uplink_lab.machine(1, offloads=offloads))
    assert_moves_a_file_to_the_host(guest, namespace)
    to_host = bytes_per_frame(uplink_lab, "vm1")
    assert (to_host > SUPER_FRAME) == offloads
    assert uplink_lab.counters("uplink0")["tx_gso_split"] == 0
    before = uplink_lab.counters("uplink0")
    assert_moves_a_file_from_the_host(guest, namespace)
    assert bytes_per_frame(uplink_lab, "uplink0", before) > SUPER_FRAME
    assert (uplink_lab.counters("vm1")["tx_gso_split"] > 0) != offloads
    uplink_lab.assert_ledger_balances()
