"""Data half of a tap with vhost-net: the driver's side of the kernel's virtqueues.

The kernel's vhost thread is the device, so what is a guest's elsewhere is ours here: the
rings, the buffers (`vhost_net_memory`), and in RING the words kick and call change sides:
`kick_fd` is what the kernel signals, `call_fd` what we wake it with.

The kernel uses buffers in the order in which they were offered and completes them in that
order. That makes each ring its own memory, and no worker keeps a position that could be
lost with it:

    receive   offered: all slots but those of the burst in hand, so the burst begins SLOTS
              before avail.idx. Who dies with a burst has published nothing; the heir finds
              the same frames again.
    transmit  slots are taken in turn, as many as a frame needs, so the next one is behind
              the last frame in the available ring. Free are those up to the frame that
              was completed last, which stays untouched: it may be the last one as well.

A completion out of its order breaks the ring. Kernels whose vhost-net sends without a
copy have such; `vhost_net` does without them.

virtio 1.2 §2.7, §5.1.6.4.
"""

from typing import Final

from ports import offload, pieces
from ports.base import RING_BROKEN
from ports.burst import (
    ADDRESSES_LEN,
    BURST_SIZE,
    MAX_FRAME,
    MIN_FRAME,
    TOO_LONG,
    TOO_SHORT,
)
from ports.native import (
    Record,
    copy_bytes,
    eventfd_signal,
    fence,
    jit,
    load_acquire_u16,
    load_any_u16,
    load_any_u64,
    load_u16,
    load_u32,
    load_u64,
    prefetch_read,
    store_release_u16,
    store_u16,
    store_u32,
)
from ports.vhost.virtio import (
    AVAIL_IDX,
    AVAIL_RING,
    DESC,
    DESC_SIZE,
    NET_HDR,
    NET_HDR_LEN,
    USED_ELEM_SIZE,
    USED_IDX,
    USED_RING,
)
from ports.vhost_net_memory import SLOT_LEN
from ports.views import frame_at, segment_at

_NUM_BUFFERS: Final = NET_HDR.fields["num_buffers"][1] if NET_HDR.fields else 0
_LEN: Final = DESC.fields["len"][1] if DESC.fields else 0
_U16: Final = 0xFFFF
_U32: Final = 0xFFFFFFFF
_LEN_SHIFT: Final = 32  # of the length in a used element
_AHEAD: Final = 8  # slots from the one that is looked at to the one that is asked for


# --- receive ---


@jit
def receive(ring: Record, ctx: Record, tally: Record) -> int:
    """Describe up to a burst of frames; return how many.

    A frame fills several slots, all but the last to the end (§5.1.6.4), and is in one
    piece all the same, or in two where it goes on at the ring's first slot.
    """
    size = int(ring["size"])
    mask = size - 1
    begin = _next_used(ring)
    # Pairs with the kernel's write of used.idx: what is before it is complete.
    pending = (load_acquire_u16(int(ring["used"]) + USED_IDX) - begin) & _U16
    if pending > size:
        _break(ring, tally)
        return 0
    taken = 0
    n = 0
    while taken < pending and n < BURST_SIZE:
        slot = (begin + taken) & mask
        addr = _slot_addr(ring, slot)
        prefetch_read(_slot_addr(ring, (slot + _AHEAD) & mask))
        slots = load_any_u16(addr + _NUM_BUFFERS)
        if slots < 1 or slots > pending - taken or _used_len(ring, slot) < 0:
            _break(ring, tally)
            break
        last = _used_len(ring, (slot + slots - 1) & mask)
        length = (slots - 1) * SLOT_LEN + last - NET_HDR_LEN
        if last < 0:
            _break(ring, tally)
            break
        frame = frame_at(int(ctx["burst"]), n)
        frame["addr"] = addr + NET_HDR_LEN
        frame["eth"] = addr + NET_HDR_LEN
        frame["offload"] = 0
        frame["segments"] = 1
        if length < MIN_FRAME:
            frame["length"] = TOO_SHORT
        elif length > MAX_FRAME:
            frame["length"] = TOO_LONG
        else:
            frame["length"] = length
            if slot + slots > size:
                _split(ctx, frame, n, (size - slot) * SLOT_LEN, _slot_addr(ring, 0))
        taken += slots
        n += 1
    ring["next_used"] = (begin + taken) & _U16
    return n


@jit
def _split(ctx: Record, frame: Record, i: int, room: int, rest: int) -> None:
    """Make frame `i` two pieces: in `room` bytes with its header, and from `rest` on."""
    first = 2 * i
    opening = segment_at(int(ctx["segments"]), first)
    opening["addr"] = int(frame["addr"])
    opening["len"] = room - NET_HDR_LEN
    ending = segment_at(int(ctx["segments"]), first + 1)
    ending["addr"] = rest
    ending["len"] = int(frame["length"]) - int(opening["len"])
    frame["segments"] = 2
    frame["first_segment"] = first


@jit
def release(ring: Record) -> None:
    """Offer the slots of the last burst again."""
    avail = int(ring["avail"]) + AVAIL_IDX
    old = load_u16(avail)
    new = (int(ring["next_used"]) + int(ring["size"])) & _U16
    # Pairs with the kernel's read of avail.idx: we are done with the buffers before it.
    store_release_u16(avail, new)
    _kick_for(ring, old, new)


@jit
def ask_for_kicks(ring: Record) -> bool:
    """Have the kernel signal the next frame; True if one is here already."""
    begin = _next_used(ring)
    store_u16(_used_event(ring), begin)
    # Pairs with the kernel's between its write of used.idx and its look at our wish.
    fence()
    return load_acquire_u16(int(ring["used"]) + USED_IDX) != begin


