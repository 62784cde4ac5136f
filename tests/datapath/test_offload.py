"""Frames with half a checksum, and super-frames, to receivers that can and cannot.

scapy is the oracle: it parses what arrives and computes checksums in its own way.
"""

import hashlib
import itertools
import struct

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw

from ports.vhost import virtio
from ports.vhost.features import RECEIVER, SENDER
from tests.datapath.bench import A, B, Bench, C
from tests.datapath.rings import DEFAULT, mac

NEEDS_CSUM, TCPV4, UDP_FRAGMENTS, TCPV6, UDP_SEGMENTS, ECN = 1, 1, 3, 4, 5, 0x80
PAYLOAD = hashlib.shake_256(b"payload").digest(20_000)
CAPABLE = DEFAULT | RECEIVER


def ethernet(*tags):
    head = Ether(dst=mac(B).hex(":"), src=mac(A).hex(":"))
    for vlan in tags:
        head /= Dot1Q(vlan=vlan)
    return head


V4 = {"src": "10.0.0.1", "dst": "10.0.0.2"}
V6 = {"src": "fd00::1", "dst": "fd00::2"}
TCP_OPTIONS = [("NOP", None), ("NOP", None), ("Timestamp", (7, 8))]

# name: headers before TCP, TCP's options
STACKS = {
    "v4": (lambda: ethernet() / IP(**V4, id=65534), []),
    "v4 options": (lambda: ethernet() / IP(**V4, id=1), TCP_OPTIONS),
    "v4 vlan": (lambda: ethernet(7) / IP(**V4), TCP_OPTIONS),
    "v4 two vlans": (lambda: ethernet(7, 8) / IP(**V4), []),
    "v6": (lambda: ethernet() / IPv6(**V6), []),
    "v6 options": (lambda: ethernet() / IPv6(**V6) / IPv6ExtHdrDestOpt(), TCP_OPTIONS),
    "v6 vlan": (lambda: ethernet(7) / IPv6(**V6), TCP_OPTIONS),
    "v6 three headers": (
        lambda: (
            ethernet()
            / IPv6(**V6)
            / IPv6ExtHdrHopByHop()
            / IPv6ExtHdrRouting(segleft=0, addresses=["fd00::3"])
            / IPv6ExtHdrDestOpt()
        ),
        [],
    ),
}


def offset_of(frame, layer):
    """Where a layer begins; lengths of what is before it."""
    return len(frame) - len(frame[layer])


def partial(frame, layer):
    """The frame's bytes with the pseudo header's sum in the checksum's place."""
    built = Ether(bytes(frame))
    data = bytearray(bytes(built))
    start = offset_of(built, layer)
    at = start + (16 if layer is TCP else 6)
    # A complete checksum is the complement of pseudo header and rest; take the rest out.
    total = ~int.from_bytes(data[at : at + 2], "big") & 0xFFFF
    data[at : at + 2] = b"\0\0"
    rest = ones_sum(bytes(data[start:]))
    pseudo = (total - rest) % 0xFFFF
    data[at : at + 2] = pseudo.to_bytes(2, "big")
    return bytes(data), start, at - start


def ones_sum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def header(start, offset, gso_type=0, gso_size=0, hdr_len=0, flags=NEEDS_CSUM):
    fields = (flags, gso_type, hdr_len, gso_size, start, offset, 0)
    return struct.pack("<BBHHHHH", *fields)


def super_frame(name, payload=PAYLOAD, mss=1400, **fields):
    """A super-frame, its header, and the gso_size."""
    stack, options = STACKS[name]
    flags = fields.pop("flags", "PA")
    frame = stack() / TCP(seq=2**32 - 5000, flags=flags, options=options)
    data, start, offset = partial(frame / Raw(payload), TCP)
    gso_type = TCPV6 if "v6" in name else TCPV4
    fields = {"gso_type": gso_type, "gso_size": mss} | fields
    return data, header(start, offset, **fields)


def super_datagram(name, payload=PAYLOAD, size=1400, **fields):
    """A UDP super-frame and its header."""
    frame = STACKS[name][0]() / UDP(sport=1, dport=2)
    data, start, offset = partial(frame / Raw(payload), UDP)
    fields = {"gso_type": UDP_SEGMENTS, "gso_size": size} | fields
    return data, header(start, offset, **fields)


