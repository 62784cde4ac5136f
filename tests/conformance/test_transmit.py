"""Frames that a guest sends: every shape, and every lie. Checklist 51 to 59."""

import contextlib
import itertools
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scapy.layers.inet import IP, TCP, UDP, in4_pseudoheader
from scapy.layers.inet6 import IPv6, in6_pseudoheader
from scapy.layers.l2 import Ether
from scapy.packet import Raw
from scapy.utils import checksum

from ports.vhost import virtio
from ports.vhost.features import RECEIVER, SENDER
from ports.vhost.messages import MemTable
from ports.vhost.virtio import NET_HDR_LEN_LEGACY
from tests.conformance import race
from tests.conformance.hand import PROTOCOL_FEATURES, RX, TX
from tests.conformance.wire import cut_region
from tests.datapath.rings import DEFAULT, INDIRECT, NEXT
from tests.switch import dropped
from tests.system.net import BROADCAST, frame

PLAIN = DEFAULT | PROTOCOL_FEATURES
STATION = b"\x02\x00\x00\x00\x00\x0a"
OTHER = b"\x02\x00\x00\x00\x00\x0b"
NOWHERE = 1 << 60
DATA, TABLE = 0x20000, 0x30000  # in the guest's memory
NEEDS_CSUM, DATA_VALID = 1, 2
TCPV4, TCPV6 = 1, 4
CLEAN = bytes(10) + b"\1\0"
PAYLOAD = bytes(7 * n % 251 for n in range(20_000))
MSS = 1400


def descriptors(guest, data, cuts=()):
    """Put data into memory in pieces, cut there, apart from each other: (gpa, length)."""
    edges = [0, *cuts, len(data)]
    return [
        (guest.put(DATA + begin + 64 * n, data[begin:end]), end - begin)
        for n, (begin, end) in enumerate(itertools.pairwise(edges))
    ]


def write_chain(guest, parts, first=0):
    """Direct descriptors one behind the other, (gpa, length[, flags])."""
    last = first + len(parts) - 1
    for n, (gpa, length, *flags) in enumerate(parts, start=first):
        more = NEXT if n < last else 0
        guest.tx.describe(n, gpa, length, sum(flags) | more, n + 1 if more else 0)


def write_table(guest, parts, offset=TABLE):
    """An indirect table of these; its descriptor."""
    last = len(parts) - 1
    for n, (gpa, length, *flags) in enumerate(parts):
        more = NEXT if n < last else 0
        entry = struct.pack(
            "<QIHH", gpa, length, sum(flags) | more, n + 1 if more else 0
        )
        guest.write(offset + 16 * n, entry)
    return guest.gpa + offset, 16 * len(parts), INDIRECT


def assert_passes(net, guest, wanted, head=0):
    """The chain at `head` is `wanted` for both witnesses, and comes back."""
    net.drain()
    guest.tx.offer(head)
    for witness in net.witnesses:
        assert witness.receive(timeout=10.0) == [wanted]
    assert guest.tx.wait_back() == [(head, 0)]


def assert_dropped(net, guest, counter, head=0):
    """The chain at `head` comes back, is nobody's frame, and counted under one name."""
    net.drain()
    before = net.switch.counters("a")
    guest.tx.offer(head)
    assert guest.tx.wait_back() == [(head, 0)]
    net.wait_for_count("a", counter, before[counter] + 1)
    after = net.switch.counters("a")
    assert dropped(after, "rx") == dropped(before, "rx") + 1
    assert after["broken_rings"] == before["broken_rings"]
    assert [witness.receive(timeout=0) for witness in net.witnesses] == [[], []]


