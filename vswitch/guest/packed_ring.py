"""The driver's half of a packed virtqueue.

    describe (an indirect table, if that is the shape) -> offer (the chain, in the ring)
      -> expose (the flags that were held back) ~~> device ~~> collect (used descriptors)

One ring of descriptors, written by both sides; what a descriptor is, its two flags say:
AVAIL is the lap and USED is not: offered; both are the lap: used. A used descriptor takes
the place of the first of its chain and names the chain by its id, the number of our slot.

A descriptor must not be seen before those behind it are complete, so the first flags of
all that was offered since the last time are stored last, one store a burst.

Since the device overwrites descriptors, the raw functions write them anew each time.

virtio 1.2 §2.8 packed virtqueues.
"""

from typing import Final

from ports.native import (
    Record,
    fence,
    jit,
    load_acquire_u16,
    load_u16,
    load_u32,
    store_release_u16,
    store_u16,
    store_u32,
    store_u64,
)
from ports.vhost.virtio import (
    DESC_F_AVAIL,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_USED,
    DESC_F_WRITE,
    DESC_SIZE,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    EVENT_FLAGS,
    EVENT_LEN,
    EVENT_OFF_WRAP,
)
from vswitch.guest.slots import (
    end_of,
    entries_of,
    is_out,
    note_done,
    note_out,
    passes,
    table_of,
    turn_order,
)

# struct pvirtq_desc, virtio 1.2 §2.8.13.
_ADDR: Final = 0
_LEN: Final = 8
_ID: Final = 12
_FLAGS: Final = 14
_LAP_SHIFT: Final = 15
_EVENT_MASK: Final = 3


def area_lengths(size: int) -> tuple[int, int, int]:
    """Bytes of descriptor ring, driver's and device's event suppression."""
    return DESC_SIZE * size, EVENT_LEN, EVENT_LEN


@jit
def begin(ring: Record, start: int) -> None:
    """As if `start` descriptors had been offered and used since the first lap, 1."""
    size = int(ring["size"])
    index = start % size
    lap = 1 - start // size % 2
    for i in range(size):
        flags = _flags_of(lap if i < index else 1 - lap, used=True)
        store_u16(int(ring["desc"]) + DESC_SIZE * i + _FLAGS, flags)
    ring["avail_idx"] = index
    ring["used_idx"] = index
    ring["avail_lap"] = lap
    ring["used_lap"] = lap


@jit
def _flags_of(lap: int, used: bool) -> int:
    """AVAIL and USED of a descriptor that was offered, or used, in a lap."""
    avail = DESC_F_AVAIL if lap != 0 else 0
    return avail | (DESC_F_USED if (lap != 0) == used else 0)


@jit
def device_position(ring: Record) -> int:
    """Where the device will write next; what it has used is collected.

    vhost-user: the index and the lap, in the low half for what it takes and in the high
    half for what it gives back; one that works in order has one position.
    """
    collect(ring)
    position = int(ring["used_idx"]) | int(ring["used_lap"]) << _LAP_SHIFT
    return position << 16 | position


@jit
def describe(ring: Record, slot: int, length: int) -> None:
    """Write a slot's indirect table; other chains are written by `offer`."""
    if int(ring["indirect"]) == 0:
        return
    entries = entries_of(ring, length)
    gpa = int(ring["buffers_gpa"]) + slot * int(ring["stride"])
    entry = int(ring["tables"]) + DESC_SIZE * table_of(ring, slot)
    begin = 0
    for i in range(entries):
        end = end_of(ring, length, entries, i)
        store_u64(entry + _ADDR, gpa + begin)
        store_u32(entry + _LEN, end - begin)
        # virtio 1.2 §2.8.7: WRITE alone means something here, no id either.
        store_u16(entry + _ID, 0)
        store_u16(entry + _FLAGS, int(ring["write"]))
        entry += DESC_SIZE
        begin = end


