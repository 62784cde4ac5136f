"""Checksums and segmentation that a sender left to others.

A guest that negotiated it may send a frame whose checksum is only begun (NEEDS_CSUM), or
one of up to 64 KiB that is to be cut into segments (gso_type); the virtio-net header in
front of it says so. `accept` checks that header, read once, and keeps a clean copy. To a
port whose receiver negotiated the same, frame and header pass as they are. For any other
the frame is *lowered* on its way out, per port: its checksum is completed, or it is cut
into frames of the sender's segment size.

Lowering works on our own copy. The sender may still change the frame while we look, and
what its header promises of the bytes behind it is believed only after a look at the copy.

Cutting costs time by the segment, whatever their size, and it is the sender who chooses
the size. So a frame may ask for so many segments at most, and a burst gets so many a port
and no more, which leaves the other guests their share of the worker.

virtio 1.2 §5.1.6; RFC 9293 (TCP), RFC 768 (UDP), RFC 1071 (checksum). IPv4 and IPv6, TCP
and UDP, any checksum, up to two VLAN tags. Not here: tunnels, and UDP fragmentation
(`features` says why).
"""

from typing import Final

from ports import pieces
from ports.burst import ADDRESSES_LEN, BURST_SIZE, MIN_FRAME, TAP_SLOT
from ports.native import (
    Record,
    copy_bytes,
    jit,
    load_any_u16,
    load_any_u64,
    load_u8,
    load_u16,
    load_u64,
    store_any_u16,
    store_any_u32,
    store_any_u64,
    store_u8,
)
from ports.vhost.virtio import (
    F_CSUM,
    F_GUEST_CSUM,
    F_GUEST_ECN,
    F_GUEST_TSO4,
    F_GUEST_TSO6,
    F_GUEST_USO4,
    F_GUEST_USO6,
    F_HOST_ECN,
    F_HOST_TSO4,
    F_HOST_TSO6,
    F_HOST_USO,
    NET_HDR_F_NEEDS_CSUM,
    NET_HDR_GSO_ECN,
    NET_HDR_GSO_NONE,
    NET_HDR_GSO_TCPV4,
    NET_HDR_GSO_TCPV6,
    NET_HDR_GSO_UDP_L4,
    NET_HDR_LEN,
)
from ports.views import frame_at, segment_at

# The clean header as two words: flags | gso_type << 8 | hdr_len << 16 | gso_size << 32 |
# csum_start << 48, and csum_offset.
HEADER_LEN: Final = NET_HDR_LEN  # as every modern driver and the kernel's taps have it
_U16: Final = 0xFFFF
_BEFORE_CSUM_START: Final = (1 << 48) - 1
_ASKS: Final = NET_HDR_F_NEEDS_CSUM | 0xFF00
# What a frame may ask for: a full one in segments of 32 bytes, less than any TCP sends. A
# short datagram in smaller ones is all right.
_SEGMENTS_PER_FRAME: Final = 2048
_MAX_L4_START: Final = 512  # all headers before it are copied to every segment

# What a burst may cause at each egress port, rounded up to a burst of segments: some half
# a millisecond. No ring that QEMU makes has more buffers for them.
SEGMENTS_PER_BURST: Final = 1024

_ETHERTYPE: Final = 12
_TAG: Final = 4
# As they lie in memory, read little-endian.
_IPV4: Final = 0x0008
_IPV6: Final = 0xDD86
_VLAN: Final = 0x0081
_SERVICE_VLAN: Final = 0xA888

_IPV4_HEADER: Final = 20
_IPV4_FRAGMENT: Final = 0x3FFF  # there are more, or an offset
_IPV6_HEADER: Final = 40
_TCP_HEADER: Final = 20
_UDP_HEADER: Final = 8
_TCP: Final = 6
_UDP: Final = 17
_TCP_OFFSET: Final = 12  # header length in words, in the upper half of a byte
_TCP_CSUM: Final = 16
_UDP_CSUM: Final = 6
_ROUTING: Final = 43
_OPTIONS: Final = (0, _ROUTING, 60)  # hop-by-hop, routing, destination
_LAST_ONLY: Final = 0x09  # FIN, PSH
_FIRST_ONLY: Final = 0x80  # CWR


@jit
def asks(header: int) -> bool:
    """Whether the virtio-net header at `header` asks for anything."""
    return (load_any_u16(header) & _ASKS) != 0


