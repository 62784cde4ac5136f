"""The driver's half of a split virtqueue.

    describe (the chain, in the table) -> offer (its head, in the available ring)
      -> expose (avail.idx) ~~> device ~~> collect (what the used ring says)

A slot owns `chain` entries of the descriptor table, one behind the other, for ever. With
a device that works in order the slot at a position of the available ring stays the
same, too; the raw functions live off that: entries are written once, then only counted.

virtio 1.2 §2.7 split virtqueues.
"""

from typing import Final

import numpy as np

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
    AVAIL_F_NO_INTERRUPT,
    AVAIL_FLAGS,
    AVAIL_IDX,
    AVAIL_RING,
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_SIZE,
    USED_ELEM_SIZE,
    USED_F_NO_NOTIFY,
    USED_FLAGS,
    USED_IDX,
    USED_RING,
    avail_len,
    used_len,
)
from vswitch.guest.slots import (
    IDX_MASK,
    end_of,
    entries_of,
    is_out,
    note_done,
    note_out,
    passes,
    table_of,
    turn_order,
)


def _offset(dtype: "np.dtype[np.void]", name: str) -> int:
    fields = dtype.fields
    return int(fields[name][1]) if fields else 0


_ADDR: Final = _offset(DESC, "addr")
_LEN: Final = _offset(DESC, "len")
_FLAGS: Final = _offset(DESC, "flags")
_NEXT: Final = _offset(DESC, "next")


def area_lengths(size: int) -> tuple[int, int, int]:
    """Bytes of descriptor table, available ring and used ring."""
    return DESC_SIZE * size, avail_len(size), used_len(size)


@jit
def begin(ring: Record, start: int) -> None:
    """Both sides stand at `start`; the areas are zeroed."""
    start &= IDX_MASK
    store_u16(int(ring["avail"]) + AVAIL_IDX, start)
    store_u16(int(ring["used"]) + USED_IDX, start)
    ring["avail_idx"] = start
    ring["used_idx"] = start


@jit
def device_position(ring: Record) -> int:
    """The used index, which is how far the device has come."""
    return load_acquire_u16(int(ring["used"]) + USED_IDX)


@jit
def describe(ring: Record, slot: int, length: int) -> None:
    """Write the chain over the first `length` bytes of a slot's buffer."""
    entries = entries_of(ring, length)
    gpa = int(ring["buffers_gpa"]) + slot * int(ring["stride"])
    first = slot * int(ring["chain"])
    table = int(ring["desc"]) + DESC_SIZE * first
    if int(ring["indirect"]) != 0:
        offset = DESC_SIZE * table_of(ring, slot)
        table_gpa = int(ring["tables_gpa"]) + offset
        _put(table, table_gpa, DESC_SIZE * entries, DESC_F_INDIRECT, 0)
        table = int(ring["tables"]) + offset
        first = 0
    begin = 0
    for i in range(entries):
        end = end_of(ring, length, entries, i)
        flags = int(ring["write"]) | (DESC_F_NEXT if i + 1 < entries else 0)
        _put(table + DESC_SIZE * i, gpa + begin, end - begin, flags, first + i + 1)
        begin = end


@jit
def _put(entry: int, gpa: int, length: int, flags: int, after: int) -> None:
    store_u64(entry + _ADDR, gpa)
    store_u32(entry + _LEN, length)
    store_u16(entry + _FLAGS, flags)
    store_u16(entry + _NEXT, after if flags & DESC_F_NEXT != 0 else 0)


@jit
def offer(ring: Record, slot: int) -> None:
    """Put a slot's chain into the available ring, not yet visible."""
    avail_idx = int(ring["avail_idx"])
    position = avail_idx & (int(ring["size"]) - 1)
    entry = int(ring["avail"]) + AVAIL_RING + 2 * position
    store_u16(entry, slot * int(ring["chain"]))
    note_out(ring, slot, 1)
    ring["avail_idx"] = (avail_idx + 1) & IDX_MASK
    ring["unpublished"] += 1


