"""Frames that a guest receives. Checklist 60 to 65."""

import pytest

from ports.vhost import virtio
from tests.conformance.hand import PROTOCOL_FEATURES
from tests.datapath.rings import INDIRECT, NEXT, WRITE
from tests.system.net import frame

STATION = b"\x02\x00\x00\x00\x00\x0a"
NOWHERE = 1 << 60
BUFFERS = 0x40000  # where `post` puts them
MODERN = PROTOCOL_FEATURES | virtio.F_VERSION_1


def known(net, **options):
    """A guest by hand at STATION, so that frames to it are nobody else's."""
    guest = net.by_hand("a", **options)
    net.switch.ask("fdb_add", mac=STATION.hex(":"), ifname="a")
    return guest


def send(net, *lengths):
    """Let a witness send frames to the station; them."""
    sender = net.witnesses[0]
    frames = [frame(STATION, sender, length, n) for n, length in enumerate(lengths)]
    sender.send_all(frames)
    sender.wait_sent()
    return frames


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_60_a_frame_fills_its_buffers_and_they_appear_together(net, packed):
    """[VIRTIO]"""
    guest = known(net, packed=packed, size=64)
    for number in range(100):
        guest.post(8, length=300)
        count = 2 + number % 7
        length = 300 * count - 12 - number % 50
        (wanted,) = send(net, length)
        while not (seen := guest.rx.reap()):
            pass
        back = [(head, written) for head, written, *_ in seen]
        assert [head for head, _ in back] == [*range(count)]
        assert [written for _, written in back[:-1]] == [300] * (count - 1)
        data = b"".join(guest.buffer(*one, size=300) for one in back)
        assert data == bytes(10) + count.to_bytes(2, "little") + wanted
        if count < 8:  # the rest, so that heads are free again
            send(net, 300 * (8 - count) - 12)
            assert len(guest.rx.wait_back(8 - count)) == 8 - count


def test_61_without_merging_a_frame_has_one_buffer_or_none(net):
    """[VIRTIO]"""
    guest = known(net, features=MODERN)
    guest.post(3, length=512)
    _, fits, _, last = send(net, 501, 500, 9000, 60)
    back = guest.rx.wait_back(2)
    assert back == [(0, 512), (1, 72)]  # what did not fit has cost none
    for (head, length), wanted in zip(back, (fits, last), strict=True):
        data = guest.buffer(head, length, size=512)
        assert data == bytes(10) + b"\1\0" + wanted
    net.wait_for_count("a", "tx_drop_too_long", 2)


def test_62_a_legacy_header_without_merging_has_10_bytes(net):
    """[VIRTIO]"""
    guest = known(net, features=PROTOCOL_FEATURES, header_len=10)
    guest.post(3)
    frames = send(net, 60, 1514, 301)
    back = guest.rx.wait_back(3)
    assert back == [(n, 10 + len(one)) for n, one in enumerate(frames)]
    for (head, length), wanted in zip(back, frames, strict=True):
        assert guest.buffer(head, length) == bytes(10) + wanted


def test_63_a_ring_without_buffers_costs_its_frames_and_no_time(net):
    """[INF]"""
    guest = known(net)
    for _ in range(10):
        send(net, *[60] * 100)
    net.wait_for_count("a", "tx_drop_ring_full", 1000)
    net.assert_undisturbed()
    number = str(net.switch.workers("active")[0]["id"])

    def worker():
        return net.switch.ask("stats")["workers"][number]

    def slept():  # from one timer to another, nothing but timers
        before = worker()["wakeups"]
        net.switch.wait_for(lambda: worker()["wakeups"] > before, "a wake-up")
        return worker()

    net.switch.wait_for(
        lambda: net.switch.workers("active")[0]["state"] == "sleeping", "sleep"
    )
    one, two = slept(), slept()
    assert two["turns"] - one["turns"] < 20 * (two["wakeups"] - one["wakeups"])
    guest.post(1)
    (wanted,) = send(net, 100)
    ((head, length),) = guest.rx.wait_back()
    assert guest.buffer(head, length)[12:] == wanted


@pytest.mark.parametrize(
    "chain",
    [
        [("good", 100, 0, 0)],
        [("good", 100, WRITE | NEXT, 1), ("good", 100, 0, 0)],
        [("good", 100, NEXT, 1), ("good", 100, WRITE, 0)],
        [(NOWHERE, 100, WRITE, 0)],
        [("good", 100, WRITE | NEXT, 0)],
        [("good", 4, WRITE, 0)],
        [("good", 0, WRITE, 0)],
        [("good", 32, WRITE | INDIRECT, 0)],
    ],
    ids=[
        *("readable", "half readable", "readable first", "nowhere", "loop"),
        *("small", "empty", "indirect"),
    ],
)
def test_64_a_chain_that_cannot_be_written_never_is(net, chain):
    """It is given back as it was. [VIRTIO]"""
    guest = known(net)
    pattern = b"\xee" * 0x1000
    gpa = guest.put(BUFFERS, pattern)
    for n, (addr, *rest) in enumerate(chain):
        guest.rx.describe(n, gpa if addr == "good" else addr, *rest)
    guest.rx.offer(0)
    send(net, 60)
    assert guest.rx.wait_back() == [(0, 0)]
    assert guest.read(BUFFERS, 0x1000) == pattern
    net.wait_for_count("a", "tx_drop_bad_chain", 1)
    guest.post(1)
    (wanted,) = send(net, 60)
    assert guest.rx.wait_back() == [(0, 72)]
    assert guest.buffer(0, 72)[12:] == wanted


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_65_bytes_behind_a_frame_stay_as_they_were(net, packed):
    """[VIRTIO]"""
    guest = known(net, packed=packed, size=64)
    room = 300
    for length in (*range(14, 80), 287, 288, 289, 300, 1000, 1500):
        guest.write(BUFFERS, b"\xee" * 0x4000)
        buffers = -(-(length + 12) // room)
        guest.post(buffers, length=room)
        (wanted,) = send(net, length)
        back = guest.rx.wait_back(buffers)
        head = bytes(10) + buffers.to_bytes(2, "little")
        data = (head + wanted).ljust(0x4000, b"\xee")
        assert [written for _, written, *_ in back] == [
            min(room, length + 12 - room * n) for n in range(buffers)
        ]
        assert guest.read(BUFFERS, 0x4000) == data