@jit
def accept(frame: Record, length: int, header: int, features: int, clean: int) -> bool:
    """Check the header of a frame of `length` bytes; keep what it asks for at `clean`.

    False where it asks for what was not negotiated, or lies about the frame.
    """
    word = load_any_u64(header)
    csum_offset = load_any_u16(header + 8)
    gso_type = (word >> 8) & 0xFF
    hdr_len = (word >> 16) & _U16
    gso_size = (word >> 32) & _U16
    csum_start = (word >> 48) & _U16
    if word & NET_HDR_F_NEEDS_CSUM == 0 or features & F_CSUM == 0:
        return False  # segments need their checksum, too
    if csum_start < MIN_FRAME or csum_start + csum_offset + 2 > length:
        return False
    if gso_type == NET_HDR_GSO_NONE:
        hdr_len = 0
        gso_size = 0
    else:
        if not _may_cut(gso_type, features):
            return False
        least = _least_headers(gso_type, csum_start, csum_offset)
        if least == 0 or least > length or hdr_len > length:
            return False
        if gso_size == 0 or length - least > gso_size * _SEGMENTS_PER_FRAME:
            return False
        hdr_len = max(hdr_len, least)
    store_any_u64(
        clean,
        NET_HDR_F_NEEDS_CSUM
        | gso_type << 8
        | hdr_len << 16
        | gso_size << 32
        | csum_start << 48,
    )
    store_any_u64(clean + 8, csum_offset)
    frame["offload"] = clean
    return True


@jit
def _may_cut(gso_type: int, features: int) -> bool:
    """Whether a sender with these features may have its frames cut like this."""
    kind = gso_type & ~NET_HDR_GSO_ECN
    needed = 0
    if kind == NET_HDR_GSO_TCPV4:
        needed = F_HOST_TSO4
    elif kind == NET_HDR_GSO_TCPV6:
        needed = F_HOST_TSO6
    elif gso_type == NET_HDR_GSO_UDP_L4:  # which knows no congestion
        needed = F_HOST_USO
    if needed != 0 and gso_type & NET_HDR_GSO_ECN:
        needed |= F_HOST_ECN
    return needed != 0 and features & needed == needed


@jit
def _least_headers(gso_type: int, csum_start: int, csum_offset: int) -> int:
    """Bytes of the headers at least, if that checksum is TCP's or UDP's; else 0."""
    if csum_start > _MAX_L4_START:
        return 0
    if gso_type == NET_HDR_GSO_UDP_L4:
        return csum_start + _UDP_HEADER if csum_offset == _UDP_CSUM else 0
    return csum_start + _TCP_HEADER if csum_offset == _TCP_CSUM else 0


@jit
def begin(header: int, frame: int, length: int) -> None:
    """Have a super-frame's checksum only begun, and its header say so, as with others.

    For frames of the kernel, in our own memory. Drivers that put together what comes
    (LRO) leave a checksum as it was, which nobody looks at, and set no NEEDS_CSUM. Left
    as it is where it is not what the header says. Can be done again.
    """
    word = load_any_u64(header)
    kind = (word >> 8) & 0x7F
    if word & NET_HDR_F_NEEDS_CSUM or kind == NET_HDR_GSO_NONE:
        return
    l3 = _find_ip(frame, kind)
    if l3 == 0:
        return
    protocol = _TCP
    csum_offset = _TCP_CSUM
    if kind == NET_HDR_GSO_UDP_L4:
        protocol = _UDP
        csum_offset = _UDP_CSUM
    found, l4, _ = _find_l4(frame, length, l3)
    if found != protocol or l4 >= length:
        return
    pseudo = _sum_addresses(frame, l3) + _swap16(length - l4) + (protocol << 8)
    store_any_u16(frame + l4 + csum_offset, _fold(pseudo))
    store_any_u16(header + 8, csum_offset)
    # Last: where the flag is set, the rest is done.
    word &= _BEFORE_CSUM_START
    store_any_u64(header, word | NET_HDR_F_NEEDS_CSUM | l4 << 48)


