"""The driver's half of a split virtqueue, for both directions of a network device.

A ring has `slots`: a buffer each, and the descriptor chain that shows it to the device.

    free slot -> describe -> offer -> publish ~~> device ~~> reap (transmit)
                                                        or  receive, offer again

Slots are taken oldest first, so with a device that works in order the slot at a position
of the available ring stays the same for ever; the raw traffic loop lives off that.

A device that misbehaves is counted (`bad_*`), never trusted: an id that is not out, a
length that cannot be, a header whose num_buffers is wrong. All counts stay 0 with a
sane one, so this is also a test of the device.

virtio 1.2 §2.7 split virtqueues, §5.1.6 network device operation.
"""

from typing import Final

import numpy as np

from ports.native import (
    Record,
    copy_bytes,
    eventfd_signal,
    fence,
    jit,
    load_acquire_u16,
    load_any_u16,
    load_u8,
    load_u16,
    load_u32,
    records_at,
    store_any_u16,
    store_any_u64,
    store_release_u16,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
)
from ports.vhost.virtio import (
    AVAIL_F_NO_INTERRUPT,
    AVAIL_FLAGS,
    AVAIL_IDX,
    AVAIL_RING,
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    NET_HDR,
    NET_HDR_LEN,
    USED_ELEM_SIZE,
    USED_F_NO_NOTIFY,
    USED_FLAGS,
    USED_IDX,
    USED_RING,
)


def _offset(dtype: "np.dtype[np.void]", name: str) -> int:
    fields = dtype.fields
    return int(fields[name][1]) if fields else 0


_ADDR: Final = _offset(DESC, "addr")
_LEN: Final = _offset(DESC, "len")
_FLAGS: Final = _offset(DESC, "flags")
_NEXT: Final = _offset(DESC, "next")
_NUM_BUFFERS: Final = _offset(NET_HDR, "num_buffers")
_IDX_MASK: Final = 0xFFFF

# One virtqueue as its driver knows it; private to the guest.
DRIVER_RING: Final = np.dtype(
    [
        ("desc", "<i8"),  # our addresses of the three areas
        ("avail", "<i8"),
        ("used", "<i8"),
        ("size", "<i8"),  # descriptors, a power of two
        ("event_idx", "<i8"),  # negotiated
        ("mergeable", "<i8"),  # negotiated
        ("header_len", "<i8"),  # of struct virtio_net_hdr, 10 or 12
        ("kick_fd", "<i8"),
        ("call_fd", "<i8"),
        ("avail_idx", "<i8"),  # next to offer
        ("published", "<i8"),  # what the device has been told of avail_idx
        ("used_idx", "<i8"),  # next to look at
        ("buffers", "<i8"),  # our address of slot 0's buffer
        ("buffers_gpa", "<i8"),
        ("buffer_len", "<i8"),  # bytes, header included
        ("stride", "<i8"),  # from one buffer to the next; the rest is a canary
        ("slots", "<i8"),
        ("chain", "<i8"),  # entries of the descriptor table that a slot owns
        ("pieces", "<i8"),  # descriptors over which a frame is spread
        ("header_apart", "<i8"),  # 1: the header has a descriptor of its own
        ("indirect", "<i8"),  # 1: chains are in tables
        ("tables", "<i8"),  # our address of slot 0's indirect table
        ("tables_gpa", "<i8"),
        ("free", "<i8"),  # address of u16[slots], free slots, oldest first
        ("busy", "<i8"),  # address of u8[slots], 1 while the device has it
        ("free_head", "<i8"),  # free-running
        ("free_tail", "<i8"),
        ("frames", "<i8"),
        ("bytes", "<i8"),  # of frames
        ("kicks", "<i8"),
        ("bad_used", "<i8"),
        ("bad_len", "<i8"),
        ("bad_header", "<i8"),
    ]
)
ring_at: Final = records_at(DRIVER_RING)


