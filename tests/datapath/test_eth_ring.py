"""An eth port's ring in a worker's turn: a ring in plain memory, a socket to send to."""

import socket
import struct
from itertools import pairwise

import numpy as np
import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Dot1Q, Ether

from ports import dispatch, eth_data
from ports.base import KIND_ETH, RING_RUNNING, RINGS_PER_PORT
from ports.burst import BURST_SIZE
from ports.packet_ring import BLOCK, BLOCKS, SLOT, SLOTS, SLOTS_PER_BLOCK
from ports.vhost.features import RECEIVER, SENDER
from tests.datapath import packet_rings
from tests.datapath.bench import A, B
from tests.datapath.packet_rings import PacketRing
from tests.datapath.rings import DEFAULT, NEXT, frame_to, mac
from tests.datapath.test_offload import (
    CAPABLE,
    PAYLOAD,
    received,
    receiver,
    super_datagram,
    super_frame,
)
from vswitch.datapath import loop

ETH = 5
HEADER = bytes(10)  # of a packet socket; a guest's is longer
GUEST_HEADER = bytes(12)
TAG = (0x8100, 0xA123)
DATA_VALID = 2


@pytest.fixture
def wire():
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def eth(bench, wire):
    return make_eth(bench, wire)


def make_eth(bench, wire, max_frame=1514):
    """Make port ETH an interface that is up; its ring and record."""
    packets = PacketRing()
    port = bench.plane.shared.ports[ETH]
    port["offloads"], port["max_frame"] = RECEIVER, max_frame
    port["kind"], port["up"], port["pairs"] = KIND_ETH, 1, 1
    for index in (0, 1):
        ring = bench.plane.shared.rings[ETH * RINGS_PER_PORT + index]
        ring["state"], ring["port"], ring["enabled"] = RING_RUNNING, ETH, 1
        ring["kick_fd"] = wire[0].fileno()
        ring["header_len"], ring["features"] = len(HEADER), SENDER
    ring["desc"], ring["size"] = packets.addr, packets.size
    packets.record = ring
    bench.eth = packets  # as long as it is polled
    return packets


def send_each(guest, frames):
    """Offer frames, each in its own descriptor."""
    for number, frame in enumerate(frames):
        guest.send(frame, number, 0x20000 + 0x800 * number)


def frames_of(guest):
    """What reached a guest, without headers."""
    return [frame for _, frame in received(guest)]


def test_the_layout_is_what_the_kernel_is_asked_for():
    assert (BLOCK, SLOT, SLOTS_PER_BLOCK) == (
        packet_rings.BLOCK,
        packet_rings.SLOT,
        packet_rings.PER_BLOCK,
    )
    assert SLOTS == BLOCKS * SLOTS_PER_BLOCK >= BURST_SIZE
    assert (BLOCK % 4096, SLOT % 16) == (0, 0)


# --- receive ---


def test_frames_come_in_and_their_slots_go_back(bench, pair, eth):
    frames = [frame_to(A, 7, length) for length in (14, 60, 61, 1514)]
    for frame in frames:
        assert eth.fill(frame)
    assert bench.turn() == 4
    assert frames_of(pair[0]) == frames
    assert [eth.status(n) for n in range(5)] == [0] * 5
    tally = bench.tally(ETH)
    assert (tally["rx_frames"], tally["rx_bytes"]) == (4, sum(map(len, frames)))


@pytest.mark.parametrize("begin", [0, 13, 14, 60, 74])
def test_bursts_go_over_the_ends_of_blocks_and_of_the_ring(bench, eth, begin):
    a = bench.guest(A, size=128)
    eth.begin_at(eth.record, begin)
    for lap in range(3):
        frames = [frame_to(A, 10 + lap, 60 + n) for n in range(eth.size)]
        assert all(map(eth.fill, frames))
        assert not eth.fill(frames[0])
        a.post(len(frames))
        assert bench.round() + bench.round() == len(frames)
        assert frames_of(a) == frames
    assert int(eth.record["next_avail"]) == begin


def test_a_burst_is_64_frames_at_most(bench, pair, eth):
    for _ in range(BURST_SIZE + 1):
        eth.fill(frame_to(9, 9))
    assert bench.round() == BURST_SIZE
    assert bench.round() == 1
    assert bench.round() == 0


