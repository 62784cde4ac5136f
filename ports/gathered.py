"""A frame as the kernel takes it: a header and the frame's pieces, as struct iovec rows.

The kernel copies from where the frame lies, so that copy is the only one.
"""

from ports import offload
from ports.burst import ADDRESSES_LEN
from ports.native import Record, jit
from ports.views import segment_at


@jit
def gather(
    ctx: Record, frame: Record, length: int, header: int, header_len: int, row: int
) -> int:
    """Write the virtio-net header at `header`; list it and the frame from target `row`.

    The judged addresses come from our own memory, the rest from the sender's.

    Returns:
        The row behind the last: at most two more than the frame has pieces.
    """
    targets = int(ctx["targets"])
    offload.write_header(header, header_len, frame, 0)
    opening = segment_at(targets, row)
    opening["addr"] = header
    opening["len"] = header_len
    judged = segment_at(targets, row + 1)
    judged["addr"] = int(frame["eth"])
    judged["len"] = ADDRESSES_LEN
    pieces = int(frame["segments"])
    if pieces == 1:
        piece = segment_at(targets, row + 2)
        piece["addr"] = int(frame["addr"]) + ADDRESSES_LEN
        piece["len"] = length - ADDRESSES_LEN
        return row + 3
    skip = ADDRESSES_LEN
    for k in range(pieces):
        source = segment_at(int(ctx["segments"]), int(frame["first_segment"]) + k)
        passed = min(skip, int(source["len"]))
        skip -= passed
        piece = segment_at(targets, row + 2 + k)
        piece["addr"] = int(source["addr"]) + passed
        piece["len"] = int(source["len"]) - passed
    return row + 2 + pieces
