import socket
from pathlib import Path

import numpy as np
import pytest

from tests.guest import backend as fake
from tests.guest.backend import EchoBackend
from vswitch.guest import DEFAULT_FEATURES, Guest, GuestError, Shape

MRG, INDIRECT, EVENT_IDX, VERSION_1 = 1 << 15, 1 << 28, 1 << 29, 1 << 32
PACKED, IN_ORDER = 1 << 34, 1 << 35
NEAR_WRAP = 65530
FORMATS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def frames_of(*lengths):
    return [
        bytes((i * 7 + n) % 256 for n in range(size)) for i, size in enumerate(lengths)
    ]


def echo(guest, frames, queue=0):
    guest.send_all(frames, queue)
    count = 1 if isinstance(frames, bytes) else len(frames)
    back = guest.receive(timeout=5.0, at_least=count)
    guest.wait_sent()
    assert guest.faults() == {}
    return back


@FORMATS
def test_a_frame_comes_back_as_it_was_sent(attach, packed):
    frame = bytes(range(60))
    guest = attach(packed=packed)
    assert echo(guest, frame) == [frame]
    assert bool(guest.features & PACKED) == packed


@FORMATS
def test_a_ring_is_kicked_at_its_first_offer(attach, packed):
    """VPP serves a ring from its first kick on, whatever it asked for."""
    guest = attach(packed=packed)
    assert [int(ring["kicks"]) for ring in guest.rings] == [1, 0]
    echo(guest, bytes(60))
    assert int(guest.rings[1]["kicks"]) == 1


@pytest.mark.parametrize("start", [0, NEAR_WRAP, 65535])
@pytest.mark.parametrize(
    "features",
    [
        DEFAULT_FEATURES,
        DEFAULT_FEATURES & ~EVENT_IDX,
        DEFAULT_FEATURES & ~MRG,
        DEFAULT_FEATURES & ~(MRG | VERSION_1),
        0,
        DEFAULT_FEATURES | IN_ORDER,
        DEFAULT_FEATURES | PACKED,
        DEFAULT_FEATURES | PACKED | IN_ORDER,
        DEFAULT_FEATURES & ~EVENT_IDX | PACKED,
        DEFAULT_FEATURES & ~MRG | PACKED,
    ],
)
def test_many_frames_keep_order_with_any_features(attach, features, start):
    guest = attach(features=features, start_index=start, queue_size=16)
    frames = frames_of(*range(14, 114))
    assert echo(guest, frames) == frames


@FORMATS
@pytest.mark.parametrize(
    "shape",
    [
        Shape(header_apart=True),
        Shape(pieces=3),
        Shape(pieces=4, header_apart=True),
        Shape(indirect=True),
        Shape(pieces=7, header_apart=True, indirect=True),
        Shape(pieces=100, indirect=True),
    ],
)
def test_any_shape_of_chains_carries_frames(attach, shape, packed):
    guest = attach(
        shape=shape,
        rx_shape=shape,
        queue_size=32,
        start_index=NEAR_WRAP,
        packed=packed,
    )
    frames = frames_of(*range(60, 160))
    assert echo(guest, frames) == frames


@pytest.mark.parametrize("size", [1, 3, 100, 1000])
def test_a_packed_ring_may_have_any_size(attach, size):
    guest = attach(
        packed=True,
        queue_size=size,
        start_index=2 * size - 1,
        rx_buffer_len=128,
        tx_buffer_len=128,
    )
    frames = frames_of(*range(60, 90))
    assert echo(guest, frames) == frames


def test_a_split_ring_may_not(attach):
    with pytest.raises(GuestError, match="100 descriptors: it is not a power of two"):
        attach(queue_size=100)


def test_a_ring_must_have_room_for_one_chain(attach):
    with pytest.raises(GuestError, match="a frame takes 5"):
        attach(packed=True, queue_size=4, shape=Shape(pieces=5))