@jit
def find_begun(frame: Record, head: int, length: int, clean: int) -> None:
    """Find a TCP or UDP checksum that is only begun where no header says so.

    A sender on this machine leaves its checksums to others and says so beside the frame;
    by way of XDP the frame comes alone. Such a checksum is the sum of the pseudo header.
    That of a complete frame is the same by chance once in 65,536 times, and then what
    completing makes of it is that same number again (RFC 1071: it is the sum's complement,
    and the sum has it in). So only a frame that was damaged on its way, and by the same
    chance, gains from this.

    Args:
        frame: In `clean` is kept what it asks for, if anything.
        head: Address of its first `length` bytes, in one piece.
        length: At least an Ethernet header's.
        clean: Where to keep that.
    """
    l3 = _find_ip(head, NET_HDR_GSO_NONE)
    if l3 == 0:
        return
    protocol, l4, end = _find_l4(head, length, l3)
    offset = _UDP_CSUM
    if protocol == _TCP:
        offset = _TCP_CSUM
    elif protocol != _UDP:
        return
    if l4 + offset + 2 > length or end > int(frame["length"]):
        return
    begun = _sum_addresses(head, l3) + _swap16(end - l4) + (protocol << 8)
    if load_any_u16(head + l4 + offset) != _fold(begun):
        return
    store_any_u64(clean, NET_HDR_F_NEEDS_CSUM | l4 << 48)
    store_any_u64(clean + 8, offset)
    frame["offload"] = clean


@jit
def shift(clean: int, by: int) -> None:
    """Make a clean header that of a frame with `by` bytes put into its head."""
    word = load_any_u64(clean)
    hdr_len = (word >> 16) & _U16
    if hdr_len != 0:
        store_any_u16(clean + 2, hdr_len + by)
    store_any_u16(clean + 6, ((word >> 48) & _U16) + by)


@jit
def write_header(addr: int, header_len: int, frame: Record, num_buffers: int) -> None:
    """Write a frame's header. virtio 1.2 §5.1.6.4.1: num_buffers >= 1."""
    clean = int(frame["offload"])
    csum_offset = 0
    if clean == 0:
        store_any_u64(addr, 0)
    else:
        store_any_u64(addr, load_u64(clean))
        csum_offset = load_u16(clean + 8)
    if header_len == HEADER_LEN:
        store_any_u32(addr + 8, csum_offset | num_buffers << 16)
    else:
        store_any_u16(addr + 8, csum_offset)


@jit
def passes(frame: Record, able: int) -> bool:
    """Whether a receiver that is `able` (F_GUEST_*) takes the frame as it is."""
    clean = int(frame["offload"])
    if clean == 0:
        return True
    gso_type = load_u8(clean + 1)
    kind = gso_type & ~NET_HDR_GSO_ECN
    needed = F_GUEST_CSUM
    if kind == NET_HDR_GSO_TCPV4:
        needed |= F_GUEST_TSO4
    elif kind == NET_HDR_GSO_TCPV6:
        needed |= F_GUEST_TSO6
    elif kind == NET_HDR_GSO_UDP_L4:
        needed |= F_GUEST_USO4 | F_GUEST_USO6
    if gso_type & NET_HDR_GSO_ECN:
        needed |= F_GUEST_ECN
    return able & needed == needed


@jit
def wire_length(frame: Record) -> int:
    """Bytes of the longest frame that this one will ever be on a wire."""
    length = int(frame["length"])
    clean = int(frame["offload"])
    if clean == 0:
        return length
    word = load_any_u64(clean)
    gso_size = (word >> 32) & _U16
    if gso_size == 0:
        return length
    return min(length, ((word >> 16) & _U16) + gso_size)


@jit
def is_too_long(frame: Record, max_frame: int) -> bool:
    """Whether a frame would be longer than that on a wire, too."""
    return int(frame["length"]) > max_frame and wire_length(frame) > max_frame


@jit
def segment_length(ctx: Record, frame: Record) -> int:
    """Bytes of the longest segment of a super-frame.

    The header's own length is a hint at best: Linux gives the contiguous part of a
    frame. So it is TCP's that is looked at.
    """
    clean = int(frame["offload"])
    word = load_any_u64(clean)
    headers = (word >> 48) & _U16
    if (word >> 8) & 0xFF == NET_HDR_GSO_UDP_L4:
        headers += _UDP_HEADER
    else:
        headers += 4 * (byte_at(ctx, frame, headers + _TCP_OFFSET) >> 4)
    return min(int(frame["length"]), headers + ((word >> 32) & _U16))


@jit
def byte_at(ctx: Record, frame: Record, at: int) -> int:
    """Byte `at` of a frame, which is that long, in one piece or several."""
    pieces = int(frame["segments"])
    if pieces == 1:
        return load_u8(int(frame["addr"]) + at)
    first = int(frame["first_segment"])
    for k in range(first, first + pieces):
        segment = segment_at(int(ctx["segments"]), k)
        if at < int(segment["len"]):
            return load_u8(int(segment["addr"]) + at)
        at -= int(segment["len"])
    return 0


@jit
def ethertype(ctx: Record, frame: Record) -> int:
    """The number behind a frame's addresses, a tag's where there is one."""
    upper = byte_at(ctx, frame, _ETHERTYPE)
    return upper << 8 | byte_at(ctx, frame, _ETHERTYPE + 1)


