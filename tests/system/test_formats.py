"""Guests of both ring formats on one switch, with and without offloads."""

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from tests.system.net import Stream, exchange_both_ways, frame
from vswitch.guest import DEFAULT_FEATURES, OFFLOADS, NetHeader, Shape
from vswitch.guest.header import GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM

IN_ORDER = 1 << 35
ABLE = {"features": DEFAULT_FEATURES | OFFLOADS, "tx_buffer_len": 65600}
SPLIT, PACKED = {"queue_size": 256}, {"queue_size": 250, "packed": True}
PAYLOAD = bytes(at * 7 % 251 for at in range(20_000))
MSS = 1400
FORMATS = pytest.mark.parametrize(
    ("one", "other"),
    [(PACKED, SPLIT), (SPLIT, PACKED), (PACKED, PACKED)],
    ids=["packed to split", "split to packed", "packed to packed"],
)


# --- plain frames ---


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "built"])
@pytest.mark.parametrize("features", [0, IN_ORDER], ids=["", "in order"])
def test_streams_pass_both_ways_between_the_formats(net, raw, features):
    features |= DEFAULT_FEATURES
    a = net.guest("a", features=features, start_index=65530, **PACKED)
    b = net.guest("b", features=features, start_index=65530, **SPLIT)
    net.pin(a, b)
    with Stream((a, b), (b, a), raw=raw, verify=not raw) as flow:
        flow.wait_for_more(net.switch, 20_000)
        totals = flow.stop()
    assert totals.corrupt == totals.reordered == totals.duplicates == 0
    counted = sum(net.switch.counters(name)["tx_drop_ring_full"] for name in "ab")
    assert totals.sent - totals.received == counted


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_packed_ring_may_have_any_size(net, size):
    a = net.guest("a", packed=True, queue_size=size)
    b = net.guest("b", packed=True, queue_size=max(size, 8), rx_buffer_len=300)
    for number in range(3 * size):
        one = frame(b, a, 60 + number, number)
        a.send_all(one)
        assert b.receive(timeout=10.0) == [one]


def test_packed_rings_go_on_exactly_where_they_were_stopped(net):
    shape = Shape(pieces=3, header_apart=True)
    a = net.guest("a", shape=shape, **PACKED)
    b = net.guest("b", rx_shape=shape, rx_buffer_len=256, **PACKED)
    for number in range(40):
        exchange_both_ways(a, b)
        guest = (a, b)[number % 2]
        bases = guest.stop()
        assert bases == [layout.device_position() for layout in guest.layouts]
        assert all(base >> 16 == base & 0xFFFF for base in bases)
        guest.start()


def test_a_packed_guest_may_hang_up_and_come_back(net):
    a, b = net.guest("a", **PACKED), net.guest("b", **SPLIT)
    for _ in range(5):
        exchange_both_ways(a, b)
        a.disconnect()
        net.switch.wait_for_state("a", "waiting-for-frontend")
        a.open()


# --- offloads ---


def with_half_a_checksum(packet, layer, at):
    """The bytes of a frame whose checksum covers the pseudo header alone."""
    built = Ether(bytes(packet))
    ip = built.getlayer(IP) or built.getlayer(IPv6)
    data, start = bytearray(bytes(built)), len(built) - len(built[layer])
    head = bytes(ip)
    addresses = head[12:20] if ip.version == 4 else head[8:40]
    length = len(data) - start
    protocol = 6 if layer is TCP else 17
    total = ones_sum(addresses + bytes((0, protocol)) + length.to_bytes(4, "big"))
    data[start + at : start + at + 2] = total.to_bytes(2, "big")
    return bytes(data), start


def ones_sum(data):
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    return total % 0xFFFF


def stack(sender, receiver, version):
    ip = (
        IP(src="10.0.0.1", dst="10.0.0.2", id=7)
        if version == 4
        else IPv6(src="fd00::1", dst="fd00::2")
    )
    return Ether(src=sender.mac_text, dst=receiver.mac_text) / ip


def super_frame(sender, receiver, version):
    packet = stack(sender, receiver, version) / TCP(seq=1000, flags="PA")
    data, start = with_half_a_checksum(packet / Raw(PAYLOAD), TCP, 16)
    gso_type = GSO_TCPV4 if version == 4 else GSO_TCPV6
    return data, NetHeader(NEEDS_CSUM, gso_type, start + 20, MSS, start, 16)


def datagrams(sender, receiver, version):
    """Many datagrams in one frame."""
    packet = stack(sender, receiver, version) / UDP(sport=1, dport=2)
    data, start = with_half_a_checksum(packet / Raw(PAYLOAD), UDP, 6)
    return data, NetHeader(NEEDS_CSUM, GSO_UDP_L4, start + 8, MSS, start, 6)


def datagram(sender, receiver, version):
    packet = stack(sender, receiver, version) / UDP(sport=1, dport=2)
    data, start = with_half_a_checksum(packet / Raw(PAYLOAD[:999]), UDP, 6)
    return data, NetHeader(NEEDS_CSUM, csum_start=start, csum_offset=6)


def assert_checksums_are_right(data):
    again = Ether(data)
    for layer in (IP, TCP, UDP):
        if layer in again:
            del again[layer].chksum
    assert bytes(again) == data


@FORMATS
@pytest.mark.parametrize("version", [4, 6])
def test_offloads_pass_between_guests_that_take_them(net, one, other, version):
    a, b = net.guest("a", **ABLE | one), net.guest("b", **ABLE | other)
    net.pin(a, b)
    for sender, receiver in ((a, b), (b, a)):
        makes = (super_frame, datagrams, datagram)
        sent = [make(sender, receiver, version) for make in makes]
        frames, headers = zip(*sent, strict=True)
        sender.send_all(frames, headers=headers)
        arrived = receiver.receive_with_headers(timeout=10.0, at_least=3)
        assert [frame for _, frame in arrived] == list(frames)
        whole = int(receiver.rings[0]["buffer_len"])
        buffers = [-(-(len(frame) + 12) // whole) for frame in frames]
        assert [header for header, _ in arrived] == [
            header._replace(num_buffers=count)
            for header, count in zip(headers, buffers, strict=True)
        ]


@FORMATS
@pytest.mark.parametrize("version", [4, 6])
def test_offloads_are_lowered_for_a_guest_that_does_not_take_them(
    net, one, other, version
):
    a, b = net.guest("a", **ABLE | one), net.guest("b", **other)
    net.pin(a, b)
    makes = (super_frame, datagrams, datagram)
    frames, headers = zip(*(make(a, b, version) for make in makes), strict=True)
    a.send_all(frames, headers=headers)
    segments = -(-len(PAYLOAD) // MSS)
    arrived = b.receive_with_headers(timeout=10.0, at_least=2 * segments + 1)
    assert {header for header, _ in arrived} == {NetHeader(num_buffers=1)}
    for _, data in arrived:
        assert_checksums_are_right(data)
    packets = [Ether(data) for _, data in arrived]
    pieces = [packet[TCP] for packet in packets if TCP in packet]
    assert b"".join(bytes(piece.payload) for piece in pieces) == PAYLOAD
    assert [piece.seq for piece in pieces] == [1000 + MSS * n for n in range(segments)]
    *cut, last = [bytes(packet[UDP].payload) for packet in packets if UDP in packet]
    assert cut == [PAYLOAD[at : at + MSS] for at in range(0, len(PAYLOAD), MSS)]
    assert last == PAYLOAD[:999]
    counters = net.switch.counters("b")
    assert (counters["tx_gso_split"], counters["tx_csum_completed"]) == (2, 1)
    assert counters["tx_gso_segments"] == 2 * segments