@pytest.mark.parametrize(
    "cuts",
    [
        (),
        (12,),
        (5,),
        (26,),
        (12, 13, 60),
        tuple(range(1, 13)),
        tuple(range(1, 62)),
    ],
    ids=["glued", "apart", "in header", "in frame", "three", "header", "all"],
)
@pytest.mark.parametrize("header_len", [12, NET_HDR_LEN_LEGACY])
def test_51_a_header_may_be_apart_or_glued_or_in_pieces(net, cuts, header_len):
    """[VIRTIO][CVE-2022-2132]"""
    features = PLAIN if header_len == 12 else PROTOCOL_FEATURES
    guest = net.by_hand("a", features=features, header_len=header_len, size=128)
    wanted = frame(BROADCAST, STATION, 62 - header_len)
    for _ in range(3):
        data = bytes(header_len) + wanted
        write_chain(guest, descriptors(guest, data, cuts))
        assert_passes(net, guest, wanted)


def good_tables(guest):
    """Chains with an indirect table that are the same frame, by what is special."""
    data = bytes(12) + frame(BROADCAST, STATION, 200)

    def many():
        parts = descriptors(guest, data, range(12, 12 + 13 * (guest.size - 1), 13))
        assert len(parts) == guest.size
        return parts

    yield "one entry", [write_table(guest, descriptors(guest, data))]
    yield "as many as the ring is long", [write_table(guest, many())]
    first, rest = descriptors(guest, data, (12,))
    yield "behind a direct one", [first, write_table(guest, [rest])]
    first, second, *rest = many()
    yield "behind two", [first, second, write_table(guest, rest)]
    yield "across two regions", [write_table(guest, many(), TABLE + CUT - 16 * 3)]


CUT = 0x800  # of TABLE: where one region ends and another begins


def bad_tables(guest):
    """Chains with an indirect table that cannot be."""
    whole = descriptors(guest, bytes(12) + frame(BROADCAST, STATION, 200))
    gpa, _ = whole[0]
    pieces = [(gpa, 12), *[(gpa + 12, 4)] * guest.size]
    nested = write_table(guest, whole, TABLE + 0x200)
    yield "nested", [write_table(guest, [nested])]
    yield "nested behind a piece", [write_table(guest, [(gpa, 12), nested])]
    yield "an entry too many", [write_table(guest, pieces)]
    table, _, flag = write_table(guest, whole)
    for size in (0, 1, 15, 17, 24):
        yield f"{size} bytes", [(table, size, flag)]
    yield "nowhere", [(NOWHERE, 16, flag)]
    yield "around the end of addresses", [((1 << 64) - 8, 16, flag)]
    yield "with a next one", [(table, 16, flag), whole[0]]


def test_52_indirect_tables(net):
    """[VIRTIO]"""
    guest = net.prepared_by_hand("a")
    guest.table = MemTable(cut_region(guest.table.regions[0], TABLE + CUT))
    guest.open()
    net.switch.wait_for_state("a", "up")
    wanted = frame(BROADCAST, STATION, 200)
    for _, parts in good_tables(guest):
        write_chain(guest, parts)
        assert_passes(net, guest, wanted)
    for _, parts in bad_tables(guest):
        write_chain(guest, parts)
        assert_dropped(net, guest, "rx_drop_bad_chain")
    for _, parts in good_tables(guest):
        write_chain(guest, parts)
        assert_passes(net, guest, wanted)


def test_53_a_chain_that_holds_no_frame_is_given_back(net):
    """And elements of no length in a frame are passed over. [CVE-2022-2132]"""
    guest = net.by_hand("a")
    wanted = frame(BROADCAST, STATION, 60)
    gpa = guest.put(DATA, bytes(12) + wanted)
    for parts in (
        [(gpa, 0)],
        [(gpa, 1)],
        [(gpa, 11)],
        [(gpa, 12)],
        [(gpa, 5), (gpa, 7)],
        [(gpa, 0)] * 16,
        [(NOWHERE, 0), (gpa, 12)],
        [(gpa, 12), (NOWHERE, 0)],
    ):
        write_chain(guest, parts)
        assert_dropped(net, guest, "rx_drop_bad_chain")
    write_chain(guest, [(gpa, 12), (gpa + 12, 13)])
    assert_dropped(net, guest, "rx_drop_too_short")
    write_chain(guest, [(gpa, 0), (gpa, 12), (NOWHERE, 0), (gpa + 12, 60), (gpa, 0)])
    assert_passes(net, guest, wanted)


