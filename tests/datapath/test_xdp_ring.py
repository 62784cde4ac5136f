"""An xdp port's rings in a worker's turn: memory of ours, a model of the kernel."""

import random
import socket
from collections import deque

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, IPv6ExtHdrRouting
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from ports import dispatch, native, xdp_data
from ports.base import KIND_XDP, RING_RUNNING, RINGS_PER_PORT
from ports.burst import BURST_SIZE
from ports.vhost.virtio import F_CSUM
from ports.xdp_ring import CHUNKS_AT, XSK, layout_for
from tests.datapath.bench import A, B
from tests.datapath.rings import DEFAULT, GPA, NEXT, frame_to, mac
from tests.datapath.test_offload import (
    CAPABLE,
    PAYLOAD,
    STACKS,
    V4,
    V6,
    ethernet,
    partial,
    received,
    receiver,
    super_frame,
)
from tests.datapath.xdp_rings import XdpSocket
from vswitch.datapath import loop

XDP = 5
LOOKS = 12  # a header's length, where frames may ask for something without one


@pytest.fixture
def wake():
    """A socket that is woken by an empty message, and its other end."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def make_xdp(bench, wake):
    made = []

    def make(header_len=0, mtu=1500, **options):
        """Make port XDP an interface that is up; its only queue."""
        queue = XdpSocket(max_frame=mtu + 18, **options)
        port = bench.plane.shared.ports[XDP]
        port["max_frame"], port["kind"], port["up"], port["pairs"] = (
            *(mtu + 14, KIND_XDP, 1),
            1,
        )
        first = XDP * RINGS_PER_PORT
        rings = bench.plane.shared.rings[first : first + 2]
        for ring in rings:
            ring["state"], ring["port"], ring["enabled"] = RING_RUNNING, XDP, 1
            ring["header_len"], ring["features"] = header_len, F_CSUM
            ring["kick_fd"] = wake[0].fileno()
        queue.attach(rings)
        queue.tx, queue.rx = rings
        made.append(queue)
        return queue

    yield make
    for queue in made:
        queue.check()


@pytest.fixture
def xdp(make_xdp):
    return make_xdp()


def frames_of(guest):
    """What reached a guest, without headers."""
    return [frame for _, frame in received(guest)]


def offer(a, frames):
    """Offer frames back to back; then they may be received."""
    offset = 0x20000
    for number, frame in enumerate(frames):
        a.send(frame, index=number, offset=offset)
        offset += len(frame) + 16
    return frames


def send_some(bench, a, lengths):
    """Frames that were sent to nobody that is known."""
    frames = offer(a, [frame_to(9, A, length) for length in lengths])
    bench.turn()
    a.tx.reap()
    return frames


def woken(end):
    """How often a socket was woken."""
    count = 0
    try:
        while True:
            assert end.recv(16) == b""
            count += 1
    except BlockingIOError:
        return count


def test_records_lie_on_lines_of_their_own():
    assert XSK.itemsize % 64 == 0
    assert 2 * XSK.itemsize <= CHUNKS_AT
    assert XSK.fields["unsent"][1] % 64 == XSK.fields["fresh"][1] % 64 == 0


@pytest.mark.parametrize(
    ("max_frame", "chunk_len", "pieces"),
    [
        (1518, 2048, False),
        (1792, 2048, False),
        (1793, 4096, False),
        (3840, 4096, False),
        (3841, 4096, True),
    ],
)
def test_chunks_are_as_small_as_frames_allow(max_frame, chunk_len, pieces):
    assert layout_for(max_frame) == (chunk_len, pieces)


# --- receive ---


def test_frames_come_in_and_their_chunks_go_back(bench, pair, xdp):
    frames = [frame_to(A, 7, length) for length in (14, 60, 61, 1514)]
    for frame in frames:
        assert xdp.deliver(frame)
    assert bench.turn() == 4
    assert frames_of(pair[0]) == frames
    assert (len(xdp.receive), len(xdp.fill)) == (0, 4)
    tally = bench.tally(XDP)
    assert (tally["rx_frames"], tally["rx_bytes"]) == (4, sum(map(len, frames)))


def test_every_chunk_goes_round_and_round(bench, xdp):
    a = bench.guest(A, size=256)
    for _ in range(3):
        frames = [frame_to(A, 7, 60 + n) for n in range(xdp.size)]
        assert all(map(xdp.deliver, frames))
        assert not xdp.deliver(frames[0])
        a.post(len(frames))
        while bench.turn():
            pass
        assert frames_of(a) == frames
        xdp.check()


def test_a_burst_is_64_frames_at_most(bench, pair, xdp):
    for _ in range(BURST_SIZE + 1):
        xdp.deliver(frame_to(9, 9))
    assert bench.round() == BURST_SIZE
    assert bench.round() == 1
    assert bench.round() == 0


def test_long_frames_come_in_pieces(bench, make_xdp):
    xdp = make_xdp(mtu=9000)
    a = bench.guest(A)
    a.post(16)
    long = [frame_to(A, 7, 9014), frame_to(A, 7, 7680), frame_to(A, 7, 3841)]
    for frame in (frame_to(A, 7), *long, frame_to(A, 7)):
        xdp.deliver(frame, [at for at in (3840, 7680) if at < len(frame)])
    assert bench.turn() == 5
    got = b"".join(frames_of(a))
    assert [f for f in long if f not in got] == []
    assert bench.tally(A)["tx_frames"] == 5


def test_frames_that_are_no_frames_are_counted(bench, pair, make_xdp):
    xdp = make_xdp(mtu=65535)
    xdp.deliver(bytes(13))
    xdp.deliver(frame_to(A, 7, 65554), range(3840, 65554, 3840))
    xdp.deliver(frame_to(A, 7, 6500), range(100, 6500, 100))
    xdp.deliver(frame_to(A, 7))
    assert bench.turn() == 4
    assert bench.drops(XDP) == {"rx_drop_too_short": 1, "rx_drop_too_long": 2}
    assert frames_of(pair[0]) == [frame_to(A, 7)]


def test_where_the_kernel_does_not_copy_it_is_told_of_chunks_when_it_sleeps(
    bench, pair, make_xdp, wake
):
    xdp = make_xdp(copies=0)
    for flag, left in ((0, 2), (1, 1)):
        woken(wake[0])
        wake[1].send(b"")
        wake[1].send(b"")
        xdp.fill.words[2] = flag
        xdp.deliver(frame_to(A, 7))
        bench.turn()
        assert woken(wake[0]) == left


# --- checksums that are only begun ---


def seen(bench, xdp, data):
    """What a guest that takes half a checksum gets of a frame, and one that does not."""
    able, unable = receiver(bench, A, CAPABLE), receiver(bench, B)
    xdp.deliver(b"\xff" * 6 + data[6:])
    bench.turn()
    ((head, whole),) = received(able)
    ((_, complete),) = received(unable)
    return head, whole, complete


def checksums(data):
    """Does scapy agree with each checksum in a frame?"""
    frame = Ether(data)
    wanted = Ether(data)
    del wanted[TCP if TCP in wanted else UDP].chksum
    return bytes(frame) == bytes(Ether(bytes(wanted)))


@pytest.mark.parametrize("layer", [TCP, UDP])
@pytest.mark.parametrize("name", STACKS)
def test_a_checksum_that_is_only_begun_is_found(bench, make_xdp, name, layer):
    xdp = make_xdp(LOOKS)
    frame = STACKS[name][0]() / layer(sport=1, dport=2) / Raw(PAYLOAD[:1001])
    data, start, offset = partial(frame, layer)
    head, whole, complete = seen(bench, xdp, data)
    assert head[:10] == bytes([1, *bytes(5), start, 0, offset, 0])
    assert whole[6:] == data[6:]
    assert checksums(complete)
    assert complete[6:] == bytes(Ether(bytes(frame)))[6:]


def edited(data, at, value):
    return data[:at] + value + data[at + len(value) :]


def complete_frames():
    tcp = ethernet() / IP(**V4) / TCP() / Raw(PAYLOAD[:100])
    half, start, _ = partial(tcp, TCP)
    udp6 = ethernet() / IPv6(**V6) / UDP() / Raw(PAYLOAD[:100])
    half6, *_ = partial(udp6, UDP)
    route = IPv6ExtHdrRouting(segleft=1, addresses=["fd00::3"])
    routed = partial(ethernet() / IPv6(**V6) / route / TCP(), TCP)[0]
    fragment = (
        ethernet() / IPv6(**V6) / IPv6ExtHdrFragment(m=1) / UDP() / Raw(PAYLOAD[:96])
    )
    return {
        "complete tcp": bytes(tcp),
        "complete udp": bytes(udp6),
        "no udp checksum": edited(half6, 14 + 40 + 6, b"\0\0"),
        "first fragment": edited(half, 20, b"\x20\0"),
        "later fragment": edited(half, 20, b"\0\1"),
        "short header": edited(half, 14, b"\x44"),
        "long header": edited(half, 14, b"\x4f")[: start + 8],
        "longer than the frame": edited(half, 16, b"\x10\0"),
        "cut": half[: start + 17],
        "other version": edited(half, 14, b"\x65"),
        "other protocol": edited(half, 23, b"\x84"),
        "route to follow": routed,
        "fragment header": partial(fragment, UDP)[0],
        "no ip": frame_to(A, 7, 14),
        "cut ip": half[:30],
        "cut ip6": half6[:50],
        "cut options": edited(half6[:58], 20, b"\0"),
    }


@pytest.mark.parametrize("name", complete_frames())
def test_nothing_else_is_taken_for_one(bench, make_xdp, name):
    xdp = make_xdp(LOOKS)
    data = complete_frames()[name]
    head, whole, complete = seen(bench, xdp, data)
    assert not any(head[:10])
    assert whole[6:] == complete[6:] == data[6:]


@pytest.mark.parametrize("layer", [TCP, UDP])
def test_a_complete_one_that_looks_begun_stays_what_it_is(bench, make_xdp, layer):
    """Its sum happens to be that of the pseudo header."""
    xdp = make_xdp(LOOKS)
    frame = ethernet() / IP(**V4) / layer(sport=1, dport=2) / Raw(bytes(100))
    half, start, offset = partial(frame, layer)
    begun = int.from_bytes(half[start + offset : start + offset + 2], "big")
    # Two bytes of payload make up for the difference.
    whole = Ether(bytes(frame))[layer].chksum
    data = bytearray(bytes(Ether(bytes(frame))))
    data[-2:] = ((whole - begun) % 0xFFFF).to_bytes(2, "big")
    data[start + offset : start + offset + 2] = begun.to_bytes(2, "big")
    assert checksums(bytes(data))
    head, _, complete = seen(bench, xdp, bytes(data))
    assert head[0] == 1
    assert complete[6:] == bytes(data)[6:]


def test_a_jumbo_frame_that_is_only_begun_is_completed(bench, make_xdp):
    xdp = make_xdp(LOOKS, mtu=9000)
    frame = ethernet() / IP(**V4) / TCP() / Raw(PAYLOAD[:8000])
    data, *_ = partial(frame, TCP)
    b = receiver(bench, B)
    xdp.deliver(data, [3840, 7680])
    bench.turn()
    ((_, got),) = received(b)
    assert got == bytes(frame)


def test_where_nobody_leaves_them_begun_nobody_looks(bench, xdp):
    data, *_ = partial(ethernet() / IP(**V4) / TCP() / Raw(PAYLOAD[:100]), TCP)
    head, whole, complete = seen(bench, xdp, data)
    assert not any(head[:10])
    assert whole[6:] == complete[6:] == data[6:]


# --- transmit ---


def test_frames_go_out_in_order_and_wake_the_kernel_once(bench, xdp, wake):
    frames = send_some(bench, bench.guest(A), (14, 60, 300, 1514))
    assert xdp.take() == frames
    assert woken(wake[1]) == 1
    sent = {"tx_frames": 4, "tx_bytes": sum(map(len, frames))}
    assert bench.tally(XDP) == sent


@pytest.mark.parametrize("copies", [0, 1])
@pytest.mark.parametrize("sleeps", [0, 1])
def test_the_kernel_is_woken_where_it_asks_for_it(
    bench, make_xdp, wake, copies, sleeps
):
    xdp = make_xdp(copies=copies)
    xdp.send.words[2] = sleeps
    a = bench.guest(A)
    a.send(frame_to(9, A))
    bench.turn()
    assert woken(wake[1]) == sleeps
    assert len(xdp.take()) == 1


@pytest.mark.parametrize("order", [deque.popleft, deque.pop, "random"])
def test_chunks_are_used_again_in_whatever_order_they_come_back(bench, xdp, order):
    a = bench.guest(A)
    shuffle = random.Random(1)
    if order == "random":

        def order(flying):
            flying.rotate(shuffle.randrange(len(flying)))
            return flying.popleft()

    for lap in range(60):
        frames = send_some(bench, a, [60 + lap + n for n in range(16)])
        assert xdp.take() == frames
        xdp.check()
        if lap >= 4:
            xdp.complete(shuffle.randrange(13, 20), order=order)


def test_without_a_free_chunk_frames_are_dropped_and_counted(bench, make_xdp):
    xdp = make_xdp(size=8)
    a = bench.guest(A)
    frames = send_some(bench, a, range(60, 72))
    assert xdp.take() == frames[:8]
    assert bench.tally(XDP)["tx_frames"] == 8
    assert bench.drops(XDP) == {"tx_drop_ring_full": 4}
    xdp.complete(3)
    frames = send_some(bench, a, range(60, 64))
    assert xdp.take() == frames[:3]


@pytest.mark.parametrize("tag", [b"\x81\0\0\5", b"\x88\xa8\0\5"])
def test_what_is_longer_than_the_mtu_is_counted(bench, xdp, tag):
    """A tag is in addition to it."""
    a = bench.guest(A)
    plain = [frame_to(9, A, length) for length in (1514, 1515, 1518)]
    tagged = [f[:12] + tag + f[16:] for f in (*plain, frame_to(9, A, 1519))]
    offer(a, [*plain, *tagged])
    bench.turn()
    assert xdp.take() == [plain[0], *tagged[:3]]
    assert bench.drops(XDP) == {"tx_drop_too_long": 3}


def test_a_frame_in_many_pieces_goes_out_as_it_was_judged(bench, xdp):
    a = bench.guest(A, size=64)
    frame = frame_to(9, A, 400)
    whole = bytes(12) + frame
    a.write(0x20000, whole)
    cuts = [len(whole) * n // 60 for n in range(61)]
    for i in range(60):
        length = cuts[i + 1] - cuts[i]
        flags = NEXT if i < 59 else 0
        a.tx.describe(i, GPA + 0x20000 + cuts[i], length, flags, i + 1)
    a.tx.offer(0)
    bench.turn()
    assert xdp.take() == [frame]


@pytest.mark.parametrize("length", [3840, 3841, 7680, 7681, 9014])
def test_long_frames_go_out_in_chunks(bench, make_xdp, length):
    xdp = make_xdp(mtu=9000)
    a = bench.guest(A)
    for _ in range(50):
        assert send_some(bench, a, [60, length, 61]) == xdp.take()
        xdp.complete(order=deque.pop)


def test_super_frames_are_cut_and_checksums_completed(bench, xdp):
    a = bench.guest(A, features=DEFAULT | CAPABLE | F_CSUM | 1 << 11)
    data, head = super_frame("v4", payload=PAYLOAD[:3000], mss=1400)
    a.tx.describe(0, a.put(0x20000, head + mac(9) + data[6:]), len(head + data))
    a.tx.offer(0)
    bench.turn()
    frames = xdp.take()
    assert len(frames) == 3
    assert all(map(checksums, frames))
    assert b"".join(bytes(Ether(f)[TCP].payload) for f in frames) == PAYLOAD[:3000]


def test_a_link_that_is_down_is_counted(bench, xdp):
    xdp.records[1]["link_down"] = 1
    send_some(bench, bench.guest(A), [60, 61])
    assert bench.tally(XDP) == {"tx_drop_link_down": 2}
    assert xdp.take() == []


def test_what_the_device_had_no_room_for_is_sent_later(bench, xdp, wake):
    """Though nobody sends anything more."""
    a = bench.guest(A)
    sent = 0
    try:
        while True:
            wake[0].send(b"")
            sent += 1
    except BlockingIOError:
        pass
    send_some(bench, a, [60, 61])
    polled = loop.polled_rings(bench.plane.shared, 0)
    assert loop.ask_for_kicks(bench.plane.ctx, 0, polled) == 1
    assert woken(wake[1]) == sent
    bench.turn()
    assert woken(wake[1]) == 1
    assert loop.ask_for_kicks(bench.plane.ctx, 0, polled) == 0
    bench.turn()
    assert woken(wake[1]) == 0
    assert bench.tally(XDP)["tx_frames"] == 2
    xdp.take()


# --- a worker that dies ---


class DiedError(Exception):
    pass


@pytest.fixture
def die(monkeypatch):
    """Have xdp_data die before its store number `n`, interpreted as it may be."""

    def plain(name):
        function = getattr(xdp_data, name)
        monkeypatch.setattr(xdp_data, name, getattr(function, "py_func", function))

    def at(n):
        count = iter(range(n))

        def guarded(store):
            def wrapper(*arguments):
                if next(count, None) is None:
                    raise DiedError
                store(*arguments)

            return wrapper

        for name in ("_move", "_finish", "_write", "transmit", "release"):
            plain(name)
        for name in ("store_u64", "store_release_u32", "store_release_u64"):
            monkeypatch.setattr(xdp_data, name, guarded(getattr(xdp_data, name)))

    yield at
    monkeypatch.undo()


def heir_takes_over(bench, xdp):
    bench.plane.shared.rings["owner"][bench.plane.shared.rings["owner"] == 0] = 3
    assert loop.repair_rings(bench.plane.ctx, 0, 3) >= 2
    xdp.check()


@pytest.mark.parametrize("n", range(10))
def test_a_worker_may_die_anywhere_while_it_gives_back(bench, xdp, die, monkeypatch, n):
    frames = [frame_to(A, 7, 60 + k) for k in range(5)]
    for frame in frames:
        xdp.deliver(frame)
    port, tally = bench.plane.shared.ports[XDP], bench.plane.tally(XDP)
    assert dispatch.receive(xdp.rx, port, bench.plane.ctx, tally) == 5
    die(n)
    with pytest.raises(DiedError):
        xdp_data.release(xdp.rx)
    monkeypatch.undo()
    a = bench.guest(A)
    a.post(8)
    heir_takes_over(bench, xdp)
    for frame in frames[:2]:
        assert xdp.deliver(frame)
    bench.turn(worker=3)
    # Before the store that moves the batch, all of it is seen again.
    assert frames_of(a) == (frames if n <= 7 else []) + frames[:2]


@pytest.mark.parametrize("n", range(13))
def test_a_worker_may_die_anywhere_while_it_sends(bench, xdp, die, monkeypatch, n):
    a = bench.guest(A)
    before = send_some(bench, a, [60 + k for k in range(5)])
    assert xdp.take() == before
    xdp.complete(3, order=deque.pop)
    frames = offer(a, [frame_to(9, A, 100 + k) for k in range(4)])
    ctx = bench.plane.ctx
    port, tally = bench.plane.shared.ports[XDP], bench.plane.tally(XDP)
    ring = a.tx.record
    guest = bench.plane.shared.ports[A]
    assert dispatch.receive(ring, guest, ctx, bench.plane.tally(A)) == 4
    for k in range(4):
        native.store_u64(int(ctx["picked"]) + 8 * k, k)
    die(n)
    with pytest.raises(DiedError):
        xdp_data.transmit(xdp.tx, port, ctx, 4, tally)
    monkeypatch.undo()
    heir_takes_over(bench, xdp)
    assert xdp.take() == (frames if n > 10 else [])
    xdp.complete()
    for lap in range(2 * xdp.size // 8):
        frames = offer(a, [frame_to(9, A, 200 + lap + k) for k in range(8)])
        bench.turn(worker=3)
        a.tx.reap()
        got = xdp.take()
        assert got[-8:] == frames
        xdp.complete()
        xdp.check()