@jit
def send_frames(
    ring: Record, data: int, offsets: np.ndarray, lengths: np.ndarray
) -> int:
    """Offer frames out of `data` until the ring is full; how many were taken.

    Stops in front of a frame that no buffer can hold.
    """
    reap(ring)
    n = 0
    header = int(ring["header_len"])
    while n < lengths.size and free_slots(ring) > 0:
        length = int(lengths[n])
        if header + length > int(ring["buffer_len"]):
            break
        slot = take_slot(ring)
        buffer = buffer_of(ring, slot)
        clear_header(buffer)
        copy_bytes(buffer + header, data + int(offsets[n]), length)
        describe(ring, slot, header + length, 0)
        offer(ring, slot)
        ring["frames"] += 1
        ring["bytes"] += length
        n += 1
    publish(ring)
    return n


@jit
def receive_frames(
    ring: Record,
    out: int,
    room: int,
    offsets: np.ndarray,
    lengths: np.ndarray,
) -> int:
    """Copy arrived frames one behind the other to `out`; how many.

    Fills at most `lengths` and `room` bytes; what does not fit stays in the ring. The
    buffers are offered again at once.
    """
    # Pairs with the device's release of used.idx: the entries before it are complete.
    end = load_acquire_u16(int(ring["used"]) + USED_IDX)
    n = 0
    at = 0
    while n < lengths.size and int(ring["used_idx"]) != end:
        buffers = frame_buffers(ring, end)
        if buffers == 0:
            continue
        length = _used_bytes(ring, buffers) - int(ring["header_len"])
        if at + length > room:
            break
        _copy_frame(ring, buffers, out + at)
        offsets[n] = at
        lengths[n] = length
        at += length
        n += 1
        ring["frames"] += 1
        ring["bytes"] += length
    publish(ring)
    return n


@jit
def frame_buffers(ring: Record, end: int) -> int:
    """How many buffers the next frame fills; 0: what is there is no frame, skipped."""
    used_idx = int(ring["used_idx"])
    slot = _slot_of(ring, used_idx)
    if slot < 0:
        _skip(ring, used_idx)
        return 0
    header = int(ring["header_len"])
    length = _used_len(ring, used_idx)
    if length < header or length > int(ring["buffer_len"]):
        ring["bad_len"] += 1
        _skip(ring, used_idx)
        return 0
    if header < NET_HDR_LEN:
        return 1
    buffers = load_any_u16(buffer_of(ring, slot) + _NUM_BUFFERS)
    most = (end - used_idx) & _IDX_MASK if int(ring["mergeable"]) != 0 else 1
    if buffers < 1 or buffers > most:
        ring["bad_header"] += 1
        return 1
    return buffers


@jit
def _used_bytes(ring: Record, buffers: int) -> int:
    total = 0
    for i in range(buffers):
        total += _used_len(ring, int(ring["used_idx"]) + i)
    return total


@jit
def _copy_frame(ring: Record, buffers: int, out: int) -> None:
    """Copy a frame out of its buffers and offer them again."""
    skip = int(ring["header_len"])
    for i in range(buffers):
        used_idx = int(ring["used_idx"])
        slot = _slot_of(ring, used_idx)
        length = _used_len(ring, used_idx)
        whole = int(ring["buffer_len"])
        if length > whole or (i + 1 < buffers and length < whole):
            # virtio 1.2 §5.1.6.4: all buffers but the last are full.
            ring["bad_len"] += 1
        if slot >= 0 and length <= whole:
            copy_bytes(out, buffer_of(ring, slot) + skip, length - skip)
        out += length - skip
        skip = 0
        _skip(ring, used_idx)


@jit
def _skip(ring: Record, used_idx: int) -> None:
    """Leave one entry of the used ring behind; its buffer is offered again."""
    slot = _slot_of(ring, used_idx)
    ring["used_idx"] = (used_idx + 1) & _IDX_MASK
    if slot < 0:
        ring["bad_used"] += 1
    else:
        offer(ring, slot)


