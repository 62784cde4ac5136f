"""The driver's half of a virtqueue of either format, for both directions.

    transmit: send_frames -> publish ~~> device ~~> reap
    receive:  post_buffers -> publish ~~> device ~~> receive_frames -> publish

`split_ring` and `packed_ring` know how chains are offered and found again; which of
them it is is looked up here, and nobody else needs to know. `slots` knows what is
where meanwhile.

virtio 1.2 §5.1.6 network device operation.
"""

from typing import Final

import numpy as np

from ports.native import (
    Record,
    copy_bytes,
    eventfd_signal,
    fence,
    jit,
    load_any_u16,
    store_any_u16,
    store_any_u64,
)
from ports.vhost.virtio import NET_HDR, NET_HDR_LEN
from vswitch.guest import packed_ring, split_ring
from vswitch.guest.slots import (
    DRIVER_RING,
    buffer_of,
    done_slots,
    free_slots,
    peek_done,
    ring_at,
    take_slot,
)

__all__ = ["DRIVER_RING", "buffer_of", "free_slots", "ring_at", "take_slot"]

_NUM_BUFFERS: Final = int(NET_HDR.fields["num_buffers"][1]) if NET_HDR.fields else 0


def area_lengths(ring: Record) -> tuple[int, int, int]:
    """Bytes of the three areas that the device is told of."""
    if int(ring["packed"]):
        return packed_ring.area_lengths(int(ring["size"]))
    return split_ring.area_lengths(int(ring["size"]))


# --- the two formats ----------------------------------------------------------------


@jit
def begin(ring: Record, start: int) -> None:
    """Put both sides where they are after `start` descriptors; areas are zeroed."""
    ring["unpublished"] = 0
    if int(ring["packed"]) != 0:
        packed_ring.begin(ring, start)
    else:
        split_ring.begin(ring, start)


@jit
def device_position(ring: Record) -> int:
    """How far the device has come, as SET_VRING_BASE has it."""
    if int(ring["packed"]) != 0:
        return packed_ring.device_position(ring)
    return split_ring.device_position(ring)


@jit
def describe(ring: Record, slot: int, length: int) -> None:
    """Prepare the chain over the first `length` bytes of a slot's buffer."""
    if int(ring["packed"]) != 0:
        packed_ring.describe(ring, slot, length)
    else:
        split_ring.describe(ring, slot, length)


@jit
def offer(ring: Record, slot: int, length: int) -> None:
    """Offer a slot that was described with that length, not yet visible."""
    if int(ring["packed"]) != 0:
        packed_ring.offer(ring, slot, length)
    else:
        split_ring.offer(ring, slot)


@jit
def publish(ring: Record) -> None:
    """Show the device everything offered so far; kick it if it asks."""
    added = int(ring["unpublished"])
    if added == 0:
        return
    if int(ring["packed"]) != 0:
        packed_ring.expose(ring)
    else:
        split_ring.expose(ring)
    ring["unpublished"] = 0
    # Pairs with the device's fence between asking for kicks and its last look.
    fence()
    if wants_kick(ring, added) and int(ring["kick_fd"]) >= 0:
        ring["kicks"] += 1
        eventfd_signal(int(ring["kick_fd"]))


@jit
def wants_kick(ring: Record, added: int) -> bool:
    """Whether the last `added`, counted as in `unpublished`, have to be announced."""
    if int(ring["packed"]) != 0:
        return packed_ring.wants_kick(ring, added)
    return split_ring.wants_kick(ring, added)


@jit
def collect(ring: Record) -> None:
    """Note which slots the device has used."""
    if int(ring["packed"]) != 0:
        packed_ring.collect(ring)
    else:
        split_ring.collect(ring)


@jit
def ask_for_calls(ring: Record) -> int:
    """Have the device call at what it uses next; not 0: there is something already."""
    if int(ring["packed"]) != 0:
        return done_slots(ring) + packed_ring.ask_for_calls(ring)
    return done_slots(ring) + split_ring.ask_for_calls(ring)


@jit
def refuse_calls(ring: Record) -> None:
    """Tell the device that we look ourselves; a call may still come now and then."""
    if int(ring["packed"]) != 0:
        packed_ring.refuse_calls(ring)
    else:
        split_ring.refuse_calls(ring)


# --- frames -------------------------------------------------------------------------


