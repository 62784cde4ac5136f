"""Guest-physical addresses to ours: the one checked door to a guest's memory.

A port's memory table is a few rows of REGION. `PORT.regions` names the rows in one
word, so a table is replaced in one store and a worker sees the old one or the new one.
"""

from ports.native import Record, jit
from ports.views import region_at, segment_at


@jit
def region_rows(port: Record) -> tuple[int, int]:
    """First row of a port's memory table, and how many rows it has."""
    packed = int(port["regions"])
    return packed >> 8, packed & 0xFF


@jit
def find_region(regions: int, first: int, count: int, gpa: int) -> int:
    """The row that holds guest-physical address `gpa`, or -1.

    Signed arithmetic is safe: rows were checked not to wrap, so a difference within
    [0, size) is the true distance even for addresses above 2**63.
    """
    for row in range(first, first + count):
        region = region_at(regions, row)
        offset = gpa - int(region["gpa"])
        if 0 <= offset < int(region["size"]):
            return row
    return -1


@jit
def find_window(regions: int, first: int, count: int, gpa: int) -> tuple[int, int, int]:
    """The region that holds `gpa`: where it begins, its size, our address of it.

    For hot loops, which look first whether the last one will do. Nothing fits into the
    window of size 0 that an address outside memory gets.
    """
    row = find_region(regions, first, count, gpa)
    if row < 0:
        return 0, 0, 0
    region = region_at(regions, row)
    return int(region["gpa"]), int(region["size"]), int(region["addr"])


@jit
def translate(regions: int, first: int, count: int, gpa: int, length: int) -> int:
    """Our address of `length` contiguous bytes at `gpa`, or 0.

    0 as well where the bytes cross the end of a region: neighbours in the guest need
    not be neighbours here.
    """
    row = find_region(regions, first, count, gpa)
    if row < 0:
        return 0
    region = region_at(regions, row)
    offset = gpa - int(region["gpa"])
    if length > int(region["size"]) - offset:
        return 0
    return int(region["addr"]) + offset


@jit
def append_pieces(
    regions: int,
    first: int,
    count: int,
    gpa: int,
    length: int,
    segments: int,
    used: int,
    room: int,
) -> int:
    """Append `length` bytes at `gpa` to `segments`, one row a region they touch.

    Returns:
        Rows in use afterwards; -1 where a byte has no mapping; -2 where `room` rows
        do not suffice.
    """
    while length > 0:
        row = find_region(regions, first, count, gpa)
        if row < 0:
            return -1
        if used >= room:
            return -2
        region = region_at(regions, row)
        offset = gpa - int(region["gpa"])
        piece = min(length, int(region["size"]) - offset)
        segment = segment_at(segments, used)
        segment["addr"] = int(region["addr"]) + offset
        segment["len"] = piece
        used += 1
        gpa += piece
        length -= piece
    return used