def offer_wrong_heads(side, heads, jump):
    side.offer(*heads)
    if jump:
        side.jump(jump)


@pytest.mark.parametrize("index", [RX, TX], ids=["receive", "transmit"])
@pytest.mark.parametrize(
    ("heads", "jump"),
    [([16], 0), ([0xFFFF], 0), ([], 17), ([], 0x8000), ([], 0xFFFF), ("packed", 0)],
    ids=["head", "far head", "jump", "far jump", "step back", "packed"],
)
def test_54_indexes_that_make_no_sense_break_the_ring(net, index, heads, jump):
    """A chain that loops costs only itself. [VIRTIO]"""
    packed = heads == "packed"
    guest = net.by_hand("a", packed=packed)
    side, other = guest.sides[index], guest.sides[1 - index]
    sender = net.witnesses[0]
    if packed:  # a chain of as many as there are, and it goes on
        side.offer(
            1, *[(guest.put(DATA, bytes(16)), 16, NEXT | 2 * (index == RX))] * 16
        )
    else:
        guest.tx.describe(0, guest.put(DATA, bytes(64)), 64, NEXT, 0)
        assert_dropped(net, guest, "rx_drop_bad_chain")
        offer_wrong_heads(side, heads, jump)
    sender.send_all(frame(BROADCAST, sender))
    sender.wait_sent()
    port = net.switch.wait_for_port("a", lambda port: "broken" in port["reason"])
    assert f"virtqueue {index} is broken" in port["reason"]
    assert (side.errors(), other.errors()) == (1, 0)
    net.wait_for_count("a", "broken_rings", 1)
    net.assert_undisturbed()
    guest.stop()
    if not packed:
        guest.lay_out()
        guest.start()
        assert "broken" not in net.switch.port("a")["reason"]
        guest.send(frame(BROADCAST, STATION))
        assert guest.tx.wait_back() == [(0, 0)]


