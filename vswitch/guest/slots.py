"""A virtqueue as its driver knows it: one record, and its slots.

A slot is a buffer and the descriptor chain that shows it to the device.

    free ~> offered (the device has it) ~> free again (transmit)
                                        ~> done ~> offered again (receive)

Slots are taken oldest first. Three private queues remember where each is: `free`, `done`
(filled by the device and not yet looked at, with the length that it wrote) and, with
IN_ORDER, `order` (offered, oldest first). They know nothing of a ring's format.

A device that misbehaves is counted (`bad_*`), never trusted: an id that is not out, a
length that cannot be, a header whose num_buffers is wrong. All counts stay 0 with a
sane one, so this is also a test of the device.
"""

from typing import Final

import numpy as np

from ports.native import (
    Record,
    jit,
    load_u16,
    load_u64,
    records_at,
    store_u16,
    store_u64,
)

IDX_MASK: Final = 0xFFFF
_LENGTH_SHIFT: Final = 16

# One virtqueue as its driver knows it; private to the guest.
DRIVER_RING: Final = np.dtype(
    [
        ("packed", "<i8"),  # negotiated; 0: split
        ("desc", "<i8"),  # our addresses of the three areas
        ("avail", "<i8"),  # packed: the driver's events
        ("used", "<i8"),  # packed: the device's events
        ("size", "<i8"),  # descriptors; a power of two where split
        ("event_idx", "<i8"),  # negotiated
        ("in_order", "<i8"),  # negotiated
        ("mergeable", "<i8"),  # negotiated
        ("header_len", "<i8"),  # of struct virtio_net_hdr, 10 or 12
        ("write", "<i8"),  # DESC_F_WRITE where the device fills buffers, else 0
        ("kick_fd", "<i8"),
        ("call_fd", "<i8"),
        # Split: free-running, modulo 2**16. Packed: below size, with a lap of 0 or 1.
        ("avail_idx", "<i8"),  # next to offer
        ("avail_lap", "<i8"),
        ("used_idx", "<i8"),  # next to look at
        ("used_lap", "<i8"),
        ("unpublished", "<i8"),  # offered since; split: chains, packed: descriptors
        ("held", "<i8"),  # packed: address of the flags to publish, and what they are
        ("held_flags", "<i8"),
        ("buffers", "<i8"),  # our address of slot 0's buffer
        ("buffers_gpa", "<i8"),
        ("buffer_len", "<i8"),  # bytes, header included
        ("stride", "<i8"),  # from one buffer to the next; the rest is a canary
        ("slots", "<i8"),
        ("chain", "<i8"),  # descriptors that a slot takes at most
        ("pieces", "<i8"),  # descriptors over which a frame is spread
        ("header_apart", "<i8"),  # 1: the header has a descriptor of its own
        ("indirect", "<i8"),  # 1: chains are in tables
        ("tables", "<i8"),  # our address of slot 0's indirect table
        ("tables_gpa", "<i8"),
        ("out", "<i8"),  # address of u16[slots]: descriptors that the device has
        ("queue_mask", "<i8"),  # of positions in the queues below
        ("free", "<i8"),  # address of u16[]
        ("free_head", "<i8"),  # free-running, as are the other heads and tails
        ("free_tail", "<i8"),
        ("order", "<i8"),  # address of u16[]
        ("order_head", "<i8"),
        ("order_tail", "<i8"),
        ("done", "<i8"),  # address of u64[]: length << 16 | slot
        ("done_head", "<i8"),
        ("done_tail", "<i8"),
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
def buffer_of(ring: Record, slot: int) -> int:
    """Our address of a slot's buffer."""
    return int(ring["buffers"]) + slot * int(ring["stride"])


@jit
def free_slots(ring: Record) -> int:
    """How many slots are free."""
    return int(ring["free_tail"]) - int(ring["free_head"])


@jit
def take_slot(ring: Record) -> int:
    """The slot that has been free longest; there must be one."""
    head = int(ring["free_head"])
    ring["free_head"] = head + 1
    return load_u16(int(ring["free"]) + 2 * (head & int(ring["queue_mask"])))


@jit
def free_slot(ring: Record, slot: int) -> None:
    """Put a slot behind the other free ones."""
    tail = int(ring["free_tail"])
    store_u16(int(ring["free"]) + 2 * (tail & int(ring["queue_mask"])), slot)
    ring["free_tail"] = tail + 1


@jit
def note_out(ring: Record, slot: int, descriptors: int) -> None:
    """The device has a slot from now on."""
    store_u16(int(ring["out"]) + 2 * slot, descriptors)
    if int(ring["in_order"]) != 0:
        _push_order(ring, slot)


@jit
def is_out(ring: Record, slot: int) -> bool:
    """Whether the device has this slot; any number may be asked for."""
    if slot >= int(ring["slots"]):
        return False
    return load_u16(int(ring["out"]) + 2 * slot) != 0


@jit
def note_done(ring: Record, slot: int, length: int) -> int:
    """The device gave a slot back that it had; how many descriptors came with it.

    With IN_ORDER so did every slot that was offered before, used completely: all of
    its buffer was read, or written (virtio 1.2 §2.7.9, §2.8.8).
    """
    if int(ring["in_order"]) == 0:
        return _came_back(ring, slot, length)
    skipped = int(ring["buffer_len"]) if int(ring["write"]) != 0 else 0
    descriptors = 0
    while True:
        oldest = pop_order(ring)
        if oldest == slot:
            return descriptors + _came_back(ring, slot, length)
        descriptors += _came_back(ring, oldest, skipped)


@jit
def _came_back(ring: Record, slot: int, length: int) -> int:
    addr = int(ring["out"]) + 2 * slot
    descriptors = load_u16(addr)
    store_u16(addr, 0)
    if int(ring["write"]) != 0:
        _to_done(ring, slot, length)
    else:
        free_slot(ring, slot)
        ring["bad_len"] += int(length != 0)
    return descriptors


@jit
def _to_done(ring: Record, slot: int, length: int) -> None:
    tail = int(ring["done_tail"])
    entry = int(ring["done"]) + 8 * (tail & int(ring["queue_mask"]))
    store_u64(entry, length << _LENGTH_SHIFT | slot)
    ring["done_tail"] = tail + 1


@jit
def done_slots(ring: Record) -> int:
    """How many buffers were filled and wait to be looked at."""
    return int(ring["done_tail"]) - int(ring["done_head"])


@jit
def peek_done(ring: Record, ahead: int) -> tuple[int, int]:
    """A slot that was filled, `ahead` of them before it, and how many bytes it has."""
    position = int(ring["done_head"]) + ahead
    entry = load_u64(int(ring["done"]) + 8 * (position & int(ring["queue_mask"])))
    return entry & IDX_MASK, entry >> _LENGTH_SHIFT


@jit
def pop_order(ring: Record) -> int:
    """The slot that the device has had longest; IN_ORDER only, there must be one."""
    head = int(ring["order_head"])
    ring["order_head"] = head + 1
    return load_u16(int(ring["order"]) + 2 * (head & int(ring["queue_mask"])))


@jit
def _push_order(ring: Record, slot: int) -> None:
    tail = int(ring["order_tail"])
    store_u16(int(ring["order"]) + 2 * (tail & int(ring["queue_mask"])), slot)
    ring["order_tail"] = tail + 1


@jit
def turn_order(ring: Record, count: int) -> None:
    """Note that the oldest `count` slots came back and were offered again."""
    if int(ring["in_order"]) != 0:
        for _ in range(count):
            _push_order(ring, pop_order(ring))


# --- how a buffer is cut into descriptors -----------------------------------------------


@jit
def entries_of(ring: Record, length: int) -> int:
    """Descriptors over which the first `length` bytes of a buffer are spread."""
    apart = int(ring["header_apart"])
    rest = length - (int(ring["header_len"]) if apart != 0 else 0)
    return max(1, min(int(ring["pieces"]), rest)) + apart


@jit
def end_of(ring: Record, length: int, entries: int, i: int) -> int:
    """Where piece `i` of so many ends in the buffer; the next begins there."""
    if i + 1 == entries:
        return length
    apart = int(ring["header_apart"])
    header = int(ring["header_len"]) if apart != 0 else 0
    return header + (length - header) * (i + 1 - apart) // (entries - apart)


@jit
def table_of(ring: Record, slot: int) -> int:
    """Offset of a slot's indirect table from that of slot 0, in descriptors."""
    return slot * (int(ring["pieces"]) + int(ring["header_apart"]))


@jit
def passes(event: int, new: int, old: int) -> bool:
    """Whether an index that went from `old` to `new` stepped over `event`.

    virtio 1.2 §2.7.7.2; all three are free-running 16-bit numbers.
    """
    return (new - event - 1) & IDX_MASK < (new - old) & IDX_MASK
