"""What both ring formats do with a chain once its descriptors are read.

A chain is a list of pieces of guest memory. On the way in it becomes a frame: header cut
off, bytes counted. On the way out it is a list of targets that a header and a frame are
spread over. How chains are found and given back is the formats' own: `split`, `packed`.

virtio 1.2 §2.7.4 message framing, §5.1.6 network device operation.
"""

from ports import offload
from ports.base import NO_FD, RING_BROKEN
from ports.burst import (
    ADDRESSES_LEN,
    BAD_CHAIN,
    BAD_HEADER,
    ETH_SNAPSHOT,
    HEADER_SLOT,
    MAX_FRAME,
    MIN_FRAME,
    TOO_LONG,
    TOO_SHORT,
)
from ports.native import (
    Record,
    copy_bytes,
    eventfd_signal,
    jit,
    load_any_u64,
    load_u64,
    prefetch_write,
    store_any_u64,
)
from ports.vhost.virtio import NET_HDR_LEN_LEGACY
from ports.views import aim_at, frame_at, segment_at


@jit
def describe(
    ring: Record, ctx: Record, frame: Record, i: int, begin: int, end: int
) -> int:
    """Cut the header off the pieces [begin, end) and make them frame; 0 or a verdict.

    The header may be spread over any number of pieces.
    """
    header_len = int(ring["header_len"])
    segments = int(ctx["segments"])
    total = 0
    for k in range(begin, end):
        total += int(segment_at(segments, k)["len"])
    if total <= header_len:
        return BAD_CHAIN
    heads = int(ctx["heads"]) + (i + 1) * ETH_SNAPSHOT
    length = total - header_len
    if length < MIN_FRAME:
        return TOO_SHORT
    if length > MAX_FRAME:
        return TOO_LONG
    gather(segments, begin, end, 0, heads, NET_HDR_LEN_LEGACY)
    if offload.asks(heads):
        clean = int(ctx["headers"]) + i * HEADER_SLOT
        features = int(ring["features"])
        if not offload.accept(frame, length, heads, features, clean):
            return BAD_HEADER
    gather(segments, begin, end, header_len, heads, MIN_FRAME)
    skip = header_len
    while skip >= int(segment_at(segments, begin)["len"]):
        skip -= int(segment_at(segments, begin)["len"])
        begin += 1
    opening = segment_at(segments, begin)
    opening["addr"] = int(opening["addr"]) + skip
    opening["len"] = int(opening["len"]) - skip
    frame["addr"] = int(opening["addr"])
    frame["eth"] = heads
    frame["length"] = length
    frame["segments"] = end - begin
    frame["first_segment"] = begin
    return 0


@jit
def gather(
    segments: int, begin: int, end: int, skip: int, dst: int, length: int
) -> None:
    """Copy `length` bytes that start `skip` bytes into the pieces."""
    for k in range(begin, end):
        piece = int(segment_at(segments, k)["len"])
        if skip >= piece:
            skip -= piece
            continue
        part = min(piece - skip, length)
        copy_bytes(dst, int(segment_at(segments, k)["addr"]) + skip, part)
        dst += part
        length -= part
        skip = 0
        if length == 0:
            return


@jit
def accept_offload(ring: Record, ctx: Record, frame: Record, i: int) -> bool:
    """Check what frame `i` of the burst asks for; False: it may not, or lies.

    The header of a frame in pieces was looked at by `describe`.
    """
    if int(frame["offload"]) != 0:
        return True
    header = int(frame["eth"]) - int(ring["header_len"])
    clean = int(ctx["headers"]) + i * HEADER_SLOT
    length = int(frame["length"])
    return offload.accept(frame, length, header, int(ring["features"]), clean)


@jit
def asks_for_offload(frame: Record, header_len: int) -> bool:
    """Whether a frame's header asks for anything."""
    eth = int(frame["eth"])
    if eth != int(frame["addr"]):
        return int(frame["offload"]) != 0
    return offload.asks(eth - header_len)


@jit
def seal(dst: int, frame: Record) -> None:
    """Write the addresses that were judged over those that were copied.

    The guest may have changed them in between; what decided is what is delivered.
    """
    judged = int(frame["eth"])
    store_any_u64(dst, load_any_u64(judged))
    store_any_u64(dst + 4, load_any_u64(judged + 4))


@jit
def aim(aims: int, k: int, addr: int, gpa: int, need: int) -> None:
    """Note where the next frames' number `k` goes, and ask for the first line there."""
    prefetch_write(addr)
    row = aim_at(aims, k)
    row["addr"] = addr
    row["gpa"] = gpa
    row["len"] = need


@jit
def fill(ctx: Record, header_len: int, begin: int, n: int) -> int:
    """Write `n` picked frames, from number `begin` on, to where the aims say.

    The receiver has read what lies there, so every first store waits until its cache line
    has come back from another processor. Stores leave ours in their order, and some 60
    may wait: whatever else the loop stores, be it a spilled register or a call's return
    address, takes the place of a frame under way. So it does nothing else.

    Returns:
        Bytes of the frames.
    """
    burst = int(ctx["burst"])
    aims = int(ctx["aims"])
    picks = int(ctx["picked"]) + 8 * begin
    total = 0
    for k in range(n):
        frame = frame_at(burst, load_u64(picks + 8 * k))
        addr = int(aim_at(aims, k)["addr"])
        length = int(frame["length"])
        offload.write_header(addr, header_len, frame, 1)
        copy_bytes(addr + header_len, int(frame["addr"]), length)
        seal(addr + header_len, frame)
        total += length
    return total


@jit
def scatter(ctx: Record, frame: Record, header: int, header_len: int) -> None:
    """Copy the header, the judged addresses, the rest of the frame into the targets."""
    targets = int(ctx["targets"])
    segments = int(ctx["segments"])
    target = 0
    at = int(segment_at(targets, 0)["addr"])
    left = int(segment_at(targets, 0)["len"])
    pieces = int(frame["segments"])
    begin = int(frame["first_segment"])
    skip = ADDRESSES_LEN
    for k in range(-2, pieces):
        if k == -2:
            src, length = header, header_len
        elif k == -1:
            src, length = int(frame["eth"]), ADDRESSES_LEN
        else:
            if pieces == 1:
                src, length = int(frame["addr"]), int(frame["length"])
            else:
                src = int(segment_at(segments, begin + k)["addr"])
                length = int(segment_at(segments, begin + k)["len"])
            passed = min(skip, length)
            skip -= passed
            src += passed
            length -= passed
        while length > 0:
            while left == 0:
                target += 1
                at = int(segment_at(targets, target)["addr"])
                left = int(segment_at(targets, target)["len"])
            part = min(left, length)
            copy_bytes(at, src, part)
            at += part
            left -= part
            src += part
            length -= part


@jit
def break_ring(ring: Record, tally: Record) -> None:
    """Stop serving a ring whose indexes make no sense, and tell the front-end."""
    ring["state"] = RING_BROKEN
    tally["broken_rings"] += 1
    if int(ring["err_fd"]) != NO_FD:
        eventfd_signal(int(ring["err_fd"]))