@jit
def stop_kicks(ring: Record) -> None:
    """Ask for no signals: not before the index has gone round."""
    store_u16(_used_event(ring), _next_used(ring) - 1)


@jit
def _next_used(ring: Record) -> int:
    """The place in the used ring where the next frame will be, or the burst in hand is."""
    return (load_u16(int(ring["avail"]) + AVAIL_IDX) - int(ring["size"])) & _U16


@jit
def _used_event(ring: Record) -> int:
    return int(ring["avail"]) + AVAIL_RING + 2 * int(ring["size"])


@jit
def _slot_addr(ring: Record, slot: int) -> int:
    return load_u64(int(ring["desc"]) + DESC_SIZE * slot)


@jit
def _used_len(ring: Record, slot: int) -> int:
    """Bytes that the kernel wrote to a slot; -1: it used another one in its place."""
    word = load_any_u64(int(ring["used"]) + USED_RING + USED_ELEM_SIZE * slot)
    length = word >> _LEN_SHIFT
    return length if word & _U32 == slot and 0 <= length <= SLOT_LEN else -1


# --- transmit ---


@jit
def transmit(ring: Record, port: Record, ctx: Record, n: int, tally: Record) -> int:
    """Copy the `n` picked frames into slots; return how many found room.

    What the kernel thinks of them later, nobody hears.
    """
    size = int(ring["size"])
    mask = size - 1
    desc = int(ring["desc"])
    heads = int(ring["avail"]) + AVAIL_RING
    old = load_u16(int(ring["avail"]) + AVAIL_IDX)
    if not _check_sent(ring, tally):
        tally["tx_drop_not_ready"] += n
        return 0
    next_slot = _behind(ring, load_u16(heads + 2 * ((old - 1) & mask)))
    untouched = load_u16(heads + 2 * ((int(ring["next_used"]) - 1) & mask))
    room = (untouched - next_slot) & mask
    max_frame = int(port["max_frame"])
    new = old
    arrived = 0
    sent_bytes = 0
    for k in range(n):
        frame = frame_at(int(ctx["burst"]), load_u64(int(ctx["picked"]) + 8 * k))
        length = int(frame["length"])
        if offload.is_too_long(frame, max_frame):
            tally["tx_drop_too_long"] += 1
            continue
        slots = _slots_for(ring, next_slot, NET_HDR_LEN + length)
        if slots > room:
            tally["tx_drop_ring_full"] += 1
            continue
        entry = desc + DESC_SIZE * next_slot
        addr = load_u64(entry)
        offload.write_header(addr, NET_HDR_LEN, frame, 0)
        pieces.copy_part(ctx, frame, 0, addr + NET_HDR_LEN, length)
        # What was judged is what is sent.
        copy_bytes(addr + NET_HDR_LEN, int(frame["eth"]), ADDRESSES_LEN)
        store_u32(entry + _LEN, NET_HDR_LEN + length)
        store_u16(heads + 2 * (new & mask), next_slot)
        new = (new + 1) & _U16
        next_slot = (next_slot + slots) & mask
        room -= slots
        arrived += 1
        sent_bytes += length
    # Pairs with the kernel's read of avail.idx: entries and buffers are complete.
    store_release_u16(int(ring["avail"]) + AVAIL_IDX, new)
    _kick_for(ring, old, new)
    tally["tx_frames"] += arrived
    tally["tx_bytes"] += sent_bytes
    return arrived


@jit
def _check_sent(ring: Record, tally: Record) -> bool:
    """Look at what was completed since the last time; False where the order is wrong."""
    mask = int(ring["size"]) - 1
    heads = int(ring["avail"]) + AVAIL_RING
    used = int(ring["used"])
    # Pairs with the kernel's write of used.idx: it is done with the buffers before it.
    end = load_acquire_u16(used + USED_IDX)
    at = int(ring["next_used"])
    while at != end:
        place = at & mask
        sent = load_u32(used + USED_RING + USED_ELEM_SIZE * place)
        if sent != load_u16(heads + 2 * place):
            _break(ring, tally)
            return False
        at = (at + 1) & _U16
    ring["next_used"] = end
    return True


@jit
def _behind(ring: Record, slot: int) -> int:
    """The slot behind those of the frame that begins in this one."""
    length = load_u32(int(ring["desc"]) + DESC_SIZE * slot + _LEN)
    return (slot + _slots_for(ring, slot, length)) & (int(ring["size"]) - 1)


@jit
def _slots_for(ring: Record, slot: int, length: int) -> int:
    """Slots that `length` bytes from there take; behind the last one is room enough."""
    return min(-(-length // SLOT_LEN), int(ring["size"]) - slot)


# --- both ---


@jit
def _kick_for(ring: Record, old: int, new: int) -> None:
    """Wake the kernel if it sleeps until avail.idx passes what it now did."""
    # Pairs with the kernel's between its wish to be woken and its last look at avail.idx.
    fence()
    event = int(ring["used"]) + USED_RING + USED_ELEM_SIZE * int(ring["size"])
    if (new - load_u16(event) - 1) & _U16 < (new - old) & _U16:
        kick(ring)


@jit
def kick(ring: Record) -> None:
    """Wake the kernel: it looks at the ring, which is all that a repair takes.

    Positions are in the ring. But who died may have published what nobody was told of.
    """
    eventfd_signal(int(ring["call_fd"]))


@jit
def _break(ring: Record, tally: Record) -> None:
    """Stop using a ring that makes no sense, rather than write to what is in use."""
    ring["state"] = RING_BROKEN
    tally["broken_rings"] += 1
