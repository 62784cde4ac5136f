"""Guest-physical addresses to ours: the one checked door to a guest's memory.

A port's memory table is a few rows of REGION. `PORT.regions` names the rows in one word,
so a table is replaced in one store and a worker sees the old one or the new one.
"""

from ports.native import Record, Records, jit


@jit
def region_rows(port: Record) -> tuple[int, int]:
    """First row of a port's memory table, and how many rows it has."""
    packed = int(port["regions"])
    return packed >> 8, packed & 0xFF


@jit
def find_region(regions: Records, first: int, count: int, gpa: int) -> int:
    """The row that holds guest-physical address `gpa`, or -1.

    Signed arithmetic is safe: rows were checked not to wrap, so a difference within
    [0, size) is the true distance even for addresses above 2**63.
    """
    for row in range(first, first + count):
        offset = gpa - int(regions[row]["gpa"])
        if 0 <= offset < int(regions[row]["size"]):
            return row
    return -1


@jit
def translate(regions: Records, first: int, count: int, gpa: int, length: int) -> int:
    """Our address of `length` contiguous bytes at `gpa`, or 0.

    0 as well where the bytes cross the end of a region: neighbours in the guest need
    not be neighbours here.
    """
    row = find_region(regions, first, count, gpa)
    if row < 0:
        return 0
    offset = gpa - int(regions[row]["gpa"])
    if length > int(regions[row]["size"]) - offset:
        return 0
    return int(regions[row]["addr"]) + offset


@jit
def append_pieces(
    regions: Records,
    first: int,
    count: int,
    gpa: int,
    length: int,
    segments: Records,
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
        offset = gpa - int(regions[row]["gpa"])
        piece = min(length, int(regions[row]["size"]) - offset)
        segments[used]["addr"] = int(regions[row]["addr"]) + offset
        segments[used]["len"] = piece
        used += 1
        gpa += piece
        length -= piece
    return used
