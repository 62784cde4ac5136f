"""Every length and every shape of chains: frames arrive as they were sent."""

import pytest

from tests.switch import dropped
from tests.system.net import assert_flows, frame, transfer
from vswitch.guest import DEFAULT_FEATURES, Shape

MRG, INDIRECT = 1 << 15, 1 << 28
LENGTHS = [*range(14, 130), *range(1500, 1530), 2034, 2036, 4096, 9000, 9216]
LONGEST = 65535 + 18

ONE_BYTE_EACH = Shape(pieces=62, indirect=True)


def frames_of(lengths, receiver, sender):
    return [frame(receiver, sender, length, n) for n, length in enumerate(lengths)]


def test_every_length_up_to_jumbo_frames_arrives_in_merged_buffers(net):
    a = net.guest("a", tx_buffer_len=9300)
    b = net.guest("b", rx_buffer_len=256, queue_size=512)
    frames = frames_of(range(14, 9217), b, a)
    assert transfer(a, b, frames) == frames
    net.switch.assert_copies_balance("a", "b", len(frames), len(frames))


@pytest.mark.parametrize(("buffer_len", "queue_size"), [(2048, 64), (300, 1024)])
def test_frames_of_64_kib_arrive_in_merged_buffers(net, buffer_len, queue_size):
    a = net.guest("a", tx_buffer_len=LONGEST + 12, queue_size=8)
    b = net.guest("b", rx_buffer_len=buffer_len, queue_size=queue_size)
    frames = frames_of([LONGEST, 14, 65536, LONGEST], b, a)
    assert transfer(a, b, frames) == frames


@pytest.mark.parametrize(
    "shape",
    [
        Shape(header_apart=True),
        Shape(pieces=3),
        Shape(pieces=8, header_apart=True),
        Shape(indirect=True),
        Shape(pieces=31, header_apart=True, indirect=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("side", ["sent", "received", "both"])
def test_frames_arrive_whatever_the_shape_of_chains(net, shape, side):
    plain = Shape()
    a = net.guest("a", tx_buffer_len=9300, shape=plain if side == "received" else shape)
    b = net.guest("b", rx_buffer_len=600, rx_shape=plain if side == "sent" else shape)
    frames = frames_of(LENGTHS, b, a)
    assert transfer(a, b, frames) == frames


@pytest.mark.parametrize("apart", [False, True])
def test_frames_arrive_in_pieces_of_one_byte(net, apart):
    shape = ONE_BYTE_EACH._replace(header_apart=apart)
    a = net.guest("a", shape=shape)
    b = net.guest("b", rx_buffer_len=80, rx_shape=Shape(pieces=80, indirect=True))
    frames = frames_of(range(14, 51 + 12 * apart), b, a)
    assert transfer(a, b, frames) == frames


def test_large_frames_in_many_pieces_fill_many_small_buffers_in_pieces(net):
    a = net.guest("a", tx_buffer_len=65600, shape=Shape(pieces=60, indirect=True))
    b = net.guest("b", rx_buffer_len=301, rx_shape=Shape(pieces=3), queue_size=1024)
    frames = frames_of([LONGEST, 14, 9216, 40000], b, a)
    assert transfer(a, b, frames) == frames


def test_without_merging_a_frame_has_to_fit_one_buffer(net):
    a = net.guest("a")
    b = net.guest("b", features=DEFAULT_FEATURES & ~MRG, rx_buffer_len=1000)
    frames = frames_of([988, 989, 60], b, a)
    a.send_all(frames)
    assert b.receive(timeout=10.0, at_least=2) == [frames[0], frames[2]]
    net.switch.assert_copies_balance("a", "b", 3, 2)
    assert net.switch.counters("b")["tx_drop_too_long"] == 1


@pytest.mark.parametrize(
    ("length", "shape", "counter"),
    [
        (13, Shape(), "rx_drop_too_short"),
        (13, Shape(header_apart=True), "rx_drop_too_short"),
        (LONGEST + 1, Shape(), "rx_drop_too_long"),
        (200, Shape(pieces=65, indirect=True), "rx_drop_too_long"),
    ],
    ids=str,
)
def test_frames_that_cannot_be_are_counted_and_given_back(net, length, shape, counter):
    a = net.guest("a", tx_buffer_len=LONGEST + 100, shape=shape)
    b = net.guest("b")
    a.send_all([frame(b, a, 200)[:14].ljust(length, b"x")[:length]] * 3)
    a.wait_sent()
    net.switch.assert_copies_balance("a", "b", 3, 0)
    assert net.switch.counters("a")[counter] == 3
    assert dropped(net.switch.counters("a"), "rx") == 3
    assert_flows(b, a)


def test_a_flood_of_large_frames_overflows_a_small_ring_and_is_counted(net):
    a = net.guest("a", tx_buffer_len=9300, queue_size=64)
    b = net.guest("b", rx_buffer_len=256, queue_size=64)
    a.send_all(frames_of([9000] * 64, b, a))
    a.wait_sent()
    arrived = b.receive(timeout=10.0)
    net.switch.assert_copies_balance("a", "b", 64, len(arrived))
    assert net.switch.counters("b")["tx_drop_ring_full"] == 64 - len(arrived) > 0
    frames = frames_of([9000], b, a)
    assert transfer(a, b, frames) == frames
