"""Frames in one piece or in several, copied."""

from ports.native import Record, copy_bytes, jit
from ports.views import segment_at


@jit
def copy_part(ctx: Record, frame: Record, at: int, dst: int, length: int) -> None:
    """Copy `length` bytes that begin `at` bytes into a frame, which has them."""
    pieces = int(frame["segments"])
    if pieces == 1:
        copy_bytes(dst, int(frame["addr"]) + at, length)
        return
    first = int(frame["first_segment"])
    for k in range(first, first + pieces):
        piece = segment_at(int(ctx["segments"]), k)
        have = int(piece["len"]) - at
        if have <= 0:
            at = -have
            continue
        part = min(have, length)
        copy_bytes(dst, int(piece["addr"]) + at, part)
        dst += part
        length -= part
        at = 0
        if length == 0:
            return
