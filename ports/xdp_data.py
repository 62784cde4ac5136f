"""Data half of an xdp port: frames in memory that we share with the kernel.

A received frame is described where the kernel put it, and its chunks go back when the
burst is released. A frame to transmit is copied into chunks of ours: that copy is the
only one where the driver sends from our memory, and where it cannot, the kernel makes
another in a system call for the burst. `xdp_ring` tells how chunks travel, and why a
worker may die at any instruction.

There are no virtio-net headers here, so whatever a frame asks for is done before it comes
to us. A frame that comes in from another part of this machine may ask, too, but nobody
says so: see `offload.find_begun`.
"""

import errno
from typing import Final

from ports import offload, pieces
from ports.burst import (
    ADDRESSES_LEN,
    BURST_SIZE,
    ETH_SNAPSHOT,
    HEADER_SLOT,
    MAX_FRAME,
    MAX_SEGMENTS,
    MIN_FRAME,
    TOO_LONG,
    TOO_SHORT,
)
from ports.native import (
    Record,
    copy_bytes,
    fence,
    jit,
    load_acquire_u32,
    load_u32,
    load_u64,
    store_release_u32,
    store_release_u64,
    store_u64,
    wake_receiver,
    wake_sender,
)
from ports.views import frame_at, segment_at, xsk_at
from ports.xdp_ring import (
    ADDRESS_LEN,
    DESC_LEN,
    TX_CHUNKS,
    XDP_PKT_CONTD,
    XDP_RING_NEED_WAKEUP,
    XSK,
)

_TO_TX: Final = XSK.itemsize  # from the record to receive to the one to transmit
_MOST_CALLS: Final = 2 * TX_CHUNKS  # of which each sends something
_NEXT_SOURCE: Final = XSK.fields["next_source"][1] if XSK.fields else 0
_NEXT_FRESH: Final = XSK.fields["next_fresh"][1] if XSK.fields else 0
_FRESH: Final = XSK.fields["fresh"][1] if XSK.fields else 0
_UNSENT: Final = XSK.fields["unsent"][1] if XSK.fields else 0

_U32: Final = 0xFFFFFFFF
_TAG: Final = 4
_VLAN: Final = 0x8100
_SERVICE_VLAN: Final = 0x88A8
_EAGAIN: Final = errno.EAGAIN
_EBUSY: Final = errno.EBUSY
_ENOBUFS: Final = errno.ENOBUFS
_ENOMEM: Final = errno.ENOMEM


# --- receive ---


@jit
def receive(ring: Record, ctx: Record, tally: Record) -> int:
    """Describe up to a burst of frames; return how many."""
    base = int(ring["desc"])
    xsk = xsk_at(base, 0)
    if _has_unsent(base):
        _push(base, int(ring["kick_fd"]), tally)
    position = load_u32(int(xsk["source_consumer"]))
    # Pairs with the kernel's store: the entries and the frames are complete.
    ready = (load_acquire_u32(int(xsk["source_producer"])) - position) & _U32
    if ready == 0:
        return 0
    rows = int(xsk["source_rows"])
    mask = int(xsk["source_mask"])
    chunks = int(xsk["chunks"])
    looks = int(ring["header_len"]) != 0
    taken = 0
    frames = 0
    while frames < BURST_SIZE and taken < ready:
        desc = rows + DESC_LEN * ((position + taken) & mask)
        addr = chunks + load_u64(desc)
        word = load_u64(desc + 8)
        length = word & _U32
        frame = frame_at(int(ctx["burst"]), frames)
        frame["addr"] = addr
        frame["eth"] = addr
        frame["offload"] = 0
        frame["segments"] = 1
        frame["length"] = length
        if word >> 32 & XDP_PKT_CONTD:
            taken += _collect(ctx, xsk, frame, frames, position + taken, ready - taken)
        else:
            taken += 1
        if 0 <= int(frame["length"]) < MIN_FRAME:
            frame["length"] = TOO_SHORT
        elif looks and int(frame["length"]) > 0:
            head = int(ctx["heads"]) + (frames + 1) * ETH_SNAPSHOT
            copy_bytes(head, addr, ETH_SNAPSHOT)
            frame["eth"] = head
            clean = int(ctx["headers"]) + frames * HEADER_SLOT
            offload.find_begun(frame, addr, length, clean)
        frames += 1
    xsk["taken"] = taken
    return frames