def test_frames_that_are_no_frames_are_counted(bench, pair, eth):
    eth.fill(bytes(13))
    eth.fill(frame_to(A, 7, 1000), length=70000)
    eth.fill(frame_to(A, 7, 65554))
    eth.fill(frame_to(A, 7, 65553), tag=TAG)
    eth.fill(frame_to(A, 7))
    assert bench.turn() == 5
    assert bench.drops(ETH) == {"rx_drop_too_short": 1, "rx_drop_too_long": 3}
    assert len(frames_of(pair[0])) == 1


def test_the_kernels_super_frames_come_in(bench, eth):
    b = receiver(bench, B, CAPABLE)
    data, head = super_frame("v6", payload=PAYLOAD[:3500])
    eth.fill(data, head)
    bench.turn()
    ((_, frame),) = received(b)
    assert bytes(Ether(frame)[TCP].payload) == PAYLOAD[:3500]


@pytest.mark.parametrize("tag", [None, TAG])
@pytest.mark.parametrize("make", [super_frame, super_datagram])
@pytest.mark.parametrize("stack", ["v4", "v4 options", "v6", "v6 vlan"])
def test_a_super_frame_whose_checksum_is_whole_is_one_as_any(
    bench, eth, stack, make, tag
):
    """As drivers make them of what comes, if they do."""
    b = receiver(bench, B, CAPABLE)
    data, head = make(stack, payload=PAYLOAD[:3500])
    built = Ether(data)
    layer = TCP if make is super_frame else UDP
    del built[layer].chksum
    whole = bytes(built)
    kind, gso_size = head[1], head[4:6]
    eth.fill(whole, bytes([DATA_VALID, kind, 0, 0]) + gso_size + bytes(4), tag)
    bench.turn()
    ((came_head, came),) = received(b)
    put_in = struct.pack(">HH", *tag) if tag else b""
    assert came == data[:12] + put_in + data[12:]
    flags, hdr_len, start = struct.unpack_from("<BxH2xH", came_head)
    assert flags == 1
    assert start == struct.unpack_from("<6xH", head)[0] + len(put_in)
    assert hdr_len > start
    assert came_head[8:10] == head[8:10]


@pytest.mark.parametrize("harm", ["header length", "no ip", "protocol", "cut"])
def test_a_header_that_fits_no_whole_checksum_is_refused(bench, pair, eth, harm):
    data, head = super_frame("v4", payload=PAYLOAD[:3500])
    changed = bytearray(data)
    if harm == "header length":
        changed[14] = 0x44
    elif harm == "no ip":
        changed[12:14] = b"\x88\xb5"
    elif harm == "protocol":
        changed[23] = 17
    else:
        del changed[34:]
    eth.fill(bytes(changed), bytes([DATA_VALID, *head[1:6], 0, 0, 0, 0]))
    assert bench.turn() == 1
    assert bench.drops(ETH) == {"rx_drop_bad_header": 1}


@pytest.mark.parametrize("field", [0, 1, 2, 6, 8])
def test_a_header_that_lies_is_refused(bench, pair, eth, field):
    data, head = super_frame("v4", payload=PAYLOAD[:3000])
    lie = bytearray(head)
    lie[field : field + 2] = {0: b"\x01\x03"}.get(field, b"\xff\xff")
    eth.fill(data, bytes(lie))
    eth.fill(data, bytes(lie), tag=TAG)
    assert bench.turn() == 2
    assert bench.drops(ETH) == {"rx_drop_bad_header": 2}


# --- VLAN tags that the kernel took out ---


@pytest.mark.parametrize("length", [14, 60, 1514])
def test_a_tag_that_was_taken_out_is_put_back(bench, pair, eth, length):
    frame = frame_to(A, 7, length)
    eth.fill(frame, tag=TAG)
    eth.fill(frame, tag=(0x88A8, 1))
    assert bench.turn() == 2
    tags = [b"\x81\x00\xa1\x23", b"\x88\xa8\x00\x01"]
    assert frames_of(pair[0]) == [frame[:12] + tag + frame[12:] for tag in tags]


