"""vhost-net's control half: what has to be there, and the memory that is shared."""

import itertools

import pytest

from ports import vhost_net
from ports.burst import MAX_FRAME
from ports.vhost.virtio import NET_HDR_LEN
from ports.vhost_net_memory import LENGTH, RECEIVE, SLOT_LEN, SLOTS, TRANSMIT

EVERYTHING = sum(vhost_net._FEATURES)


@pytest.fixture
def device(tmp_path, monkeypatch):
    path = tmp_path / "vhost-net"
    monkeypatch.setattr(vhost_net, "_DEVICE", str(path))
    return path


@pytest.fixture
def zero_copy(tmp_path, monkeypatch):
    path = tmp_path / "experimental_zcopytx"
    monkeypatch.setattr(vhost_net, "_ZERO_COPY", path)
    return path


def test_a_device_that_is_not_there_is_told_how_to_get(device):
    lack = "ENOENT: there is no /dev/vhost-net (modprobe vhost_net)"
    assert vhost_net.missing() == lack
    device.touch()
    assert vhost_net.missing() == "ENOTTY: Inappropriate ioctl for device"


@pytest.mark.parametrize("bit", vhost_net._FEATURES)
def test_a_kernel_that_lacks_a_feature_is_too_old(zero_copy, bit):
    text = f"has no {vhost_net._FEATURES[bit]} .use a newer kernel"
    with pytest.raises(vhost_net.PortError, match=text):
        vhost_net._check(EVERYTHING & ~bit)


def test_a_kernel_that_does_not_copy_is_refused(zero_copy):
    vhost_net._check(EVERYTHING)
    zero_copy.write_text("0\n")
    vhost_net._check(EVERYTHING)
    zero_copy.write_text("1\n")
    with pytest.raises(vhost_net.PortError, match="experimental_zcopytx=0"):
        vhost_net._check(EVERYTHING)


def test_the_parts_of_the_memory_are_apart_and_aligned():
    parts = []
    for area in (RECEIVE, TRANSMIT):
        # virtio 1.2 §2.7
        parts += [
            (area.desc, 16 * SLOTS),
            (area.avail, 6 + 2 * SLOTS),
            (area.used, 6 + 8 * SLOTS),
            (area.slots, SLOTS * SLOT_LEN),
        ]
    ends = [begin + length for begin, length in parts]
    # A frame may begin in the last slot.
    ends[-1] += NET_HDR_LEN + MAX_FRAME - SLOT_LEN
    begins = [begin for begin, _ in parts]
    for end, begin in itertools.zip_longest(ends, begins[1:], fillvalue=LENGTH):
        assert end <= begin
    assert all(begin % 4096 == 0 for begin in begins)
    assert LENGTH % 4096 == 0