@jit
def _collect(
    ctx: Record, xsk: Record, frame: Record, i: int, position: int, ready: int
) -> int:
    """List the pieces of frame `i` from `position`; return how many entries it has."""
    rows = int(xsk["source_rows"])
    mask = int(xsk["source_mask"])
    chunks = int(xsk["chunks"])
    first = i * MAX_SEGMENTS
    total = 0
    n = 0
    goes_on = True
    while goes_on and n < ready:
        desc = rows + DESC_LEN * ((position + n) & mask)
        word = load_u64(desc + 8)
        if n < MAX_SEGMENTS:
            piece = segment_at(int(ctx["segments"]), first + n)
            piece["addr"] = chunks + load_u64(desc)
            piece["len"] = word & _U32
        total += word & _U32
        n += 1
        goes_on = word >> 32 & XDP_PKT_CONTD != 0
    frame["length"] = total
    frame["segments"] = n
    frame["first_segment"] = first
    if goes_on or n > MAX_SEGMENTS or total > MAX_FRAME:
        frame["length"] = TOO_LONG
    return n


@jit
def release(ring: Record) -> None:
    """Give the chunks of the last burst back to the kernel."""
    base = int(ring["desc"])
    xsk = xsk_at(base, 0)
    taken = int(xsk["taken"])
    position = load_u32(int(xsk["source_consumer"]))
    free = load_u32(int(xsk["sink_producer"]))
    for k in range(taken):
        desc = int(xsk["source_rows"]) + DESC_LEN * (
            (position + k) & int(xsk["source_mask"])
        )
        row = int(xsk["sink_rows"]) + ADDRESS_LEN * ((free + k) & int(xsk["sink_mask"]))
        store_u64(row, load_u64(desc))  # the kernel rounds it to the chunk
    _move(base, free + taken, position + taken, 0)
    if int(xsk["copies"]) == 0:
        fence()  # the kernel says that it sleeps, and looks once more
        if load_u32(int(xsk["sink_flags"])) & XDP_RING_NEED_WAKEUP:
            wake_receiver(int(ring["kick_fd"]))


@jit
def has_frame(ring: Record) -> bool:
    """Whether there is a frame, or one that could not be sent yet."""
    base = int(ring["desc"])
    xsk = xsk_at(base, 0)
    ready = load_acquire_u32(int(xsk["source_producer"]))
    return ready != load_u32(int(xsk["source_consumer"])) or _has_unsent(base)


# --- transmit ---