@jit
def reap(ring: Record) -> int:
    """Take back what the device has transmitted; how many chains."""
    # Pairs with the device's release of used.idx.
    end = load_acquire_u16(int(ring["used"]) + USED_IDX)
    used_idx = int(ring["used_idx"])
    n = 0
    while used_idx != end:
        slot = _slot_of(ring, used_idx)
        if slot < 0:
            ring["bad_used"] += 1
        else:
            if _used_len(ring, used_idx) != 0:
                ring["bad_len"] += 1
            free_slot(ring, slot)
            n += 1
        used_idx = (used_idx + 1) & _IDX_MASK
    ring["used_idx"] = used_idx
    return n


@jit
def post_buffers(ring: Record, count: int) -> int:
    """Offer up to `count` empty buffers to be filled; how many there were."""
    n = 0
    while n < count and free_slots(ring) > 0:
        slot = take_slot(ring)
        describe(ring, slot, int(ring["buffer_len"]), DESC_F_WRITE)
        offer(ring, slot)
        n += 1
    publish(ring)
    return n


@jit
def publish(ring: Record) -> None:
    """Show the device everything offered so far; kick it if it asks."""
    new = int(ring["avail_idx"])
    old = int(ring["published"])
    if new == old:
        return
    # Pairs with the device's acquire of avail.idx.
    store_release_u16(int(ring["avail"]) + AVAIL_IDX, new)
    ring["published"] = new
    # Pairs with the device's fence between asking for kicks and its last look.
    fence()
    if wants_kick(ring, new, old) and int(ring["kick_fd"]) >= 0:
        ring["kicks"] += 1
        eventfd_signal(int(ring["kick_fd"]))


@jit
def wants_kick(ring: Record, new: int, old: int) -> bool:
    """Whether avail.idx going from `old` to `new` has to be announced."""
    used = int(ring["used"])
    if int(ring["event_idx"]) == 0:
        return load_u16(used + USED_FLAGS) & USED_F_NO_NOTIFY == 0
    event = load_u16(used + USED_RING + USED_ELEM_SIZE * int(ring["size"]))
    return passes(event, new, old)


@jit
def passes(event: int, new: int, old: int) -> bool:
    """Whether an index that went from `old` to `new` stepped over `event`.

    virtio 1.2 §2.7.7.2; all three are free-running 16-bit numbers.
    """
    return (new - event - 1) & _IDX_MASK < (new - old) & _IDX_MASK


@jit
def ask_for_calls(ring: Record) -> int:
    """Have the device call at the next used entry; how many are there already."""
    avail = int(ring["avail"])
    used_idx = int(ring["used_idx"])
    store_u16(avail + AVAIL_FLAGS, 0)
    if int(ring["event_idx"]) != 0:
        store_u16(avail + AVAIL_RING + 2 * int(ring["size"]), used_idx)
    # Pairs with the device's fence between releasing used.idx and reading what we ask.
    fence()
    return (load_acquire_u16(int(ring["used"]) + USED_IDX) - used_idx) & _IDX_MASK


@jit
def refuse_calls(ring: Record) -> None:
    """Tell the device that we look ourselves; a call may still come now and then."""
    avail = int(ring["avail"])
    if int(ring["event_idx"]) != 0:
        behind = int(ring["used_idx"]) - 1
        store_u16(avail + AVAIL_RING + 2 * int(ring["size"]), behind)
    else:
        store_u16(avail + AVAIL_FLAGS, AVAIL_F_NO_INTERRUPT)


@jit
def offer(ring: Record, slot: int) -> None:
    """Put a slot's chain into the available ring, not yet visible."""
    avail_idx = int(ring["avail_idx"])
    position = avail_idx & (int(ring["size"]) - 1)
    entry = int(ring["avail"]) + AVAIL_RING + 2 * position
    store_u16(entry, slot * int(ring["chain"]))
    store_u8(int(ring["busy"]) + slot, 1)
    ring["avail_idx"] = (avail_idx + 1) & _IDX_MASK


