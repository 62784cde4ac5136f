"""What Linux's driver may negotiate or lack: header, ring and buffers differ each time."""

import itertools

import pytest

from tests.switch import remove_directory, short_directory
from tests.vm.checks import assert_moves_a_file, assert_pings
from tests.vm.lab import Lab
from vswitch.demo.qemu import NO_OFFLOADS

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

LEGACY = "disable-modern=on,disable-legacy=off"


@pytest.fixture(scope="module")
def booted(guest_image):
    """One boot for all: a plain guest, and one whose network device is exchanged."""
    directory = short_directory()
    with Lab(directory, guest_image) as lab:
        yield lab, *lab.boot(lab.machine(1), lab.machine(2))
    remove_directory(directory)


@pytest.mark.parametrize(
    "device",
    [
        f"{LEGACY}",  # a header of 12 bytes
        f"{LEGACY},mrg_rxbuf=off",  # of 10, and buffers for 64 KiB
        f"{LEGACY},mrg_rxbuf=off,{NO_OFFLOADS}",  # of 10, and small buffers
        f"{LEGACY},any_layout=off,indirect_desc=off",  # alone in its descriptor
        f"{LEGACY},mrg_rxbuf=off,any_layout=off,indirect_desc=off,event_idx=off",
        "mrg_rxbuf=off,indirect_desc=off",
        "mrg_rxbuf=off,event_idx=off",
        f"mrg_rxbuf=off,{NO_OFFLOADS}",
        "packed=on,mrg_rxbuf=off,indirect_desc=off",
        "packed=on,event_idx=off",
    ],
    ids=lambda device: device.replace(NO_OFFLOADS, "plain"),
)
def test_a_driver_talks_whatever_it_lacks(booted, device):
    lab, plain, guest = booted
    guest.unplug_device()
    lab.plug(guest, device)
    features = lab.port("vm2")["features"]
    for name, _, value in (part.partition("=") for part in device.split(",")):
        if name in {"mrg_rxbuf", "any_layout", "indirect_desc", "event_idx"}:
            assert value == "off"
            assert name not in features
    assert ("version_1" in features) == (LEGACY not in device)
    assert ("ring_packed" in features) == ("packed=on" in device)
    assert ("guest_tso4" in features) == (NO_OFFLOADS not in device)
    for source, target in itertools.permutations((plain, guest)):
        assert_pings(source, target.machine.address.split("/")[0])
        assert_moves_a_file(source, target)
    lab.assert_ledger_balances()