@jit
def is_cut(frame: Record) -> bool:
    """Whether lowering the frame makes segments of it."""
    clean = int(frame["offload"])
    return clean != 0 and load_u8(clean + 1) != NET_HDR_GSO_NONE


@jit
def lower(ctx: Record, frame: Record, begin: int) -> tuple[int, int]:
    """Make plain frames of a frame, in the rows behind the burst.

    Args:
        ctx: The worker's context.
        frame: A frame that asks for something.
        begin: 0, then what the call before returned.

    Returns:
        How many frames, at most BURST_SIZE, and where to go on; 0 where that is the
        end. No frames where the bytes are not what the header said.
    """
    whole = int(ctx["lowered"])
    length = int(frame["length"])
    clean = int(frame["offload"])
    word = load_any_u64(clean)
    csum_start = (word >> 48) & _U16
    if begin == 0:
        pieces.copy_part(ctx, frame, 0, whole, length)
        copy_bytes(whole, int(frame["eth"]), ADDRESSES_LEN)
    if (word >> 8) & 0xFF == NET_HDR_GSO_NONE:
        _complete(whole, length, csum_start, load_any_u16(clean + 8))
        _plain(ctx, 0, whole, length)
        return 1, 0
    return _cut(ctx, whole, length, word, begin)


@jit
def _plain(ctx: Record, row: int, addr: int, length: int) -> None:
    """Describe a finished frame of ours in a row behind the burst."""
    frame = frame_at(int(ctx["burst"]), BURST_SIZE + row)
    frame["addr"] = addr
    frame["eth"] = addr
    frame["length"] = length
    frame["segments"] = 1
    frame["offload"] = 0


@jit
def _complete(frame: int, length: int, csum_start: int, csum_offset: int) -> None:
    """Complete a checksum: its field holds the sum of the pseudo header already."""
    total = _sum(frame + csum_start, length - csum_start)
    value = ~_fold(total) & _U16
    if value == 0 and csum_offset == _UDP_CSUM:
        value = _U16  # RFC 768: 0 means that there is none
    store_any_u16(frame + csum_start + csum_offset, value)


