"""Pages that we wrote, told to a front-end that moves its guest elsewhere meanwhile.

While a guest migrates, its front-end shares a bitmap: a bit for each 4 KiB page of guest
memory. Whoever writes into the guest sets the page's bit *after* the write, so the page
is copied (again) however the two of us interleave. A page without a bit is lost on the
other side.

The bitmap is the last row of the port's memory table, so it is switched together with
the table in one store; size 0 means that nobody asks. Ring parts are marked only where
RING.logged says so, which the front-end decides ring by ring.

vhost-user: Migration.
"""

from typing import Final

from ports.base import LOG_ROW
from ports.native import Record, jit, or_u8
from ports.vhost.memory import region_rows
from ports.vhost.virtio import (
    DESC_SIZE,
    EVENT_LEN,
    USED_ELEM_SIZE,
    USED_RING,
)
from ports.views import aim_at, region_at, segment_at

_PAGE_SHIFT: Final = 12  # of the protocol, whatever the machine's pages are


@jit
def find_log(regions: int, first: int) -> tuple[int, int]:
    """Our address of the bitmap of the table that begins at row `first`, and its bytes.

    No bytes: nobody asks.
    """
    log = region_at(regions, first + LOG_ROW)
    return int(log["addr"]), int(log["size"])


@jit
def mark(log: int, log_len: int, gpa: int, length: int) -> None:
    """Mark the pages of `length` bytes at `gpa`, all of them written already.

    Pages beyond the bitmap are passed over: its front-end knows of no such memory.
    """
    if length <= 0:
        return
    for page in range(gpa >> _PAGE_SHIFT, ((gpa + length - 1) >> _PAGE_SHIFT) + 1):
        at = page >> 3
        if 0 <= at < log_len:
            # Always an atomic operation: the front-end clears bits meanwhile, and a bit
            # that is seen set may be one that it has just fetched.
            or_u8(log + at, 1 << (page & 7))


@jit
def mark_aims(log: int, log_len: int, aims: int, n: int) -> None:
    """Mark what the first `n` AIM rows say, all of it written already."""
    for k in range(n):
        aim = aim_at(aims, k)
        mark(log, log_len, int(aim["gpa"]), int(aim["len"]))


@jit
def mark_pieces(
    regions: int,
    first: int,
    count: int,
    pieces: int,
    length: int,
) -> None:
    """Mark the first `length` bytes of a list of SEGMENT rows, by our addresses.

    Memory that the guest has at two addresses is marked at both.
    """
    log, log_len = find_log(regions, first)
    at = 0
    while length > 0:
        piece = segment_at(pieces, at)
        part = min(int(piece["len"]), length)
        for row in range(first, first + count):
            region = region_at(regions, row)
            offset = int(piece["addr"]) - int(region["addr"])
            if 0 <= offset < int(region["size"]):
                mark(log, log_len, int(region["gpa"]) + offset, part)
        length -= part
        at += 1


@jit
def mark_used(ring: Record, port: Record, ctx: Record, begin: int, n: int) -> None:
    """Mark the index of a split ring, and `n` of its elements from `begin` on."""
    regions = int(ctx["regions"])
    log, log_len = find_log(regions, region_rows(port)[0])
    if log_len == 0 or int(ring["logged"]) == 0:
        return
    used = int(ring["log_used"])
    size = int(ring["size"])
    slot = begin & (size - 1)
    fit = min(n, size - slot)
    mark(log, log_len, used, USED_RING)
    mark(log, log_len, used + USED_RING + USED_ELEM_SIZE * slot, USED_ELEM_SIZE * fit)
    mark(log, log_len, used + USED_RING, USED_ELEM_SIZE * (n - fit))


@jit
def mark_slots(ring: Record, port: Record, ctx: Record, begin: int, end: int) -> None:
    """Mark the descriptors of a packed ring from index `begin` to before `end`.

    Around the ring's end where `end` is not behind `begin`. By the ring's own address:
    front-ends give the address of the device's event area for logging.
    """
    regions = int(ctx["regions"])
    log, log_len = find_log(regions, region_rows(port)[0])
    if log_len == 0 or int(ring["logged"]) == 0:
        return
    desc = int(ring["log_desc"])
    if end <= begin:
        mark(log, log_len, desc, DESC_SIZE * end)
        end = int(ring["size"])
    mark(log, log_len, desc + DESC_SIZE * begin, DESC_SIZE * (end - begin))


@jit
def mark_events(ring: Record, port: Record, ctx: Record) -> None:
    """Mark where we tell the driver whether to kick."""
    regions = int(ctx["regions"])
    log, log_len = find_log(regions, region_rows(port)[0])
    if log_len == 0 or int(ring["logged"]) == 0:
        return
    used = int(ring["log_used"])
    mark(log, log_len, used, EVENT_LEN)
    if int(ring["packed"]) == 0:
        event = used + USED_RING + USED_ELEM_SIZE * int(ring["size"])
        mark(log, log_len, event, 2)


@jit
def mark_ring(ring: Record, port: Record, ctx: Record) -> None:
    """Mark all that we may have written of a ring: somebody died over it."""
    if int(ring["packed"]) != 0:
        mark_slots(ring, port, ctx, 0, int(ring["size"]))
    else:
        mark_used(ring, port, ctx, 0, int(ring["size"]))
    mark_events(ring, port, ctx)