@jit
def transmit(ring: Record, port: Record, ctx: Record, n: int, tally: Record) -> int:
    """Send the `n` picked frames; return how many are on their way."""
    base = int(ring["desc"])
    xsk = xsk_at(base, 0)
    if int(xsk["link_down"]) != 0:
        tally["tx_drop_link_down"] += n
        return 0
    max_frame = int(port["max_frame"])
    room = int(xsk["room"])
    most = int(xsk["most"])
    position = load_u32(int(xsk["source_consumer"]))
    # Pairs with the kernel's store: it is done with these chunks.
    back = (load_acquire_u32(int(xsk["source_producer"])) - position) & _U32
    spare = int(xsk["fresh_end"]) - int(xsk["fresh"])
    made = 0
    put = 0
    n_bytes = 0
    for k in range(n):
        frame = frame_at(int(ctx["burst"]), load_u64(int(ctx["picked"]) + 8 * k))
        length = int(frame["length"])
        parts = -(-length // room)
        if parts > most or (length > max_frame and _is_too_long(ctx, frame, max_frame)):
            tally["tx_drop_too_long"] += 1
        elif made + parts > back + spare:
            tally["tx_drop_ring_full"] += 1
        else:
            _write(ctx, xsk, frame, made, back)
            made += parts
            put += 1
            n_bytes += length
    if put == 0:
        return 0
    producer = load_u32(int(xsk["sink_producer"]))
    reused = min(made, back)
    fresh = int(xsk["fresh"]) + made - reused
    _move(base, producer + made, position + reused, fresh)
    refused, left = _send(xsk, int(ring["kick_fd"]))
    if left:
        xsk["unsent"] += 1
    # Some may be of an earlier burst, which was counted as sent.
    tally["tx_frames"] += put - refused
    tally["tx_bytes"] += n_bytes
    tally["tx_drop_ring_full"] += refused
    return max(0, put - refused)


@jit
def _write(ctx: Record, xsk: Record, frame: Record, made: int, back: int) -> None:
    """Copy a frame into chunks, and list them in the sink, where `made` are before it.

    The first `back` chunks are those in the source, then come fresh ones.
    """
    position = load_u32(int(xsk["source_consumer"]))
    producer = load_u32(int(xsk["sink_producer"]))
    room = int(xsk["room"])
    left = int(frame["length"])
    at = 0
    while left > 0:
        if made < back:
            row = (position + made) & int(xsk["source_mask"])
            chunk = load_u64(int(xsk["source_rows"]) + ADDRESS_LEN * row)
        else:
            chunk = (int(xsk["fresh"]) + made - back) * int(xsk["chunk_len"])
        begin = int(xsk["chunks"]) + chunk
        part = min(room, left)
        pieces.copy_part(ctx, frame, at, begin, part)
        if at == 0:  # as they were judged
            copy_bytes(begin, int(frame["eth"]), ADDRESSES_LEN)
        left -= part
        at += part
        row = (producer + made) & int(xsk["sink_mask"])
        desc = int(xsk["sink_rows"]) + DESC_LEN * row
        store_u64(desc, chunk)
        store_u64(desc + 8, part | (XDP_PKT_CONTD << 32 if left > 0 else 0))
        made += 1


@jit
def _is_too_long(ctx: Record, frame: Record, max_frame: int) -> bool:
    """Whether a frame longer than `max_frame` is so without its tag, too."""
    tagged = offload.ethertype(ctx, frame) in (_VLAN, _SERVICE_VLAN)
    return int(frame["length"]) > max_frame + (_TAG if tagged else 0)


@jit
def _send(xsk: Record, fd: int) -> tuple[int, bool]:
    """Have the kernel send what is in the transmit ring.

    Returns:
        How many frames the device refused, and whether some are left that it had no room
        for. A kernel that does not copy takes frames in its own time, all of them.
    """
    fence()  # the kernel says that it sleeps, and looks once more
    if load_u32(int(xsk["sink_flags"])) & XDP_RING_NEED_WAKEUP == 0:
        return 0, False
    if int(xsk["copies"]) == 0:
        wake_sender(fd)
        return 0, False
    refused = 0
    for _ in range(_MOST_CALLS):
        before = load_u32(int(xsk["sink_consumer"]))
        got = wake_sender(fd)
        if got == -_EBUSY:  # one was taken, and lost
            refused += 1
        elif got == 0:  # all were
            return refused, False
        elif load_u32(int(xsk["sink_consumer"])) == before:
            return refused, got in (-_EAGAIN, -_ENOBUFS, -_ENOMEM)
    return refused, True


@jit
def _has_unsent(base: int) -> bool:
    """Whether frames wait for the device; `base` is that of the record to receive."""
    return load_u64(base + _TO_TX + _UNSENT) != int(xsk_at(base, 0)["unsent"])


@jit
def _push(base: int, fd: int, tally: Record) -> None:
    """Send what somebody could not, as nobody else may ever do so."""
    seen = load_u64(base + _TO_TX + _UNSENT)
    refused, left = _send(xsk_at(base + _TO_TX, 0), fd)
    tally["tx_frames"] -= refused
    tally["tx_drop_ring_full"] += refused
    if not left:
        xsk_at(base, 0)["unsent"] = seen


# --- both ---


@jit
def _move(base: int, sink: int, source: int, fresh: int) -> None:
    """Move a batch: the sink's producer, then what others can do in our place.

    Each store follows the one before it, also in compiled code.
    """
    xsk = xsk_at(base, 0)
    xsk["next_sink"] = sink & _U32  # the producer is not there yet
    store_release_u64(base + _NEXT_SOURCE, source & _U32)
    store_release_u64(base + _NEXT_FRESH, fresh)
    # Pairs with the kernel's acquire: entries and frames are complete.
    store_release_u32(int(xsk["sink_producer"]), sink)
    _finish(base)


@jit
def _finish(base: int) -> None:
    """Do what follows the sink's producer."""
    xsk = xsk_at(base, 0)
    store_release_u32(int(xsk["source_consumer"]), load_u64(base + _NEXT_SOURCE))
    store_release_u64(base + _FRESH, load_u64(base + _NEXT_FRESH))


@jit
def resync(ring: Record) -> None:
    """Finish the batch of a worker that died, if that was moved, and have it sent."""
    base = int(ring["desc"])
    xsk = xsk_at(base, 0)
    if load_u32(int(xsk["sink_producer"])) == int(xsk["next_sink"]):
        _finish(base)
    xsk["unsent"] += 1