@jit
def _cut(
    ctx: Record, whole: int, length: int, word: int, begin: int
) -> tuple[int, int]:
    """Cut a super-frame into at most a burst of segments, from number `begin`."""
    gso_size = (word >> 32) & _U16
    l4 = (word >> 48) & _U16
    kind = (word >> 8) & 0x7F
    protocol = _UDP if kind == NET_HDR_GSO_UDP_L4 else _TCP
    l3 = _find_ip(whole, kind)
    if l3 == 0:
        return 0, 0
    found, begin_l4, _ = _find_l4(whole, length, l3)
    if found != protocol or begin_l4 != l4:
        return 0, 0
    headers = l4 + _UDP_HEADER
    if protocol == _TCP:
        headers = l4 + 4 * (load_u8(whole + l4 + _TCP_OFFSET) >> 4)
        if headers < l4 + _TCP_HEADER:
            return 0, 0
    if headers >= length:
        return 0, 0
    payload = length - headers
    n = min(BURST_SIZE, -(-payload // gso_size) - begin)
    for row in range(n):
        number = begin + row
        at = number * gso_size
        part = min(gso_size, payload - at)
        slot = whole + (1 + row) * TAP_SLOT
        copy_bytes(slot, whole, headers)
        copy_bytes(slot + headers, whole + headers + at, part)
        end = headers + part
        pseudo = _fix_ip(slot, l3, l4, end, number) + _swap16(end - l4)
        if protocol == _TCP:
            _fix_tcp(slot + l4, number, at, at + part == payload)
            store_any_u16(slot + l4 + _TCP_CSUM, _fold(pseudo + (_TCP << 8)))
            _complete(slot, end, l4, _TCP_CSUM)
        else:
            _store_big16(slot + l4 + 4, end - l4)
            store_any_u16(slot + l4 + _UDP_CSUM, _fold(pseudo + (_UDP << 8)))
            _complete(slot, end, l4, _UDP_CSUM)
        _plain(ctx, row, slot, end)
    behind = begin + n
    return n, behind if behind * gso_size < payload else 0


@jit
def _find_ip(frame: int, kind: int) -> int:
    """Offset of the IP header, behind VLAN tags; 0: none, or not what `kind` says."""
    at = _ETHERTYPE
    for _ in range(2):
        ethertype = load_any_u16(frame + at)
        if ethertype in (_VLAN, _SERVICE_VLAN):
            at += _TAG
    ethertype = load_any_u16(frame + at)
    version = load_u8(frame + at + 2) >> 4
    if ethertype == _IPV4:
        found = version == 4 and kind != NET_HDR_GSO_TCPV6
    else:
        found = ethertype == _IPV6 and version == 6 and kind != NET_HDR_GSO_TCPV4
    return at + 2 if found else 0


@jit
def _is_v4(frame: int, l3: int) -> bool:
    return load_u8(frame + l3) >> 4 == 4


@jit
def _find_l4(frame: int, length: int, l3: int) -> tuple[int, int, int]:
    """What the IP header at `l3` leads to: protocol, where that begins, where it ends.

    IPv6 options, routing and destination headers are stepped over. A fragment leads to
    nothing (0); and where a route is still to be followed, its end is in the checksum
    (RFC 8200 §8.1), not the address that we see.
    """
    if _is_v4(frame, l3):
        header = 4 * (load_u8(frame + l3) & 0xF)
        if header < _IPV4_HEADER or l3 + header > length:
            return 0, 0, 0
        if _load_big16(frame + l3 + 6) & _IPV4_FRAGMENT:
            return 0, 0, 0
        end = l3 + _load_big16(frame + l3 + 2)
        return load_u8(frame + l3 + 9), l3 + header, end
    following = load_u8(frame + l3 + 6)
    end = l3 + _IPV6_HEADER + _load_big16(frame + l3 + 4)
    at = l3 + _IPV6_HEADER
    while following in _OPTIONS and at + 8 <= length:
        if following == _ROUTING and load_u8(frame + at + 3) != 0:
            return 0, 0, 0
        following = load_u8(frame + at)
        at += 8 * (load_u8(frame + at + 1) + 1)
    return following, at, end


@jit
def _fix_ip(frame: int, l3: int, l4: int, length: int, number: int) -> int:
    """Make a copied IP header that of segment `number`; the sum of its addresses.

    Each segment is a datagram of its own, so it has an identification of its own.
    """
    if _is_v4(frame, l3):
        _store_big16(frame + l3 + 2, length - l3)
        _store_big16(frame + l3 + 4, _load_big16(frame + l3 + 4) + number)
        store_any_u16(frame + l3 + 10, 0)
        store_any_u16(frame + l3 + 10, ~_fold(_sum(frame + l3, l4 - l3)) & _U16)
    else:
        _store_big16(frame + l3 + 4, length - l3 - _IPV6_HEADER)
    return _sum_addresses(frame, l3)


@jit
def _sum_addresses(frame: int, l3: int) -> int:
    """The sum of an IP header's addresses."""
    if _is_v4(frame, l3):
        return _sum(frame + l3 + 12, 8)
    return _sum(frame + l3 + 8, 32)


@jit
def _fix_tcp(tcp: int, number: int, at: int, last: bool) -> None:
    """Make a copied header that of segment `number`, `at` bytes into the payload."""
    sequence = (_load_big16(tcp + 4) << 16 | _load_big16(tcp + 6)) + at
    _store_big16(tcp + 4, sequence >> 16)
    _store_big16(tcp + 6, sequence)
    flags = load_u8(tcp + 13)
    if not last:
        flags &= ~_LAST_ONLY
    if number > 0:
        flags &= ~_FIRST_ONLY
    store_u8(tcp + 13, flags)


@jit
def _sum(addr: int, length: int) -> int:
    """Sum of the 16-bit words, as they lie in memory, of our own bytes; to be folded.

    RFC 1071: the order of bytes does not matter as long as it is the same throughout.
    """
    total = 0
    at = 0
    while at + 8 <= length:
        word = load_any_u64(addr + at)
        total += (word & 0xFFFFFFFF) + ((word >> 32) & 0xFFFFFFFF)
        at += 8
    while at + 2 <= length:
        total += load_any_u16(addr + at)
        at += 2
    if at < length:
        total += load_u8(addr + at)
    return total


@jit
def _fold(total: int) -> int:
    while total >> 16:
        total = (total & _U16) + (total >> 16)
    return total


@jit
def _swap16(value: int) -> int:
    """A 16-bit number as it would lie in memory, big-endian."""
    return (value >> 8 & 0xFF) | (value & 0xFF) << 8


@jit
def _load_big16(addr: int) -> int:
    return load_u8(addr) << 8 | load_u8(addr + 1)


@jit
def _store_big16(addr: int, value: int) -> None:
    store_u8(addr, value >> 8 & 0xFF)
    store_u8(addr + 1, value & 0xFF)
