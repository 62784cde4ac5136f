"""Data half of a tap port: one system call a frame, straight from the guest's buffer.

Both rings of a queue pair hold the tap's descriptor for that queue in `kick_fd`.

Received frames lie in the worker's own slots; transmitted ones are handed to the kernel
as the pieces they are in, so the kernel's copy is the only one. A virtio-net header comes
and goes with each, as with a guest: the kernel begins checksums and sends super-frames,
and completes and cuts ours.
"""

import errno
from typing import Final

from ports import gathered, offload
from ports.burst import (
    BURST_SIZE,
    MIN_FRAME,
    TAP_SLOT,
    TOO_SHORT,
)
from ports.native import Record, jit, load_u64, read_fd, writev_fd
from ports.views import frame_at

HEADER_LEN: Final = offload.HEADER_LEN
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
    arrived = 0
    for k in range(n):
        pick = load_u64(int(ctx["picked"]) + 8 * k)
        frame = frame_at(int(ctx["burst"]), pick)
        length = int(frame["length"])
        if length > max_frame and offload.wire_length(frame) > max_frame:
            tally["tx_drop_too_long"] += 1
            continue
        rows = gathered.gather(ctx, frame, length, int(ctx["heads"]), HEADER_LEN, 0)
        got = writev_fd(fd, int(ctx["targets"]), rows)
        if got == HEADER_LEN + length:
            arrived += 1
            tally["tx_bytes"] += length
        elif got in (-_EAGAIN, -_ENOBUFS, -_ENOMEM):
            tally["tx_drop_ring_full"] += 1
        elif got == -_EINVAL:
            tally["tx_drop_bad_offload"] += 1
        else:
            tally["tx_drop_link_down"] += 1
    tally["tx_frames"] += arrived
    return arrived
