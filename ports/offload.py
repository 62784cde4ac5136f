"""Checksums and segmentation that a sender left to others.

A guest that negotiated it may send a frame whose checksum is only begun (NEEDS_CSUM), or
one of up to 64 KiB that is to be cut into segments (gso_type); the virtio-net header in
front of it says so. `accept` checks that header, read once, and keeps a clean copy. To a
port whose receiver negotiated the same, frame and header pass as they are. For any other
the frame is *lowered* on its way out, per port: its checksum is completed, or it is cut
into frames of the sender's segment size.

Lowering works on our own copy. The sender may still change the frame while we look, and
what its header promises of the bytes behind it is believed only after a look at the copy.

virtio 1.2 §5.1.6; RFC 9293 (TCP), RFC 1071 (checksum). IPv4 and IPv6, TCP, any checksum,
up to two VLAN tags. Not here: UDP fragmentation and segmentation, tunnels.
"""

from typing import Final

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
    F_HOST_ECN,
    F_HOST_TSO4,
    F_HOST_TSO6,
    NET_HDR_F_NEEDS_CSUM,
    NET_HDR_GSO_ECN,
    NET_HDR_GSO_NONE,
    NET_HDR_GSO_TCPV4,
    NET_HDR_GSO_TCPV6,
    NET_HDR_LEN,
)
from ports.views import frame_at, segment_at

# The clean header as two words: flags | gso_type << 8 | hdr_len << 16 | gso_size << 32 |
# csum_start << 48, and csum_offset.
HEADER_LEN: Final = NET_HDR_LEN  # as every modern driver and the kernel's taps have it
_U16: Final = 0xFFFF
_ASKS: Final = NET_HDR_F_NEEDS_CSUM | 0xFF00
_MIN_GSO_SIZE: Final = 32  # smaller ones would only burn our time
_MAX_TCP_START: Final = 512  # all headers before it are copied to every segment

_ETHERTYPE: Final = 12
_TAG: Final = 4
# As they lie in memory, read little-endian.
_IPV4: Final = 0x0008
_IPV6: Final = 0xDD86
_VLAN: Final = 0x0081
_SERVICE_VLAN: Final = 0xA888

_IPV4_HEADER: Final = 20
_IPV6_HEADER: Final = 40
_TCP_HEADER: Final = 20
_TCP: Final = 6
_TCP_CSUM: Final = 16
_UDP_CSUM: Final = 6
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
        least = csum_start + _TCP_HEADER
        if csum_start > _MAX_TCP_START:
            return False
        if gso_size < _MIN_GSO_SIZE or hdr_len > length or least > length:
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
    if needed != 0 and gso_type & NET_HDR_GSO_ECN:
        needed |= F_HOST_ECN
    return needed != 0 and features & needed == needed


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
        _copy_frame(ctx, frame, whole)
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
def _copy_frame(ctx: Record, frame: Record, dst: int) -> None:
    """Copy a frame of one or many pieces to `dst`."""
    pieces = int(frame["segments"])
    if pieces == 1:
        copy_bytes(dst, int(frame["addr"]), int(frame["length"]))
        return
    first = int(frame["first_segment"])
    for k in range(first, first + pieces):
        segment = segment_at(int(ctx["segments"]), k)
        copy_bytes(dst, int(segment["addr"]), int(segment["len"]))
        dst += int(segment["len"])


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
    """Cut a TCP super-frame into at most a burst of segments, from number `begin`."""
    gso_size = (word >> 32) & _U16
    l4 = (word >> 48) & _U16
    is_v4 = (word >> 8) & 0x7F == NET_HDR_GSO_TCPV4
    l3 = _find_ip(whole, is_v4)
    if l3 == 0 or not _leads_to_tcp(whole, l3, l4, is_v4):
        return 0, 0
    headers = l4 + 4 * (load_u8(whole + l4 + 12) >> 4)
    if headers < l4 + _TCP_HEADER or headers >= length:
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
        last = at + part == payload
        _fix_headers(slot, l3, l4, headers + part, is_v4, number, at, last)
        _plain(ctx, row, slot, headers + part)
    behind = begin + n
    return n, behind if behind * gso_size < payload else 0


@jit
def _find_ip(frame: int, is_v4: bool) -> int:
    """Offset of the IP header of the wanted version, behind VLAN tags; 0: none."""
    at = _ETHERTYPE
    for _ in range(2):
        kind = load_any_u16(frame + at)
        if kind in (_VLAN, _SERVICE_VLAN):
            at += _TAG
    kind = load_any_u16(frame + at)
    if is_v4:
        found = kind == _IPV4 and load_u8(frame + at + 2) >> 4 == 4
    else:
        found = kind == _IPV6 and load_u8(frame + at + 2) >> 4 == 6
    return at + 2 if found else 0


@jit
def _leads_to_tcp(frame: int, l3: int, l4: int, is_v4: bool) -> bool:
    """Whether the IP header at `l3` says that TCP begins at `l4`.

    IPv6 options, routing and destination headers are stepped over; a fragment has none.
    """
    if is_v4:
        header = 4 * (load_u8(frame + l3) & 0xF)
        is_tcp = load_u8(frame + l3 + 9) == _TCP
        return is_tcp and header >= _IPV4_HEADER and l3 + header == l4
    following = load_u8(frame + l3 + 6)
    at = l3 + _IPV6_HEADER
    while at < l4 and following in (0, 43, 60):
        following = load_u8(frame + at)
        at += 8 * (load_u8(frame + at + 1) + 1)
    return following == _TCP and at == l4


@jit
def _fix_headers(
    frame: int,
    l3: int,
    l4: int,
    length: int,
    is_v4: bool,
    number: int,
    at: int,
    last: bool,
) -> None:
    """Make the copied headers those of segment `number`, `at` bytes into the payload."""
    if is_v4:
        _store_big16(frame + l3 + 2, length - l3)
        _store_big16(frame + l3 + 4, _load_big16(frame + l3 + 4) + number)
        store_any_u16(frame + l3 + 10, 0)
        store_any_u16(frame + l3 + 10, ~_fold(_sum(frame + l3, l4 - l3)) & _U16)
        total = _sum(frame + l3 + 12, 8)
    else:
        _store_big16(frame + l3 + 4, length - l3 - _IPV6_HEADER)
        total = _sum(frame + l3 + 8, 32)
    sequence = (_load_big16(frame + l4 + 4) << 16 | _load_big16(frame + l4 + 6)) + at
    _store_big16(frame + l4 + 4, sequence >> 16)
    _store_big16(frame + l4 + 6, sequence)
    flags = load_u8(frame + l4 + 13)
    if not last:
        flags &= ~_LAST_ONLY
    if number > 0:
        flags &= ~_FIRST_ONLY
    store_u8(frame + l4 + 13, flags)
    tcp_len = length - l4
    # The pseudo header: addresses, protocol, length; the last two as they would lie.
    total += _TCP << 8
    total += (tcp_len >> 8 & 0xFF) | (tcp_len & 0xFF) << 8
    store_any_u16(frame + l4 + _TCP_CSUM, 0)
    total += _sum(frame + l4, tcp_len)
    store_any_u16(frame + l4 + _TCP_CSUM, ~_fold(total) & _U16)


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
def _load_big16(addr: int) -> int:
    return load_u8(addr) << 8 | load_u8(addr + 1)


@jit
def _store_big16(addr: int, value: int) -> None:
    store_u8(addr, value >> 8 & 0xFF)
    store_u8(addr + 1, value & 0xFF)