@jit
def expose(ring: Record) -> None:
    """Show the device everything offered so far."""
    # Pairs with the device's acquire of avail.idx.
    store_release_u16(int(ring["avail"]) + AVAIL_IDX, int(ring["avail_idx"]))


@jit
def wants_kick(ring: Record, added: int) -> bool:
    """Whether the last `added` chains have to be announced; after a fence."""
    used = int(ring["used"])
    if int(ring["event_idx"]) == 0:
        return load_u16(used + USED_FLAGS) & USED_F_NO_NOTIFY == 0
    event = load_u16(used + USED_RING + USED_ELEM_SIZE * int(ring["size"]))
    new = int(ring["avail_idx"])
    return passes(event, new, new - added)


@jit
def collect(ring: Record) -> None:
    """Note what the device has used."""
    # Pairs with the device's release of used.idx: the entries before it are complete.
    end = load_acquire_u16(int(ring["used"]) + USED_IDX)
    used_idx = int(ring["used_idx"])
    mask = int(ring["size"]) - 1
    chain = int(ring["chain"])
    while used_idx != end:
        entry = int(ring["used"]) + USED_RING + USED_ELEM_SIZE * (used_idx & mask)
        head = load_u32(entry)
        slot = head // chain
        chains = 1
        if head == slot * chain and is_out(ring, slot):
            chains = note_done(ring, slot, load_u32(entry + USED_ELEM_SIZE // 2))
        else:
            ring["bad_used"] += 1
        if chains > (end - used_idx) & IDX_MASK:
            ring["bad_used"] += 1
            break
        used_idx = (used_idx + chains) & IDX_MASK
    ring["used_idx"] = end


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
    return (load_acquire_u16(int(ring["used"]) + USED_IDX) - used_idx) & IDX_MASK


@jit
def refuse_calls(ring: Record) -> None:
    """Tell the device that we look ourselves; a call may still come now and then."""
    avail = int(ring["avail"])
    if int(ring["event_idx"]) != 0:
        behind = int(ring["used_idx"]) - 1
        store_u16(avail + AVAIL_RING + 2 * int(ring["size"]), behind)
    else:
        store_u16(avail + AVAIL_FLAGS, AVAIL_F_NO_INTERRUPT)


# --- raw: one descriptor a slot, the slot at a position always the same ----------------


@jit
def raw_prepare(ring: Record) -> None:
    """Write what every lap shows; nothing is out."""
    for slot in range(int(ring["size"])):
        store_u16(int(ring["avail"]) + AVAIL_RING + 2 * slot, slot)


@jit
def raw_fits(ring: Record) -> bool:
    """Whether each position of the available ring shows the slot of its number."""
    for slot in range(int(ring["size"])):
        if load_u16(int(ring["avail"]) + AVAIL_RING + 2 * slot) != slot:
            return False
    return True


@jit
def raw_room(ring: Record) -> int:
    """How many more frames can be sent."""
    # Pairs with the device's release of used.idx: it is done with those buffers.
    used_idx = load_acquire_u16(int(ring["used"]) + USED_IDX)
    ring["used_idx"] = used_idx
    return int(ring["size"]) - ((int(ring["avail_idx"]) - used_idx) & IDX_MASK)


@jit
def raw_arrived(ring: Record) -> int:
    """How many buffers have been filled."""
    # Pairs with the device's release of used.idx: the frames before it are complete.
    end = load_acquire_u16(int(ring["used"]) + USED_IDX)
    return (end - int(ring["used_idx"])) & IDX_MASK


@jit
def raw_offer(ring: Record, count: int) -> None:
    """Offer the next `count` slots as they are, not yet visible."""
    ring["avail_idx"] = (int(ring["avail_idx"]) + count) & IDX_MASK
    ring["unpublished"] += count


@jit
def raw_return(ring: Record, count: int) -> None:
    """Offer the `count` buffers that were filled first again, not yet visible."""
    ring["used_idx"] = (int(ring["used_idx"]) + count) & IDX_MASK
    turn_order(ring, count)
    raw_offer(ring, count)