@jit
def offer(ring: Record, slot: int, length: int) -> None:
    """Write the chain over `length` bytes of a slot's buffer, not yet visible."""
    entries = entries_of(ring, length)
    if int(ring["indirect"]) != 0:
        table_gpa = int(ring["tables_gpa"]) + DESC_SIZE * table_of(ring, slot)
        _put(ring, table_gpa, DESC_SIZE * entries, slot, DESC_F_INDIRECT)
        note_out(ring, slot, 1)
        return
    gpa = int(ring["buffers_gpa"]) + slot * int(ring["stride"])
    begin = 0
    for i in range(entries):
        end = end_of(ring, length, entries, i)
        flags = int(ring["write"]) | (DESC_F_NEXT if i + 1 < entries else 0)
        _put(ring, gpa + begin, end - begin, slot, flags)
        begin = end
    note_out(ring, slot, entries)


@jit
def _put(ring: Record, gpa: int, length: int, slot: int, flags: int) -> None:
    """Write the next descriptor; the flags of the first since `expose` are held back."""
    index = int(ring["avail_idx"])
    lap = int(ring["avail_lap"])
    entry = int(ring["desc"]) + DESC_SIZE * index
    flags |= _flags_of(lap, used=False)
    store_u64(entry + _ADDR, gpa)
    store_u32(entry + _LEN, length)
    store_u16(entry + _ID, slot)
    if int(ring["unpublished"]) == 0:
        ring["held"] = entry + _FLAGS
        ring["held_flags"] = flags
    else:
        store_u16(entry + _FLAGS, flags)
    ring["unpublished"] += 1
    index += 1
    if index == int(ring["size"]):
        index = 0
        ring["avail_lap"] = 1 - lap
    ring["avail_idx"] = index


@jit
def expose(ring: Record) -> None:
    """Show the device everything offered so far."""
    # Pairs with the device's acquire of the flags: all behind them is complete.
    store_release_u16(int(ring["held"]), int(ring["held_flags"]))


@jit
def wants_kick(ring: Record, added: int) -> bool:
    """Whether the last `added` descriptors have to be announced; after a fence."""
    # Pairs with the device's release of its flags: the position before them is complete.
    flags = load_acquire_u16(int(ring["used"]) + EVENT_FLAGS) & _EVENT_MASK
    if flags != EVENT_DESC or int(ring["event_idx"]) == 0:
        return flags != EVENT_DISABLE
    position = load_u16(int(ring["used"]) + EVENT_OFF_WRAP)
    event = position & ((1 << _LAP_SHIFT) - 1)
    if position >> _LAP_SHIFT != int(ring["avail_lap"]):
        event -= int(ring["size"])
    new = int(ring["avail_idx"])
    return passes(event, new, new - added)


@jit
def collect(ring: Record) -> None:
    """Note what the device has used."""
    most = int(ring["slots"])
    while most > 0 and _is_used(ring):
        most -= 1
        entry = int(ring["desc"]) + DESC_SIZE * int(ring["used_idx"])
        slot = load_u16(entry + _ID)
        if is_out(ring, slot):
            _advance(ring, note_done(ring, slot, _written(entry)))
        else:
            ring["bad_used"] += 1
            _advance(ring, 1)


@jit
def _is_used(ring: Record) -> bool:
    """Whether the device has used the descriptor at our position."""
    entry = int(ring["desc"]) + DESC_SIZE * int(ring["used_idx"])
    # Pairs with the device's release of the flags: id and length are complete.
    flags = load_acquire_u16(entry + _FLAGS) & (DESC_F_AVAIL | DESC_F_USED)
    return flags == _flags_of(int(ring["used_lap"]), used=True)


@jit
def _written(entry: int) -> int:
    """Bytes that the device wrote; without WRITE the length says nothing, §2.8.4."""
    if load_u16(entry + _FLAGS) & DESC_F_WRITE == 0:
        return 0
    return load_u32(entry + _LEN)


@jit
def _advance(ring: Record, descriptors: int) -> None:
    index = int(ring["used_idx"]) + descriptors
    if index >= int(ring["size"]):
        index -= int(ring["size"])
        ring["used_lap"] = 1 - int(ring["used_lap"])
    ring["used_idx"] = index