@pytest.mark.parametrize("able", [True, False])
def test_a_super_frame_gets_its_tag_and_a_header_to_match(bench, eth, able):
    b = receiver(bench, B, CAPABLE if able else DEFAULT)
    data, head = super_frame("v4", payload=PAYLOAD[:3500])
    eth.fill(data, head, tag=TAG)
    bench.turn()
    got = received(b)
    assert len(got) == (1 if able else 3)
    if able:
        csum_start, hdr_len = struct.unpack_from("<6xH", head)[0] + 4, 58
        seen = struct.unpack_from("<2xH2xH", got[0][0])
        assert seen == (hdr_len, csum_start)
    frames = [Ether(frame) for _, frame in got]
    assert {frame[Dot1Q].vlan for frame in frames} == {0x123}
    assert b"".join(bytes(f[TCP].payload) for f in frames) == PAYLOAD[:3500]
    if not able:
        for frame in frames:
            wanted = Ether(bytes(frame))
            del wanted[IP].chksum, wanted[TCP].chksum
            assert bytes(wanted) == bytes(frame)


# --- a worker that dies ---


def test_a_burst_that_was_not_released_is_taken_again(bench, pair, eth):
    frames = [frame_to(A, 7, 60 + n) for n in range(5)]
    for frame in frames:
        eth.fill(frame, tag=TAG)
    port = bench.plane.shared.ports[ETH]
    tally = bench.plane.tally(ETH)
    loop.start_rings(bench.plane.ctx, 0)
    assert dispatch.receive(eth.record, port, bench.plane.ctx, tally) == 5
    eth.record["owner"] = 3  # worker 0 died there
    assert loop.repair_rings(bench.plane.ctx, 0, 3) == 1
    bench.turn(worker=3)
    tagged = [frame[:12] + b"\x81\x00\xa1\x23" + frame[12:] for frame in frames]
    assert frames_of(pair[0]) == tagged


@pytest.mark.parametrize("begin", [0, 70])
@pytest.mark.parametrize("given_back", range(6))
def test_a_position_that_was_not_written_is_found_again(bench, eth, begin, given_back):
    a = bench.guest(A)
    a.post(8)
    eth.begin_at(eth.record, begin)
    for n in range(7):
        eth.fill(frame_to(A, 7, 60 + n))
    for n in range(given_back):
        eth.memory[eth.slot((begin + n) % eth.size)] = 0
    loop.repair_rings(bench.plane.ctx, 4, 0)
    bench.turn()
    assert [len(f) - 60 for f in frames_of(a)] == list(range(given_back, 7))
    assert eth.fill(frame_to(A, 7))
    assert bench.turn() == 1


def test_a_position_at_the_kernels_is_left_alone(bench, eth):
    eth.begin_at(eth.record, 33)
    loop.repair_rings(bench.plane.ctx, 4, 0)
    assert int(eth.record["next_avail"]) == 33


# --- sleep ---


def test_a_frame_that_is_here_keeps_the_worker_awake(bench, eth):
    polled = loop.polled_rings(bench.plane.shared, 0)
    assert loop.ask_for_kicks(bench.plane.ctx, 0, polled) == 0
    eth.fill(frame_to(B, 7))
    assert loop.ask_for_kicks(bench.plane.ctx, 0, polled) == 1


# --- transmit ---


def test_frames_go_out_in_order(bench, wire, eth):
    a = bench.guest(A)
    frames = [frame_to(9, A, length) for length in (14, 60, 300, 1514)]
    send_each(a, frames)
    bench.turn()
    got = [wire[1].recv(4096) for _ in frames]
    assert got == [HEADER + frame for frame in frames]
    sent = {"tx_frames": 4, "tx_bytes": sum(map(len, frames))}
    assert bench.tally(ETH) == sent


@pytest.mark.parametrize("worker", [0, 1, 2, 3])
def test_each_worker_sends_by_its_own_pair(bench, wire, eth, worker):
    """A spare that forwards has the pair of one that died, or of another."""
    other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    bench.plane.shared.ports[ETH]["pairs"] = 2
    bench.plane.shared.rings[ETH * RINGS_PER_PORT + 2]["kick_fd"] = other[0].fileno()
    a = bench.guest(A)
    for side in (a.rx, a.tx):
        side.record["owner"] = worker
    frame = frame_to(9, A)
    a.send(frame)
    bench.turn(worker=worker)
    receiver = other[1] if worker % 2 else wire[1]
    receiver.setblocking(False)
    assert receiver.recv(4096) == HEADER + frame
    assert bench.tally(ETH, worker)["tx_frames"] == 1
    for end in other:
        end.close()