@contextlib.contextmanager
def changing(guest, *words):
    """Let another process write (offset, kind, one value, other value) all the while."""
    arguments = [guest.fd, guest.length, *itertools.chain(*words)]
    process = subprocess.Popen(
        [sys.executable, str(Path(race.__file__)), *map(str, arguments)],
        pass_fds=[guest.fd],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline()
        yield
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_55_bytes_that_change_meanwhile_were_judged_or_do_not_arrive(net):
    """Addresses, header and descriptors, all at once. [CVE-2020-14375 class]"""
    features = PLAIN | SENDER
    guest = net.by_hand("a", features=features, size=64)
    ends = {
        STATION: net.by_hand("b", features=PLAIN | RECEIVER, size=256),
        OTHER: net.by_hand("c", features=PLAIN | RECEIVER, size=256),
    }
    for mac, name in zip(ends, "bc", strict=True):
        net.switch.ask("fdb_add", mac=mac.hex(":"), ifname=name)
    source = b"\x02\x00\x00\x00\x01\x00"
    data, start, offset = partial(Ether(dst=STATION, src=source) / IP() / TCP(), TCP)
    gpa = guest.put(DATA, header(start, offset) + data)
    for slot in range(64):
        guest.tx.describe(slot, gpa, 12 + len(data))
    for end in ends.values():
        end.post(256, length=512)
    words = [
        (DATA + 12 + 5, "B", STATION[5], OTHER[5]),
        (DATA + 6, "H", start, 60_000),  # csum_start
        *((guest.tx.desc + 16 * n, "Q", gpa, NOWHERE) for n in range(0, 64, 8)),
        *((guest.tx.desc + 16 * n + 8, "I", 66, 1 << 31) for n in range(4, 64, 8)),
    ]
    arrived = dict.fromkeys(ends, 0)
    deadline = time.monotonic() + 60
    with changing(guest, *words):
        # Whoever changes them may not have had a processor for long.
        for turn in itertools.count():
            if (turn >= 300 and all(arrived.values())) or time.monotonic() > deadline:
                break
            guest.tx.offer(*range(64))
            assert guest.tx.wait_back(64) == [(head, 0) for head in range(64)]
            for mac, end in ends.items():
                back = end.rx.reap()
                for head, length in back:
                    got = end.buffer(head, length, size=512)
                    assert got[:12] == header(start, offset, num_buffers=1)
                    assert got[12:] == mac + data[6:]
                end.rx.offer(*(head for head, _ in back))
                arrived[mac] += len(back)
    assert all(arrived.values()), arrived
    assert net.switch.counters("a")["rx_drop_bad_header"]
    assert net.switch.counters("a")["rx_drop_bad_chain"]


def test_56_chains_come_back_in_order_with_nothing_written_and_at_once(net):
    """[VIRTIO IN_ORDER]"""
    guest = net.by_hand("a", size=64)
    gpa = guest.put(DATA, bytes(12) + frame(OTHER, STATION))
    net.switch.ask("fdb_add", mac=OTHER.hex(":"), ifname="w1")
    for slot in range(64):
        guest.tx.describe(slot, gpa, 72)
    heads = [(11 * n + 5) % 64 for n in range(64)]
    for _ in range(200):
        before = guest.tx.used_idx()
        guest.tx.offer(*heads)
        seen = {before}
        while (now := guest.tx.used_idx()) == before or len(seen) < 2:
            seen.add(now)
        assert seen == {before, (before + 64) & 0xFFFF}
        assert guest.tx.reap() == [(head, 0) for head in heads]
        net.drain()
    net.switch.ask("fdb_del", mac=OTHER.hex(":"))


def partial(packet, layer):
    """Bytes with only the pseudo header summed up; where the checksum begins and is."""
    packet = Ether(bytes(packet))
    segment = packet[layer]
    size = len(segment)
    proto = {TCP: 6, UDP: 17}[layer]
    if IP in packet:
        pseudo = in4_pseudoheader(proto, packet[IP], size)
    else:
        pseudo = in6_pseudoheader(proto, packet[IPv6], size)
    segment.chksum = ~checksum(bytes(pseudo)) & 0xFFFF
    start = len(packet) - size
    return bytes(packet), start, {TCP: 16, UDP: 6}[layer]


def header(start=0, offset=0, flags=NEEDS_CSUM, **fields):
    """A virtio-net header."""
    record = np.zeros(1, virtio.NET_HDR)
    fields |= {"csum_start": start, "csum_offset": offset, "flags": flags}
    for name, value in fields.items():
        record[name] = value
    return record.tobytes()


STACKS = {
    "v4": lambda: Ether(dst=OTHER, src=STATION) / IP(src="10.0.0.1", dst="10.0.0.2"),
    "v6": lambda: Ether(dst=OTHER, src=STATION) / IPv6(src="fd00::1", dst="fd00::2"),
}


def offload_pair(net, receiver=0, sender=SENDER):
    """A guest that may send anything, and one that takes what `receiver` says."""
    a = net.by_hand("a", features=PLAIN | sender, size=64)
    b = net.by_hand("b", features=PLAIN | receiver, size=64)
    net.switch.ask("fdb_add", mac=OTHER.hex(":"), ifname="b")
    b.post(60)
    return a, b


def send(guest, head, data):
    gpa = guest.put(DATA, head + data)
    guest.tx.describe(0, gpa, len(head) + len(data))
    guest.tx.offer(0)
    assert guest.tx.wait_back() == [(0, 0)]


def arrived(guest):
    """(header, frame) of all that is there."""
    frames, back = [], guest.rx.reap()
    while back:
        first = guest.buffer(back[0][0], 12)
        count = int.from_bytes(first[10:], "little")
        parts = [guest.buffer(*back.pop(0)) for _ in range(count)]
        frames.append((first, b"".join(parts)[12:]))
    return frames


@pytest.mark.parametrize("layer", [TCP, UDP])
@pytest.mark.parametrize("stack", STACKS)
def test_57_a_checksum_is_completed_for_who_cannot(net, stack, layer):
    """[VIRTIO]"""
    a, b = offload_pair(net)
    for length in (0, 1, 2, 7, 1001, 1400):
        whole = bytes(STACKS[stack]() / layer(sport=1, dport=2) / Raw(PAYLOAD[:length]))
        data, start, offset = partial(whole, layer)
        assert data != whole
        send(a, header(start, offset), data)
        assert arrived(b) == [(CLEAN, whole)]
    net.wait_for_count("b", "tx_csum_completed", 6)


@pytest.mark.parametrize("stack", STACKS)
def test_58_a_super_frame_is_cut_for_who_cannot(net, stack):
    """And what cannot be cut is counted. [VIRTIO]"""
    a, b = offload_pair(net)
    packet = STACKS[stack]() / TCP(seq=2**32 - 5000, flags="PA") / Raw(PAYLOAD)
    data, start, offset = partial(packet, TCP)
    kind = {"v4": TCPV4, "v6": TCPV6}[stack]
    head = header(start, offset, gso_type=kind, gso_size=MSS, hdr_len=start + 20)
    send(a, head, data)
    payload = b""
    for clean, segment in arrived(b):
        assert clean == CLEAN
        parsed, again = Ether(segment), Ether(segment)
        for layer in (IP, TCP):
            if layer in again:
                del again[layer].chksum
        assert bytes(again) == segment
        assert parsed[TCP].seq == (2**32 - 5000 + len(payload)) % 2**32
        part = bytes(parsed[TCP].payload)
        assert len(part) <= MSS
        payload += part
    assert payload == PAYLOAD
    damaged = data[: start + 12] + b"\x40" + data[start + 13 :]  # no TCP header is so
    send(a, head, damaged)
    assert arrived(b) == []
    net.wait_for_count("b", "tx_drop_bad_offload", 1)


LIES = {
    "checksum beyond the frame": {"start": 60_000},
    "checksum across the end": {"start": 20_052 - 16, "offset": 17},
    "sum of start and offset wraps": {"start": 65_535, "offset": 65_535},
    "checksum in the addresses": {"start": 13},
    "no segment size": {"gso_size": 0},
    "a segment a byte": {"gso_size": 1},
    "unknown type": {"gso_type": 2},
    "udp fragmentation": {"gso_type": 3},
    "type that was not negotiated": {"gso_type": TCPV6},
    "segments without a checksum": {"flags": 0},
    "congestion alone": {"gso_type": 0x80},
}


def test_59_a_header_that_lies_is_dropped_and_a_mark_is_cleaned(net):
    """[CVE-2024-11614][DPDK 7023f3e532]"""
    negotiated = virtio.F_CSUM | virtio.F_HOST_TSO4
    a, b = offload_pair(net, RECEIVER, negotiated)
    data, start, offset = partial(STACKS["v4"]() / TCP() / Raw(PAYLOAD), TCP)
    truth = {"start": start, "offset": offset, "gso_type": TCPV4, "gso_size": MSS}
    truth["hdr_len"] = start + 20
    for count, lie in enumerate(LIES.values(), start=1):
        send(a, header(**truth | lie), data)
        assert arrived(b) == []
        net.wait_for_count("a", "rx_drop_bad_header", count)
    send(a, header(**truth), data)
    ((head, got),) = arrived(b)
    assert (head[:10], got) == (header(**truth)[:10], data)
    plain = frame(OTHER, STATION)
    send(a, header(flags=DATA_VALID), plain)
    send(a, header(flags=0xF0 | DATA_VALID), plain)
    assert arrived(b) == [(CLEAN, plain)] * 2