def test_packed_rings_that_are_not_offered_are_missed(attach, host):
    host.options = {"offered": fake.FEATURES & ~PACKED}
    with pytest.raises(GuestError, match="cannot use packed rings"):
        attach(packed=True)


@FORMATS
def test_large_frames_are_put_together_from_small_buffers(attach, packed):
    guest = attach(rx_buffer_len=256, tx_buffer_len=10000, queue_size=64, packed=packed)
    frames = frames_of(9216, 14, 244, 245, 500, 501, 9000)
    assert echo(guest, frames) == frames


def test_a_frame_of_64_kib_passes(attach):
    guest = attach(tx_buffer_len=65600, queue_size=64)
    frames = frames_of(65553)
    assert echo(guest, frames) == frames


@pytest.mark.parametrize(("regions", "gap"), [(3, 1 << 32), (4, 0)])
def test_memory_may_be_several_regions(attach, regions, gap):
    guest = attach(regions=regions, gap=gap, queue_size=32)
    frames = frames_of(*range(1400, 1500))
    assert echo(guest, frames) == frames


def test_each_queue_pair_has_its_own_rings(attach):
    guest = attach(queue_pairs=3, queue_size=16)
    for queue in range(3):
        frames = frames_of(*range(60 + queue, 90 + queue))
        assert echo(guest, frames, queue) == frames
    assert [int(n) for n in guest.rings["frames"]] == [30] * 6


def test_frames_go_in_and_out_as_arrays(attach):
    guest = attach()
    rows = np.arange(600, dtype=np.uint8).reshape(10, 60)
    assert guest.send(rows) == 10
    got, lengths = guest.receive_array(timeout=5.0, max_frames=10, width=64)
    while len(got) < 10:
        more, more_lengths = guest.receive_array(5.0, 10 - len(got), 64)
        got, lengths = np.vstack((got, more)), np.append(lengths, more_lengths)
    assert lengths.tolist() == [60] * 10
    np.testing.assert_array_equal(got[:, :60], rows)


def test_send_takes_what_the_ring_holds_and_no_more(attach):
    guest = attach(queue_size=16)
    guest.stop()
    assert guest.send(frames_of(*[60] * 40)) == 16
    guest.start()
    assert len(guest.receive(timeout=5.0, at_least=16)) == 16


@FORMATS
def test_what_the_switch_has_not_given_back_is_outstanding(attach, packed):
    guest = attach(queue_size=16, packed=packed)
    guest.stop()
    assert guest.send(frames_of(60, 61, 62)) == 3
    assert guest.outstanding() == 3
    guest.start()
    assert len(guest.receive(timeout=5.0, at_least=3)) == 3
    guest.wait_sent()
    assert guest.outstanding() == 0


def test_a_frame_larger_than_a_buffer_is_refused(attach):
    guest = attach()
    with pytest.raises(GuestError, match="a buffer holds 2036"):
        guest.send(bytes(2037))


def test_receive_returns_nothing_at_the_deadline(attach):
    assert attach().receive(timeout=0.0) == []


def test_stop_and_start_lose_nothing(attach):
    guest = attach(queue_size=16, start_index=NEAR_WRAP)
    frames = frames_of(*range(60, 90))
    assert echo(guest, frames) == frames
    bases = guest.stop()
    assert bases == [(NEAR_WRAP + 30) & 0xFFFF] * 2
    guest.start()
    assert echo(guest, frames) == frames


@pytest.mark.parametrize(("start", "index", "lap"), [(0, 6, 0), (12, 6, 1), (6, 0, 1)])
def test_a_packed_ring_goes_on_at_its_index_and_lap(attach, start, index, lap):
    guest = attach(queue_size=12, start_index=start, packed=True)
    frames = frames_of(*range(60, 78))
    assert echo(guest, frames) == frames
    position = index | lap << 15
    assert guest.stop() == [position << 16 | position] * 2
    guest.start()
    assert echo(guest, frames) == frames