@jit
def ask_for_calls(ring: Record) -> int:
    """Have the device call at the next used descriptor; 1: there is one already."""
    events = int(ring["avail"])
    if int(ring["event_idx"]) != 0:
        position = int(ring["used_idx"]) | int(ring["used_lap"]) << _LAP_SHIFT
        store_u16(events + EVENT_OFF_WRAP, position)
        # Pairs with the device's acquire of the flags.
        store_release_u16(events + EVENT_FLAGS, EVENT_DESC)
    else:
        store_u16(events + EVENT_FLAGS, EVENT_ENABLE)
    # Pairs with the device's fence between releasing flags and reading what we ask.
    fence()
    return 1 if _is_used(ring) else 0


@jit
def refuse_calls(ring: Record) -> None:
    """Tell the device that we look ourselves."""
    store_u16(int(ring["avail"]) + EVENT_FLAGS, EVENT_DISABLE)


# --- raw: one descriptor a slot, the slot at a position always the same ----------------


@jit
def raw_fits(ring: Record) -> bool:
    """Whether each position of the ring shows the slot of its number."""
    for slot in range(int(ring["size"])):
        if load_u16(int(ring["desc"]) + DESC_SIZE * slot + _ID) != slot:
            return False
    return True


@jit
def raw_room(ring: Record, most: int) -> int:
    """How many more frames can be sent, counted up to `most`."""
    size = int(ring["size"])
    out = int(ring["avail_idx"]) - int(ring["used_idx"])
    if int(ring["avail_lap"]) != int(ring["used_lap"]):
        out += size
    while size - out < most and out > 0 and _is_used(ring):
        came = 1
        if int(ring["in_order"]) != 0:
            entry = int(ring["desc"]) + DESC_SIZE * int(ring["used_idx"])
            came = _batch(ring, load_u16(entry + _ID))
        _advance(ring, came)
        out -= came
    return size - out


@jit
def _batch(ring: Record, slot: int) -> int:
    """Slots from our position to the one that the device names, a whole batch."""
    came = slot - int(ring["used_idx"]) + 1
    return came if came > 0 else came + int(ring["size"])


@jit
def raw_arrived(ring: Record, most: int) -> int:
    """How many buffers have been filled, counted up to `most`."""
    size = int(ring["size"])
    index = int(ring["used_idx"])
    filled = _flags_of(int(ring["used_lap"]), used=True)
    count = 0
    while count < most:
        entry = int(ring["desc"]) + DESC_SIZE * index
        # Pairs with the device's release of the flags: the frame is complete.
        flags = load_acquire_u16(entry + _FLAGS) & (DESC_F_AVAIL | DESC_F_USED)
        if flags != filled:
            break
        count += 1
        index += 1
        if index == size:
            index = 0
            filled ^= DESC_F_AVAIL | DESC_F_USED
    return count


@jit
def raw_offer(ring: Record, count: int, length: int) -> None:
    """Offer the next `count` slots, not yet visible."""
    index = int(ring["avail_idx"])
    _put(ring, _raw_gpa(ring, index), length, index, int(ring["write"]))
    size = int(ring["size"])
    stride = int(ring["stride"])
    lap = int(ring["avail_lap"])
    index = int(ring["avail_idx"])
    flags = int(ring["write"]) | _flags_of(lap, used=False)
    gpa = _raw_gpa(ring, index)
    entry = int(ring["desc"]) + DESC_SIZE * index
    for _ in range(count - 1):
        store_u64(entry + _ADDR, gpa)
        # Length, id and flags: what is behind the flags held back needs no order.
        store_u64(entry + _LEN, length | index << 32 | flags << 48)
        index += 1
        gpa += stride
        entry += DESC_SIZE
        if index == size:
            index = 0
            lap = 1 - lap
            flags ^= DESC_F_AVAIL | DESC_F_USED
            gpa = _raw_gpa(ring, 0)
            entry = int(ring["desc"])
    ring["avail_idx"] = index
    ring["avail_lap"] = lap
    ring["unpublished"] += count - 1


@jit
def _raw_gpa(ring: Record, slot: int) -> int:
    return int(ring["buffers_gpa"]) + slot * int(ring["stride"])


@jit
def raw_return(ring: Record, count: int) -> None:
    """Offer the `count` buffers that were filled first again, not yet visible."""
    _advance(ring, count)
    turn_order(ring, count)
    raw_offer(ring, count, int(ring["buffer_len"]))