def test_frames_in_many_pieces_go_out_in_one(bench, wire, eth):
    """More pieces than one system call takes."""
    a = bench.guest(A, size=2048)
    frame = frame_to(9, A, 400)
    whole = GUEST_HEADER + frame
    count, pieces = 20, 60
    gpa = a.put(0x40000, whole)
    cuts = [len(whole) * n // pieces for n in range(pieces + 1)]
    for number in range(count):
        for i, (begin, end) in enumerate(pairwise(cuts)):
            at = number * pieces + i
            flags = NEXT if i < pieces - 1 else 0
            a.tx.describe(at, gpa + begin, end - begin, flags, at + 1)
        a.tx.offer(number * pieces)
    bench.turn()
    assert {wire[1].recv(4096) for _ in range(count)} == {HEADER + frame}
    with pytest.raises(BlockingIOError):
        wire[1].recv(4096)
    assert bench.tally(ETH)["tx_frames"] == count


def test_a_super_frame_goes_out_with_its_header(bench, wire, eth):
    a = bench.guest(A, features=DEFAULT | SENDER)
    data, head = super_frame("v4", payload=PAYLOAD[:3000])
    data = mac(9) + data[6:]
    a.tx.describe(0, a.put(0x20000, head + data), len(head + data))
    a.tx.offer(0)
    bench.turn()
    hdr_len = struct.pack("<H", 54)
    assert wire[1].recv(8192) == head[:2] + hdr_len + head[4:10] + data


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("cuts", [(), (60, 70), (66, 67)])
@pytest.mark.parametrize("spare", [0, -1])
def test_segments_longer_than_the_mtu_are_counted(bench, wire, tagged, cuts, spare):
    """By the length of TCP's header; the header's hdr_len may be any that is more."""
    tag = b"\x81\x00\x00\x05" if tagged else b""
    data, head = super_frame("v4", payload=PAYLOAD[:5000])
    gso_size, csum_start = struct.unpack_from("<4xHH", head)
    make_eth(bench, wire, max_frame=csum_start + 20 + gso_size + spare)
    data = mac(9) + data[6:12] + tag + data[12:]
    head = bytearray(head)
    struct.pack_into("<HHH", head, 2, 1000, gso_size, csum_start + len(tag))
    a = bench.guest(A, features=DEFAULT | SENDER)
    whole = bytes(head) + data
    edges = [0, *cuts, len(whole)]
    for n, (begin, end) in enumerate(pairwise(edges)):
        gpa = a.put(0x20000 + begin, whole[begin:end])
        a.tx.describe(n, gpa, end - begin, NEXT if end < len(whole) else 0, n + 1)
    a.tx.offer(0)
    bench.turn()
    if spare == 0:
        assert wire[1].recv(8192) == bytes(head[:10]) + data
    else:
        assert bench.tally(ETH) == {"tx_drop_too_long": 1}


def test_what_the_kernel_refuses_is_counted_and_the_rest_goes_out(bench, wire, eth):
    """A full socket; then one that nobody reads any more."""
    wire[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    a = bench.guest(A, size=64)
    send_each(a, [frame_to(9, A, 1514)] * 40)
    bench.turn()
    counted = bench.tally(ETH)
    assert counted["tx_frames"] + counted["tx_drop_ring_full"] == 40
    assert min(counted["tx_frames"], counted["tx_drop_ring_full"]) > 0
    wire[1].close()
    a.tx.reap()
    a.send(frame_to(9, A))
    bench.turn()
    assert bench.drops(ETH)["tx_drop_link_down"] == 1


def test_a_message_is_refused_alone(bench, wire):
    """As the kernel does with a frame that is longer than the interface's MTU."""
    datagrams = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        make_eth(bench, datagrams)
        datagrams[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        a = bench.guest(A)
        sizes = (60, 14000, 61)
        for number, size in enumerate(sizes):
            whole = GUEST_HEADER + frame_to(9, A, size)
            gpa = a.put(0x20000 + number * 0x4000, whole)
            a.tx.describe(number, gpa, len(whole))
            a.tx.offer(number)
        bench.turn()
        got = [len(datagrams[1].recv(4096)) - len(HEADER) for _ in range(2)]
        assert got == [60, 61]
        assert bench.drops(ETH) == {"tx_drop_too_long": 1}
    finally:
        for end in datagrams:
            end.close()


def test_messages_are_those_of_c():
    assert eth_data._MESSAGE_SIZE == 64
    assert np.dtype(eth_data.MESSAGE).fields["sent"][1] == 56