@jit
def describe(ring: Record, slot: int, length: int, write: int) -> None:
    """Write the chain over the first `length` bytes of a slot's buffer."""
    apart = int(ring["header_apart"])
    header = int(ring["header_len"]) if apart != 0 else 0
    rest = length - header
    pieces = max(1, min(int(ring["pieces"]), rest))
    entries = pieces + apart
    table, first = _table_of(ring, slot)
    gpa = int(ring["buffers_gpa"]) + slot * int(ring["stride"])
    begin = 0
    for i in range(entries):
        end = header + rest * (i + 1 - apart) // pieces
        flags = write | DESC_F_NEXT if i + 1 < entries else write
        entry = table + DESC_SIZE * i
        _put_descriptor(entry, gpa + begin, end - begin, flags, first + i + 1)
        begin = end
    if int(ring["indirect"]) != 0:
        entry = int(ring["desc"]) + DESC_SIZE * slot
        table_gpa = int(ring["tables_gpa"]) + table - int(ring["tables"])
        _put_descriptor(entry, table_gpa, DESC_SIZE * entries, DESC_F_INDIRECT, 0)


@jit
def _table_of(ring: Record, slot: int) -> tuple[int, int]:
    """Where a slot's chain is written, and the index of its first entry there."""
    if int(ring["indirect"]) != 0:
        longest = int(ring["pieces"]) + int(ring["header_apart"])
        return int(ring["tables"]) + DESC_SIZE * longest * slot, 0
    first = slot * int(ring["chain"])
    return int(ring["desc"]) + DESC_SIZE * first, first


@jit
def _put_descriptor(entry: int, gpa: int, length: int, flags: int, after: int) -> None:
    store_u64(entry + _ADDR, gpa)
    store_u32(entry + _LEN, length)
    store_u16(entry + _FLAGS, flags)
    store_u16(entry + _NEXT, after if flags & DESC_F_NEXT != 0 else 0)


@jit
def _slot_of(ring: Record, used_idx: int) -> int:
    """The slot that an entry of the used ring names; -1: not one that is out."""
    entry = _used_entry(ring, used_idx)
    head = load_u32(entry)
    slot = head // int(ring["chain"])
    if slot >= int(ring["slots"]) or head != slot * int(ring["chain"]):
        return -1
    return slot if load_u8(int(ring["busy"]) + slot) != 0 else -1


@jit
def _used_len(ring: Record, used_idx: int) -> int:
    return load_u32(_used_entry(ring, used_idx) + USED_ELEM_SIZE // 2)


@jit
def _used_entry(ring: Record, used_idx: int) -> int:
    position = used_idx & (int(ring["size"]) - 1)
    return int(ring["used"]) + USED_RING + USED_ELEM_SIZE * position


@jit
def buffer_of(ring: Record, slot: int) -> int:
    """Our address of a slot's buffer."""
    return int(ring["buffers"]) + slot * int(ring["stride"])


@jit
def clear_header(buffer: int) -> None:
    """Write a header that asks for nothing: no checksum, no segmentation."""
    store_any_u64(buffer, 0)
    store_any_u16(buffer + 8, 0)
    store_any_u16(buffer + _NUM_BUFFERS, 0)


@jit
def free_slots(ring: Record) -> int:
    """How many slots the device does not have."""
    return int(ring["free_tail"]) - int(ring["free_head"])


@jit
def take_slot(ring: Record) -> int:
    """The slot that has been free longest; there must be one."""
    head = int(ring["free_head"])
    ring["free_head"] = head + 1
    return load_u16(int(ring["free"]) + 2 * (head % int(ring["slots"])))


@jit
def free_slot(ring: Record, slot: int) -> None:
    """Put a slot that came back behind the other free ones."""
    tail = int(ring["free_tail"])
    store_u8(int(ring["busy"]) + slot, 0)
    store_u16(int(ring["free"]) + 2 * (tail % int(ring["slots"])), slot)
    ring["free_tail"] = tail + 1