@jit
def send_frames(
    ring: Record, data: int, offsets: np.ndarray, lengths: np.ndarray, headers: int
) -> int:
    """Offer frames out of `data` until the ring is full; how many were taken.

    `headers` is the address of a virtio-net header of NET_HDR_LEN bytes a frame, or 0:
    they ask for nothing. Stops in front of a frame that no buffer can hold.
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
        if headers != 0:
            copy_bytes(buffer, headers + NET_HDR_LEN * n, header)
        else:
            clear_header(buffer)
        copy_bytes(buffer + header, data + int(offsets[n]), length)
        describe(ring, slot, header + length)
        offer(ring, slot, header + length)
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
    headers: int,
) -> int:
    """Copy arrived frames one behind the other to `out`; how many.

    Fills at most `lengths` and `room` bytes; what does not fit stays where it is. With
    `headers` not 0, the virtio-net header of each is copied there, NET_HDR_LEN bytes
    apart. The buffers are offered again at once.
    """
    collect(ring)
    n = 0
    at = 0
    header = int(ring["header_len"])
    while n < lengths.size and done_slots(ring) > 0:
        slot, length = peek_done(ring, 0)
        buffers = frame_buffers(ring, slot, length)
        if buffers == 0:
            _offer_again(ring, slot)
            continue
        if buffers > 1:
            length = _done_bytes(ring, buffers)
        length -= header
        if at + length > room:
            break
        if headers != 0:
            copy_bytes(headers + NET_HDR_LEN * n, buffer_of(ring, slot), header)
        if buffers > 1:
            _copy_merged(ring, buffers, out + at)
        else:
            copy_bytes(out + at, buffer_of(ring, slot) + header, length)
            _offer_again(ring, slot)
        offsets[n] = at
        lengths[n] = length
        at += length
        n += 1
        ring["frames"] += 1
        ring["bytes"] += length
    publish(ring)
    return n


@jit
def frame_buffers(ring: Record, slot: int, length: int) -> int:
    """How many buffers the frame that begins in a slot fills; 0: that is no frame."""
    header = int(ring["header_len"])
    if length < header or length > int(ring["buffer_len"]):
        ring["bad_len"] += 1
        return 0
    if header < NET_HDR_LEN:
        return 1
    buffers = load_any_u16(buffer_of(ring, slot) + _NUM_BUFFERS)
    most = done_slots(ring) if int(ring["mergeable"]) != 0 else 1
    if buffers < 1 or buffers > most:
        ring["bad_header"] += 1
        return 1
    return buffers


@jit
def _done_bytes(ring: Record, buffers: int) -> int:
    total = 0
    for i in range(buffers):
        _, length = peek_done(ring, i)
        total += length
    return total


@jit
def _copy_merged(ring: Record, buffers: int, out: int) -> None:
    """Copy a frame out of several buffers and offer them again."""
    skip = int(ring["header_len"])
    whole = int(ring["buffer_len"])
    for i in range(buffers):
        slot, length = peek_done(ring, 0)
        if length > whole or (i + 1 < buffers and length < whole):
            # virtio 1.2 §5.1.6.4: all buffers but the last are full.
            ring["bad_len"] += 1
        if length <= whole:
            copy_bytes(out, buffer_of(ring, slot) + skip, length - skip)
        out += length - skip
        skip = 0
        _offer_again(ring, slot)


@jit
def _offer_again(ring: Record, slot: int) -> None:
    """Offer the buffer that was filled first, and looked at."""
    ring["done_head"] += 1
    offer(ring, slot, int(ring["buffer_len"]))


@jit
def reap(ring: Record) -> int:
    """Take back what the device has transmitted; how many chains."""
    before = int(ring["free_tail"])
    collect(ring)
    return int(ring["free_tail"]) - before


@jit
def post_buffers(ring: Record, count: int) -> int:
    """Offer up to `count` empty buffers to be filled; how many there were."""
    n = 0
    length = int(ring["buffer_len"])
    while n < count and free_slots(ring) > 0:
        slot = take_slot(ring)
        describe(ring, slot, length)
        offer(ring, slot, length)
        n += 1
    publish(ring)
    return n


@jit
def clear_header(buffer: int) -> None:
    """Write a header that asks for nothing: no checksum, no segmentation."""
    store_any_u64(buffer, 0)
    store_any_u16(buffer + 8, 0)
    store_any_u16(buffer + _NUM_BUFFERS, 0)


# --- raw: buffers that are described once, see `stream` ---------------------------------


@jit
def raw_prepare(ring: Record, length: int) -> None:
    """Describe `length` bytes of every slot; nothing may be out."""
    for slot in range(int(ring["size"])):
        describe(ring, slot, length)
    if int(ring["packed"]) == 0:
        split_ring.raw_prepare(ring)


@jit
def raw_fits(ring: Record) -> bool:
    """Whether all buffers are offered, one descriptor each, at their own positions."""
    if int(ring["chain"]) != 1 or free_slots(ring) > 0:
        return False
    if int(ring["packed"]) != 0:
        return packed_ring.raw_fits(ring)
    return split_ring.raw_fits(ring)


@jit
def raw_next(ring: Record) -> int:
    """The slot at the position that is offered next."""
    if int(ring["packed"]) != 0:
        return int(ring["avail_idx"])
    return int(ring["avail_idx"]) & (int(ring["size"]) - 1)


@jit
def raw_oldest(ring: Record) -> int:
    """The slot at the position that comes back next."""
    if int(ring["packed"]) != 0:
        return int(ring["used_idx"])
    return int(ring["used_idx"]) & (int(ring["size"]) - 1)


@jit
def raw_room(ring: Record, most: int) -> int:
    """How many more slots can be offered, counted up to `most` if that is cheaper."""
    if int(ring["packed"]) != 0:
        return packed_ring.raw_room(ring, most)
    return split_ring.raw_room(ring)


@jit
def raw_arrived(ring: Record, most: int) -> int:
    """How many buffers were filled, counted up to `most` if that is cheaper."""
    if int(ring["packed"]) != 0:
        return packed_ring.raw_arrived(ring, most)
    return split_ring.raw_arrived(ring)


@jit
def raw_offer(ring: Record, count: int, length: int) -> None:
    """Offer the next `count` slots with `length` bytes each, not yet visible."""
    if int(ring["packed"]) != 0:
        packed_ring.raw_offer(ring, count, length)
    else:
        split_ring.raw_offer(ring, count)


@jit
def raw_return(ring: Record, count: int) -> None:
    """Offer the `count` buffers that were filled first again, not yet visible."""
    if int(ring["packed"]) != 0:
        packed_ring.raw_return(ring, count)
    else:
        split_ring.raw_return(ring, count)