@pytest.fixture
def bench(plane):
    bench = Bench(plane)
    yield bench
    bench.check_ledger()
    bench.close()


def sender(bench, features=DEFAULT | SENDER):
    return bench.guest(A, features=features, size=64)


def receiver(bench, slot, features=DEFAULT, count=60, length=2048, size=64):
    guest = bench.guest(slot, features=features, size=size)
    bench.plane.shared.ports[slot]["offloads"] = features & RECEIVER
    guest.post(count, length=length, base=0x40000)
    return guest


def send(guest, data, head, cuts=()):
    """Offer header and frame as one descriptor, or cut at `cuts`."""
    whole = head + data
    edges = [0, *cuts, len(whole)]
    for n, (begin, end) in enumerate(itertools.pairwise(edges)):
        last = end == len(whole)
        gpa = guest.put(0x20000 + begin + 64 * n, whole[begin:end])
        guest.tx.describe(n, gpa, end - begin, 0 if last else 1, n + 1)
    guest.tx.offer(0)


def received(guest, length=2048):
    """(header, frame) of everything that arrived."""
    frames, back = [], guest.rx.reap()
    while back:
        data = b""
        first = guest.buffer(back[0][0], 12, size=length)
        for _ in range(struct.unpack_from("<H", first, 10)[0]):
            head, written = back.pop(0)
            data += guest.buffer(head, written, size=length)
        frames.append((data[:12], data[12:]))
    return frames


def assert_computed_fields_are_right(frame):
    """Checksums and lengths are what scapy makes them."""
    parsed = Ether(frame)
    again = Ether(frame)
    for layer, fields in (
        (IP, ("chksum", "len")),
        (IPv6, ("plen",)),
        (TCP, ("chksum",)),
        (UDP, ("chksum", "len")),
    ):
        for field in fields if layer in again else ():
            delattr(again[layer], field)
    assert bytes(again) == bytes(parsed) == frame


@pytest.mark.parametrize("layer", [TCP, UDP])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 1001, 1400])
@pytest.mark.parametrize("stack", ["v4", "v4 vlan", "v6"])
def test_a_checksum_is_completed_for_who_cannot(bench, layer, length, stack):
    a, b = sender(bench), receiver(bench, B)
    frame = STACKS[stack][0]() / layer() / Raw(PAYLOAD[:length])
    data, start, offset = partial(frame, layer)
    send(a, data, header(start, offset))
    bench.turn()
    ((head, got),) = received(b)
    assert head == bytes(10) + b"\1\0"
    assert got == bytes(Ether(bytes(frame)))
    assert bench.tally(B)["tx_csum_completed"] == 1


def test_a_udp_checksum_of_zero_is_sent_as_all_ones(bench):
    a, b = sender(bench), receiver(bench, B)
    frame = ethernet() / IP(**V4) / UDP(sport=1, dport=2) / Raw(b"ab")
    data, start, offset = partial(frame, UDP)
    # Choose the payload so that the whole sums up to 0xffff.
    data = bytearray(data)
    rest = ones_sum(bytes(data[start:-2]))
    data[-2:] = (0xFFFF - rest).to_bytes(2, "big")
    send(a, bytes(data), header(start, offset))
    bench.turn()
    ((_, got),) = received(b)
    assert got[start + offset : start + offset + 2] == b"\xff\xff"


