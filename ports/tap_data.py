"""Data half of a tap port: one system call a frame, straight from the guest's buffer.

Both rings of a queue pair hold the tap's descriptor for that queue in `kick_fd`. Received
frames lie in the worker's own slots; transmitted ones are handed to the kernel as the
pieces they are in, so the kernel's copy is the only one. A virtio-net header comes and
goes with each, as with a guest: the kernel begins checksums and sends super-frames, and
completes and cuts ours.

With the backend io_uring, the writes of a burst are one call. Reads are not: nobody knows
how many frames there are, and a read by the ring that finds none costs half of what one
costs that does, so that it was faster only with hundreds of frames in the queue.
"""

import errno
from typing import Final

from ports import gathered, offload, uring_data
from ports.base import BACKEND_URING
from ports.burst import (
    BURST_SIZE,
    HEADER_SLOT,
    MAX_TARGETS,
    MIN_FRAME,
    SEGMENT,
    TAP_SLOT,
    TOO_SHORT,
)
from ports.native import Record, jit, load_u64, read_fd, writev_fd
from ports.views import frame_at, uring_at

HEADER_LEN: Final = offload.HEADER_LEN
_SEGMENT_SIZE: Final = SEGMENT.itemsize
# A ring has a price of its own, which two writes do not earn back.
_FEWEST_WRITES: Final = 4
_EINVAL: Final = errno.EINVAL
_EAGAIN: Final = errno.EAGAIN
_ENOMEM: Final = errno.ENOMEM
_ENOBUFS: Final = errno.ENOBUFS


@jit
def receive(ring: Record, ctx: Record) -> int:
    """Read up to a burst of frames; return how many. Errors end the burst."""
    fd = int(ring["kick_fd"])
    slots = int(ctx["tap_slots"])
    for i in range(BURST_SIZE):
        addr = slots + i * TAP_SLOT
        got = read_fd(fd, addr, TAP_SLOT)
        if got <= 0:
            return i
        length = got - HEADER_LEN
        frame = frame_at(int(ctx["burst"]), i)
        frame["addr"] = addr + HEADER_LEN
        frame["eth"] = addr + HEADER_LEN
        frame["length"] = length if length >= MIN_FRAME else TOO_SHORT
        frame["segments"] = 1
        frame["offload"] = 0
    return BURST_SIZE


@jit
def transmit(ring: Record, port: Record, ctx: Record, n: int, tally: Record) -> int:
    """Write the `n` picked frames; return how many the kernel took.

    A full queue and a link that is down are counted apart.
    """
    fd = int(ring["kick_fd"])
    max_frame = int(port["max_frame"])
    by_ring = int(port["backend"]) == BACKEND_URING and int(ctx["uring"]) != 0
    if by_ring and n >= _FEWEST_WRITES:
        arrived = _write_by_ring(fd, max_frame, ctx, n, tally)
    else:
        arrived = _write(fd, max_frame, ctx, n, tally)
    tally["tx_frames"] += arrived
    return arrived


@jit
def _write(fd: int, max_frame: int, ctx: Record, n: int, tally: Record) -> int:
    """Write frames one by one; how many arrived."""
    arrived = 0
    for k in range(n):
        frame = frame_at(int(ctx["burst"]), load_u64(int(ctx["picked"]) + 8 * k))
        if offload.is_too_long(frame, max_frame):
            tally["tx_drop_too_long"] += 1
            continue
        length = int(frame["length"])
        rows = gathered.gather(ctx, frame, length, int(ctx["heads"]), HEADER_LEN, 0)
        arrived += _count(writev_fd(fd, int(ctx["targets"]), rows), tally)
    return arrived


@jit
def _write_by_ring(fd: int, max_frame: int, ctx: Record, n: int, tally: Record) -> int:
    """Write frames by as few calls as have room for their pieces; how many arrived."""
    uring = uring_at(int(ctx["uring"]), 0)
    targets = int(ctx["targets"])
    arrived = 0
    queued = 0
    row = 0
    for k in range(n):
        frame = frame_at(int(ctx["burst"]), load_u64(int(ctx["picked"]) + 8 * k))
        if offload.is_too_long(frame, max_frame):
            tally["tx_drop_too_long"] += 1
            continue
        if row + 2 + int(frame["segments"]) > MAX_TARGETS:
            arrived += _submit(uring, queued, tally)
            queued = 0
            row = 0
        length = int(frame["length"])
        header = int(ctx["message_headers"]) + queued * HEADER_SLOT
        behind = gathered.gather(ctx, frame, length, header, HEADER_LEN, row)
        pieces = targets + row * _SEGMENT_SIZE
        uring_data.queue_write(uring, queued, fd, pieces, behind - row)
        row = behind
        queued += 1
    return arrived + _submit(uring, queued, tally)


@jit
def _submit(uring: Record, queued: int, tally: Record) -> int:
    """Do the writes that are queued; how many frames arrived."""
    done = uring_data.submit(uring, queued)
    arrived = 0
    for _ in range(done):
        arrived += _count(uring_data.take_result(uring), tally)
    tally["tx_drop_ring_full"] += queued - done
    return arrived


@jit
def _count(got: int, tally: Record) -> int:
    """Count what became of a write, bytes or -errno; 1 if its frame arrived."""
    if got > HEADER_LEN:
        tally["tx_bytes"] += got - HEADER_LEN
        return 1
    if got in (-_EAGAIN, -_ENOBUFS, -_ENOMEM):
        tally["tx_drop_ring_full"] += 1
    elif got == -_EINVAL:
        tally["tx_drop_bad_offload"] += 1
    else:
        tally["tx_drop_link_down"] += 1
    return 0