@FORMATS
def test_reset_begins_with_empty_rings(attach, packed):
    guest = attach(queue_size=16, packed=packed)
    assert echo(guest, frames_of(60)) == frames_of(60)
    guest.reset()
    assert [layout.outstanding for layout in guest.layouts] == [16, 0]
    assert guest.layouts[1].device_position() == (0x80008000 if packed else 0)
    assert echo(guest, frames_of(70)) == frames_of(70)


@FORMATS
def test_a_reconnect_goes_on_where_the_rings_stand(attach, host, packed):
    guest = attach(queue_size=16, start_index=NEAR_WRAP, packed=packed)
    frames = frames_of(*range(60, 90))
    assert echo(guest, frames) == frames
    guest.send_all(frames[:3])
    assert len(guest.receive(timeout=5.0, max_frames=1)) == 1
    guest.wait_sent()
    guest.disconnect()
    host.backends[0].finish()
    host.expect()
    guest.open()
    assert guest.receive(timeout=5.0, at_least=2) == frames[1:3]
    assert echo(guest, frames) == frames


@pytest.mark.parametrize(
    "order",
    [
        ("call", "kick", "num", "addr", "base", "enable"),
        ("enable", "addr", "base", "num", "call", "kick"),
    ],
)
def test_ring_set_up_in_another_order(attach, order):
    guest = attach(order=order, memory_first=True)
    assert echo(guest, frames_of(60)) == frames_of(60)


def test_rings_are_set_up_in_the_order_asked_for(attach, host):
    attach(order=("call", "kick", "num", "addr", "base", "enable"))
    ring_requests = [r for r, _ in host.backends[0].log if 8 <= r <= 18][2:]
    one = [
        fake.SET_VRING_CALL,
        fake.SET_VRING_KICK,
        fake.SET_VRING_NUM,
        fake.SET_VRING_ADDR,
        fake.SET_VRING_BASE,
        fake.SET_VRING_ENABLE,
    ]
    assert [r for r in ring_requests if r in one] == one * 2


def test_without_acknowledgements_a_barrier_follows(attach, host):
    host.options = {"protocol": 0}
    guest = attach()
    guest.wait_ready()
    assert echo(guest, frames_of(60)) == frames_of(60)


def test_a_refusal_is_raised_where_it_happens(attach, host):
    host.options = {"refuse": (fake.SET_MEM_TABLE,)}
    with pytest.raises(GuestError, match="refused SET_MEM_TABLE"):
        attach()


def test_too_many_queue_pairs_are_refused(attach):
    with pytest.raises(GuestError, match="allows 4"):
        attach(queue_pairs=5)


def test_nobody_listening_is_said(tmp_path):
    with pytest.raises(GuestError, match="No such file"):
        Guest.connect(tmp_path / "none.sock")


def test_a_guest_can_listen_for_a_switch_in_client_mode(tmp_path):
    path = tmp_path / "guest.sock"
    guest = Guest(path, mode="server")
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    backend = EchoBackend(sock)
    backend.start()
    with guest:
        assert echo(guest, frames_of(60, 61)) == frames_of(60, 61)
    assert not path.exists()
    backend.finish()


def test_closing_a_guest_leaves_no_descriptor_open(attach, host):
    attach().close()
    host.backends[0].finish()
    before = open_descriptors()
    attach().close()
    host.backends[1].finish()
    assert open_descriptors() == before


def test_a_request_that_nobody_knows_can_be_sent_and_refused(attach, host):
    host.options = {"refuse": (77,)}
    guest = attach()
    with pytest.raises(GuestError, match="refused request 77"):
        guest.frontend.request(77)
    assert echo(guest, bytes(60)) == [bytes(60)]


def test_a_switch_that_hangs_up_is_said(attach, host):
    guest = attach()
    host.backends[0].sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(GuestError, match=r"hung up|closed the connection"):
        guest.wait_ready()