@pytest.mark.parametrize("cuts", [(), (12,), (5, 30, 70), (12, 66, 5000, 9000)])
@pytest.mark.parametrize("stack", STACKS)
def test_a_super_frame_is_cut_for_who_cannot(bench, stack, cuts):
    a, b = sender(bench), receiver(bench, B)
    data, head = super_frame(stack)
    send(a, data, head, cuts)
    bench.turn()
    frames = received(b)
    original = Ether(data)
    assert len(frames) == -(-len(PAYLOAD) // 1400)
    sequence = original[TCP].seq
    payload = b""
    for number, (got_head, frame) in enumerate(frames):
        assert got_head == bytes(10) + b"\1\0"
        assert_computed_fields_are_right(frame)
        parsed = Ether(frame)
        part = bytes(parsed[TCP].payload)
        assert parsed[TCP].seq == (sequence + len(payload)) % 2**32
        assert ("P" in str(parsed[TCP].flags)) == (number == len(frames) - 1)
        if IP in parsed:
            assert parsed[IP].id == (original[IP].id + number) % 65536
        payload += part
    assert payload == PAYLOAD
    tally = bench.tally(B)
    assert (tally["tx_gso_split"], tally["tx_gso_segments"]) == (1, len(frames))


@pytest.mark.parametrize("cuts", [(), (12,), (5, 30, 70), (12, 66, 5000, 9000)])
@pytest.mark.parametrize("stack", STACKS)
def test_a_udp_super_frame_is_cut_for_who_cannot(bench, stack, cuts):
    a, b = sender(bench), receiver(bench, B)
    data, head = super_datagram(stack)
    send(a, data, head, cuts)
    bench.turn()
    frames = received(b)
    original = Ether(data)
    parts = []
    for number, (got_head, frame) in enumerate(frames):
        assert got_head == bytes(10) + b"\1\0"
        assert_computed_fields_are_right(frame)
        parsed = Ether(frame)
        if IP in parsed:
            assert parsed[IP].id == (original[IP].id + number) % 65536
        assert (parsed[UDP].sport, parsed[UDP].dport) == (1, 2)
        head_len = offset_of(parsed, UDP)
        changed = {"v4": range(16, 26), "v6": range(18, 20)}[stack[:2]]
        shift = 4 * stack.count("vlan") + 4 * ("two" in stack)
        before, after = bytearray(data[:head_len]), bytearray(frame[:head_len])
        for at in changed:
            before[at + shift] = after[at + shift] = 0
        assert after == before
        parts.append(bytes(parsed[UDP].payload))
    assert parts == [PAYLOAD[at : at + 1400] for at in range(0, len(PAYLOAD), 1400)]
    tally = bench.tally(B)
    assert (tally["tx_gso_split"], tally["tx_gso_segments"]) == (1, len(frames))


def test_a_udp_segment_whose_checksum_is_zero_says_all_ones(bench):
    a, b = sender(bench), receiver(bench, B)
    first = Ether(bytes(ethernet() / IP(**V4) / UDP(sport=1, dport=2) / Raw(bytes(40))))
    payload = bytes(38) + first[UDP].chksum.to_bytes(2, "big") + bytes(7)
    data, head = super_datagram("v4", payload, 40)
    send(a, data, head)
    bench.turn()
    checksums = [Ether(frame)[UDP].chksum for _, frame in received(b)]
    assert checksums[0] == 0xFFFF
    assert checksums[1] not in (0, 0xFFFF)


def test_a_short_datagram_may_be_cut_into_single_bytes(bench):
    a, b = sender(bench), receiver(bench, B)
    data, head = super_datagram("v4", PAYLOAD[:50], 1)
    send(a, data, head)
    bench.turn()
    payloads = [Ether(frame)[UDP].load for _, frame in received(b)]
    assert payloads == [PAYLOAD[at : at + 1] for at in range(50)]


def test_more_segments_than_a_burst_arrive_in_order(bench):
    a, b = sender(bench), receiver(bench, B, length=512)
    data, head = super_frame("v4", payload=PAYLOAD[:11_000], mss=200)
    send(a, data, head)
    bench.turn()
    payload = b"".join(bytes(Ether(f)[TCP].payload) for _, f in received(b, 512))
    assert payload == PAYLOAD[: 200 * 55]
    data, head = super_frame("v4", payload=PAYLOAD[:9_000], mss=100)
    b.rx.offer(*range(55))
    send(a, data, head)
    bench.turn()
    tally = bench.tally(B)
    assert tally["tx_gso_segments"] == 55 + 90
    assert tally["tx_drop_ring_full"] == 90 - 60


def test_nothing_more_is_cut_where_nothing_arrives_any_more(bench):
    a, b = sender(bench), receiver(bench, B, count=0)
    data, head = super_frame("v4", mss=100)
    send(a, data, head)
    bench.turn()
    assert received(b) == []
    tally = bench.tally(B)
    assert tally["tx_gso_segments"] == tally["tx_drop_ring_full"] == 64


def test_a_burst_is_cut_into_so_many_segments_and_no_more(bench):
    a = sender(bench)
    b = receiver(bench, B, count=2000, length=128, size=2048)
    able = receiver(bench, C, CAPABLE)
    data, head = super_frame("v4", payload=PAYLOAD[:9600], mss=32)
    plain = mac(B) + mac(A) + b"\x88\xb5" + bytes(50)
    half, start, offset = partial(ethernet() / IP(**V4) / UDP() / Raw(b"whole"), UDP)
    offered = [(data, head)] * 6 + [(plain, bytes(12)), (half, header(start, offset))]
    for n, (frame, frame_head) in enumerate(offered):
        gpa = a.put(0x20000 + 0x4000 * n, frame_head + frame)
        a.tx.describe(n, gpa, 12 + len(frame))
    a.tx.offer(*range(len(offered)))
    bench.turn()
    tally = bench.tally(B)
    # 3 times 300; of the fourth, whole bursts until there are 1024; the rest counts once.
    made = 3 * 300 + 2 * 64
    assert (tally["tx_gso_split"], tally["tx_gso_segments"]) == (4, made + 1)
    assert bench.drops(B) == {"tx_drop_gso_limit": 1 + 2}
    frames = [frame for _, frame in received(b, 128)]
    assert len(frames) == tally["tx_frames"] == made + 2
    assert frames[-2] == plain
    assert Ether(frames[-1])[UDP].load == b"whole"
    payload = b"".join(bytes(Ether(frame)[TCP].payload) for frame in frames[:-2])
    assert payload == PAYLOAD[:9600] * 3 + PAYLOAD[: 128 * 32]
    copies = tally["tx_frames"] + 3 - tally["tx_gso_segments"] + tally["tx_gso_split"]
    assert copies == len(offered)
    # Nobody knew where to send it, so all did; who takes it as it is has no limit.
    assert len(received(able)) == len(offered)
    assert bench.drops(C) == {}
    a.tx.offer(0, 1, 2)  # the next burst
    bench.turn()
    assert bench.tally(B)["tx_gso_segments"] == made + 1 + 3 * 300


@pytest.mark.parametrize("make", [super_frame, super_datagram])
@pytest.mark.parametrize("stack", ["v4", "v6 vlan"])
@pytest.mark.parametrize("cuts", [(), (5, 30, 70)])
def test_a_super_frame_passes_untouched_to_who_can(bench, make, stack, cuts):
    a, b = sender(bench), receiver(bench, B, CAPABLE)
    data, head = make(stack, hdr_len=90)
    send(a, data, head, cuts)
    bench.turn()
    ((got_head, got),) = received(b)
    buffers = -(-(len(data) + 12) // 2048)
    assert got_head == head[:10] + struct.pack("<H", buffers)
    assert got == data
    assert "tx_gso_split" not in bench.tally(B)


def test_a_flood_does_both_at_once(bench):
    a = sender(bench)
    able, unable = receiver(bench, B, CAPABLE), receiver(bench, C)
    data, head = super_frame("v4")
    data = b"\xff" * 6 + data[6:]
    send(a, data, head)
    bench.turn()
    ((_, got),) = received(able)
    assert got == data
    frames = [frame for _, frame in received(unable)]
    assert b"".join(bytes(Ether(frame)[TCP].payload) for frame in frames) == PAYLOAD
    assert bench.tally(A)["rx_flooded"] == 1


def test_order_holds_between_plain_and_lowered_frames(bench):
    a, b = sender(bench), receiver(bench, B)
    data, head = super_frame("v4", payload=PAYLOAD[:3000], mss=1000)
    plain = [mac(B) + mac(A) + b"\x88\xb5" + bytes([n]) * 50 for n in range(3)]
    offered = [(plain[0], bytes(12)), (data, head), (plain[1], bytes(12))]
    offered += [(data, head), (plain[2], bytes(12))]
    for n, (frame, frame_head) in enumerate(offered):
        gpa = a.put(0x20000 + 0x1000 * n, frame_head + frame)
        a.tx.describe(n, gpa, 12 + len(frame))
    a.tx.offer(*range(5))
    bench.turn()
    kinds = [frame[12:15] for _, frame in received(b)]
    ip = data[12:15]
    marks = [b"\x88\xb5" + bytes([n]) for n in range(3)]
    assert kinds == [marks[0], *[ip] * 3, marks[1], *[ip] * 3, marks[2]]


def test_congestion_is_reported_in_the_first_segment_only(bench):
    a, b = sender(bench), receiver(bench, B)
    data, head = super_frame("v4", flags="CEA", gso_type=TCPV4 | ECN)
    send(a, data, head)
    bench.turn()
    marked = ["C" in str(Ether(frame)[TCP].flags) for _, frame in received(b)]
    assert marked == [True] + [False] * (len(marked) - 1)
    assert len(marked) > 1


@pytest.mark.parametrize("missing", [virtio.F_GUEST_ECN, virtio.F_GUEST_TSO4])
def test_what_a_receiver_lacks_decides(bench, missing):
    a, b = sender(bench), receiver(bench, B, CAPABLE & ~missing)
    data, head = super_frame("v4", gso_type=TCPV4 | ECN)
    send(a, data, head)
    bench.turn()
    assert len(received(b)) == -(-len(PAYLOAD) // 1400)


@pytest.mark.parametrize("stack", ["v4", "v6"])
@pytest.mark.parametrize(
    "missing", [virtio.F_GUEST_USO4, virtio.F_GUEST_USO6, virtio.F_GUEST_CSUM]
)
def test_half_of_udp_segmentation_is_none(bench, missing, stack):
    a, b = sender(bench), receiver(bench, B, CAPABLE & ~missing)
    data, head = super_datagram(stack)
    send(a, data, head)
    bench.turn()
    assert len(received(b)) == -(-len(PAYLOAD) // 1400)


def test_the_mtu_is_compared_with_the_segment_not_the_super_frame(bench):
    a, b = sender(bench), receiver(bench, B, CAPABLE)
    bench.plane.shared.ports[B]["max_frame"] = 1514
    data, head = super_frame("v4", mss=1460, hdr_len=54)
    send(a, data, head)
    bench.turn()
    assert len(received(b)) == 1
    data, head = super_frame("v4", mss=1461, hdr_len=54)
    send(a, data, head)
    bench.turn()
    assert bench.drops(B) == {"tx_drop_too_long": 1}


GOOD = {"start": 34, "offset": 16, "gso_type": TCPV4, "gso_size": 1400}
LIES = {
    "checksum beyond the frame": {"start": 60_000},
    "checksum across the end": {"start": 20_052 - 16, "offset": 17},
    "offset that wraps": {"start": 65_535, "offset": 65_535},
    "checksum in the addresses": {"start": 13},
    "no segment size": {"gso_size": 0},
    "absurd segment size": {"gso_size": 1},
    "unknown type": {"gso_type": 2},
    "udp segmentation that was not negotiated": {"gso_type": UDP_SEGMENTS, "offset": 6},
    "checksum where none is": {"offset": 6},
    "type that was not negotiated": {"gso_type": TCPV6},
    "ecn that was not negotiated": {"gso_type": TCPV4 | ECN},
    "congestion alone": {"gso_type": ECN},
    "segments without a checksum": {"flags": 0},
    "header longer than the frame": {"hdr_len": 30_000},
    # A burst of these, cut for one port, took 26 ms.
    "headers longer than the payload": {"start": 513},
}


UDP_GOOD = {"start": 34, "offset": 6, "gso_type": UDP_SEGMENTS, "gso_size": 1400}
UDP_LIES = {
    "checksum where none is": {"offset": 16},
    "header across the end": {"start": 20_042 - 7, "offset": 5},
    "no segment size": {"gso_size": 0},
    "absurd segment size": {"gso_size": 9},
    "congestion": {"gso_type": UDP_SEGMENTS | ECN},
    "segments without a checksum": {"flags": 0},
    "header longer than the frame": {"hdr_len": 30_000},
    "headers longer than the payload": {"start": 513},
    # Offered to nobody, so nobody has negotiated it.
    "fragments": {"gso_type": UDP_FRAGMENTS},
    "fragments and congestion": {"gso_type": UDP_FRAGMENTS | ECN},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
@pytest.mark.parametrize("cuts", [(), (5, 30, 70)])
def test_a_header_that_lies_is_refused_and_counted(bench, lie, cuts):
    features = DEFAULT | virtio.F_CSUM | virtio.F_HOST_TSO4
    a, b = sender(bench, features), receiver(bench, B, CAPABLE)
    data, _ = super_frame("v4")
    send(a, data, header(**(GOOD | lie)), cuts)
    bench.turn()
    assert bench.drops(A) == {"rx_drop_bad_header": 1}
    assert received(b) == []
    assert a.tx.reap() == [(0, 0)]


def test_the_same_header_without_a_lie_is_taken(bench):
    features = DEFAULT | virtio.F_CSUM | virtio.F_HOST_TSO4
    a, b = sender(bench, features), receiver(bench, B, CAPABLE)
    data, _ = super_frame("v4")
    send(a, data, header(**GOOD))
    bench.turn()
    assert len(received(b)) == 1


@pytest.mark.parametrize("lie", UDP_LIES.values(), ids=UDP_LIES)
def test_a_header_that_lies_of_a_datagram_is_refused_and_counted(bench, lie):
    a, b = sender(bench), receiver(bench, B, CAPABLE)
    data, _ = super_datagram("v4")
    for fields in (UDP_GOOD | lie, UDP_GOOD):
        send(a, data, header(**fields))
        bench.turn()
    assert bench.drops(A) == {"rx_drop_bad_header": 1}
    assert len(received(b)) == 1


def test_a_checksum_that_was_not_negotiated_is_refused(bench):
    a = sender(bench, DEFAULT)
    receiver(bench, B)
    data, _ = super_frame("v4")
    send(a, data, header(34, 16))
    bench.turn()
    assert bench.drops(A) == {"rx_drop_bad_header": 1}


def test_a_valid_mark_is_not_passed_on(bench):
    a, b = sender(bench), receiver(bench, B, CAPABLE)
    frame = mac(B) + mac(A) + b"\x88\xb5" + bytes(50)
    send(a, frame, header(0, 0, flags=2))
    bench.turn()
    assert received(b) == [(bytes(10) + b"\1\0", frame)]


def change(at, value):
    def apply(data):
        return data[:at] + bytes([value]) + data[at + 1 :]

    return apply


BAD_BYTES = {
    "another version": change(14, 0x65),
    "another ethertype": change(13, 1),
    "another protocol": change(23, 17),
    "longer ip header": change(14, 0x46),
    "shorter ip header": change(14, 0x44),
    "tcp header too short": change(46, 0x40),
    "nothing but headers": lambda data: data[:54],
}


@pytest.mark.parametrize("damage", BAD_BYTES.values(), ids=BAD_BYTES)
def test_bytes_that_are_not_what_the_header_says_are_counted(bench, damage):
    a, b = sender(bench), receiver(bench, B)
    data, head = super_frame("v4")
    send(a, damage(data), head)
    bench.turn()
    assert received(b) == []
    assert bench.drops(B) == {"tx_drop_bad_offload": 1}


UDP_BAD_BYTES = {
    "another version": change(14, 0x65),
    "another ethertype": change(13, 1),
    "another protocol": change(23, 6),
    "longer ip header": change(14, 0x46),
    "shorter ip header": change(14, 0x44),
    "nothing but headers": lambda data: data[:42],
}


@pytest.mark.parametrize("damage", UDP_BAD_BYTES.values(), ids=UDP_BAD_BYTES)
def test_bytes_that_are_no_datagram_are_counted(bench, damage):
    a, b = sender(bench), receiver(bench, B)
    data, head = super_datagram("v4")
    send(a, damage(data), head)
    bench.turn()
    assert received(b) == []
    assert bench.drops(B) == {"tx_drop_bad_offload": 1}


@pytest.mark.parametrize(
    "extension",
    [IPv6ExtHdrFragment(), IPv6ExtHdrRouting(segleft=1, addresses=["fd00::3"])],
    ids=["a fragment", "a route to be followed"],
)
@pytest.mark.parametrize("layer", [TCP, UDP])
def test_what_cannot_be_cut_is_counted(bench, layer, extension):
    a, b = sender(bench), receiver(bench, B)
    above = {TCP: TCP(), UDP: UDP(sport=1, dport=2)}[layer]
    frame = ethernet() / IPv6(**V6) / extension / above / Raw(PAYLOAD)
    data = bytes(frame)
    gso_type, offset = {TCP: (TCPV6, 16), UDP: (UDP_SEGMENTS, 6)}[layer]
    start = len(data) - len(PAYLOAD) - len(above)
    send(a, data, header(start, offset, gso_type, 1400))
    bench.turn()
    assert received(b) == []
    assert bench.drops(B) == {"tx_drop_bad_offload": 1}


def test_buffers_of_one_descriptor_without_merging_take_segments(bench):
    a = sender(bench)
    receiver(bench, B, DEFAULT & ~virtio.F_MRG_RXBUF)
    data, head = super_frame("v4")
    send(a, data, head)
    bench.turn()
    assert bench.drops(B) == {}
    assert bench.tally(B)["tx_frames"] == -(-len(PAYLOAD) // 1400)
