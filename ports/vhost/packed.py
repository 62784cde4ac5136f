"""Packed virtqueues, device side: the same contract as `split`.

One ring of descriptors in guest memory; driver and device tell each other by two bits in
each (AVAIL, USED) what a lap counter that flips at every wrap makes of it. A position is
an index with the lap in bit 15, as vhost-user's ring base has it.

Chains are consecutive descriptors. The one at a chain's first slot becomes the used one:
its length, id and flags are a single 64-bit word, so it is given back in one store. The
driver looks at slots in order; a batch becomes visible as a whole when its first slot is
written last.

The used words of a batch are kept in the shared REDO rows of the ring until the next
batch: if we die halfway through giving a batch back, whoever takes over writes them all
again (`resync`), since chains whose slots are already overwritten cannot be read again.
`next_avail` runs ahead of `next_used` exactly while a batch is in our hands.

virtio 1.2 §2.8.
"""

from typing import Final

from ports import offload
from ports.base import NO_FD, REDO_ROWS, RING_RUNNING
from ports.burst import (
    BAD_CHAIN,
    BURST_SIZE,
    MAX_FRAME,
    MAX_SEGMENTS,
    MAX_TARGETS,
    MAX_WALK,
    MIN_FRAME,
    TOO_LONG,
)
from ports.native import (
    Record,
    eventfd_signal,
    fence,
    jit,
    load_acquire_u16,
    load_acquire_u64,
    load_any_u64,
    load_u16,
    load_u64,
    prefetch_read,
    store_release_u64,
    store_u16,
    store_u64,
)
from ports.vhost import dirty
from ports.vhost.chain import aim, break_ring, describe, fill, scatter
from ports.vhost.memory import append_pieces, find_window, region_rows, translate
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
    EVENT_OFF_WRAP,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_MRG_RXBUF,
)
from ports.views import frame_at, redo_at, segment_at

# A descriptor is read as two words: the address, then len | id << 32 | flags << 48.
_WORD: Final = 8
_LEN_MASK: Final = 0xFFFFFFFF
_ID_MASK: Final = 0xFFFF << 32
_FLAGS_SHIFT: Final = 48
_SHAPE: Final = DESC_F_NEXT | DESC_F_WRITE | DESC_F_INDIRECT
# Both bits, as a negative number: flags are the upper end of a signed word.
_OWNER: Final = (DESC_F_AVAIL | DESC_F_USED) - (1 << 16)
_LAP: Final = 1 << 15  # of a position
_INDEX: Final = _LAP - 1

# Verdicts of `_put_pieces` beside a number of chains.
_PUT_FULL: Final = 0
_PUT_TOO_LONG: Final = -1
_PUT_BAD: Final = -2


@jit
def start(ring: Record) -> None:
    """Take up a ring.

    Where: at `next_avail`, where an earlier session left it; at the front-end's base,
    in `signalled_used`, if the driver has begun anew since. After a front-end lost us
    without a stop it repeats a base from before, and its ring would rest for ever.
    """
    base = int(ring["signalled_used"])
    if int(ring["next_avail"]) != base and _is_fresh(ring):
        ring["next_avail"] = base
    ring["next_used"] = int(ring["next_avail"])
    ring["signalled_used"] = -1
    ring["redo"] = 0
    ring["state"] = RING_RUNNING


@jit
def resync(ring: Record, redo: int) -> None:
    """Bring a ring that a dead worker left to where its driver will look next.

    While the slot at `next_used` is still the driver's, nothing of the batch was seen:
    it is written again. Otherwise all of it was, or there was none.
    """
    ring["signalled_used"] = -1
    rows = int(ring["redo"])
    ring["redo"] = 0
    if int(ring["next_avail"]) == int(ring["next_used"]):
        return
    word = load_acquire_u64(_slot(ring, int(ring["next_used"])) + _WORD)
    if not _is_offered(word, int(ring["next_used"])):
        ring["next_used"] = int(ring["next_avail"])
    elif rows > 0:
        _publish(ring, redo, rows)
    else:
        ring["next_avail"] = int(ring["next_used"])


@jit
def _is_fresh(ring: Record) -> bool:
    """Whether no slot was ever used: a driver begins with zeroes in its first lap."""
    for index in range(int(ring["size"])):
        if load_u64(_slot(ring, index) + _WORD) < 0:  # the sign is the USED bit
            return False
    return True


@jit
def _is_offered(word: int, position: int) -> bool:
    """Whether the driver offers the descriptor in this lap. virtio 1.2 §2.8.1."""
    lap = (position >> 15) & 1
    return ((word >> 55) & 1) == lap and ((word >> 63) & 1) != lap


@jit
def _slot(ring: Record, position: int) -> int:
    return int(ring["desc"]) + DESC_SIZE * (position & _INDEX)


@jit
def _advance(position: int, count: int, size: int) -> int:
    """A position `count` slots on; the lap flips at the ring's end."""
    index = (position & _INDEX) + count
    if index >= size:
        return (index - size) | ((position & _LAP) ^ _LAP)
    return index | (position & _LAP)


@jit
def _used_word(position: int, word: int, length: int) -> int:
    """What to write at a chain's first slot: `word` has the chain's id.

    virtio 1.2 §2.8.2: both bits as the lap; WRITE if anything was written.
    """
    flags = _OWNER if position & _LAP else 0
    if length > 0:
        flags |= DESC_F_WRITE
    return length | (word & _ID_MASK) | (flags << _FLAGS_SHIFT)


@jit
def _note(ring: Record, redo: int, row: int, position: int, word: int) -> None:
    """Remember what will be written at a chain's first slot."""
    line = redo_at(redo, row)
    line["addr"] = _slot(ring, position) + _WORD
    line["word"] = word


@jit
def _publish(ring: Record, redo: int, n: int) -> None:
    """Give a batch of `n` chains back: its first slot last."""
    for row in range(n - 1, 0, -1):
        line = redo_at(redo, row)
        store_u64(int(line["addr"]), int(line["word"]))
    first = redo_at(redo, 0)
    # Pairs with the driver's acquire of the flags: all of the batch is complete.
    store_release_u64(int(first["addr"]), int(first["word"]))
    ring["next_used"] = int(ring["next_avail"])
    ring["redo"] = 0


@jit
def take(ring: Record, port: Record, ctx: Record, redo: int, tally: Record) -> int:
    """Take up to a burst of offered chains and describe them; return how many."""
    position = int(ring["next_avail"])
    size = int(ring["size"])
    header_len = int(ring["header_len"])
    shortest = header_len + MIN_FRAME
    longest = header_len + MAX_FRAME
    burst = int(ctx["burst"])
    regions = int(ctx["regions"])
    first, count = region_rows(port)
    window_gpa = 0
    window_size = 0
    window_addr = 0
    n_segments = 0
    n = 0
    while n < BURST_SIZE:
        entry = _slot(ring, position)
        # Pairs with the driver's release of the flags: the chain is complete.
        word = load_acquire_u64(entry + _WORD)
        if not _is_offered(word, position):
            break
        gpa = load_u64(entry)
        length = word & _LEN_MASK
        flags = (word >> _FLAGS_SHIFT) & _SHAPE
        frame = frame_at(burst, n)
        frame["offload"] = 0
        if flags == 0 and shortest <= length <= longest:
            offset = gpa - window_gpa
            if offset < 0 or offset > window_size - length:
                window_gpa, window_size, window_addr = find_window(
                    regions, first, count, gpa
                )
                offset = gpa - window_gpa
            if 0 <= offset <= window_size - length:
                addr = window_addr + offset + header_len
                prefetch_read(addr)
                frame["addr"] = addr
                frame["eth"] = addr
                frame["length"] = length - header_len
                frame["segments"] = 1
                _note(ring, redo, n, position, _used_word(position, word, 0))
                position = _advance(position, 1, size)
                n += 1
                continue
        slots, last, n_segments = _take_chain(
            ring, ctx, first, count, position, gpa, word, n, n_segments
        )
        if slots == 0:
            break_ring(ring, tally)
            break
        _note(ring, redo, n, position, _used_word(position, last, 0))
        position = _advance(position, slots, size)
        n += 1
    if n > 0:
        ring["next_avail"] = position
    return n


@jit
def _take_chain(
    ring: Record,
    ctx: Record,
    first: int,
    count: int,
    position: int,
    gpa: int,
    word: int,
    i: int,
    n_segments: int,
) -> tuple[int, int, int]:
    """Describe a chain of any shape as frame `i`.

    Returns:
        Slots of the ring that it takes, 0 where it has no end; the second word of its
        last descriptor, which has the id; segment rows in use.
    """
    size = int(ring["size"])
    regions = int(ctx["regions"])
    segments = int(ctx["segments"])
    end = n_segments
    room = n_segments + MAX_SEGMENTS
    verdict = 0
    slots = 1
    while True:
        length = word & _LEN_MASK
        flags = (word >> _FLAGS_SHIFT) & _SHAPE
        if flags & DESC_F_INDIRECT:
            if flags & DESC_F_NEXT or (int(ring["features"]) & F_INDIRECT_DESC) == 0:
                verdict = BAD_CHAIN
            elif verdict == 0:
                end = _append_table(
                    regions, first, count, gpa, length, size, 0, segments, end, room
                )
        elif verdict == 0 and (flags & DESC_F_WRITE) == 0:
            end = append_pieces(regions, first, count, gpa, length, segments, end, room)
        if end < 0:
            verdict = BAD_CHAIN if end == -1 else TOO_LONG
            end = n_segments
        if (flags & DESC_F_NEXT) == 0:
            break
        if slots == min(size, MAX_WALK):
            return 0, word, n_segments
        # To its end even where it is bad: the next chain begins behind it.
        entry = _slot(ring, _advance(position, slots, size))
        gpa = load_u64(entry)
        word = load_u64(entry + _WORD)
        slots += 1
    frame = frame_at(int(ctx["burst"]), i)
    if verdict == 0:
        verdict = describe(ring, ctx, frame, i, n_segments, end)
    if verdict != 0:
        frame["length"] = verdict
        frame["segments"] = 0
        end = n_segments
    return slots, word, end


@jit
def _append_table(
    regions: int,
    first: int,
    count: int,
    table_gpa: int,
    length: int,
    size: int,
    wanted: int,
    segments: int,
    end: int,
    room: int,
) -> int:
    """Append the pieces of an indirect table; rows in use, or -1 or -2.

    Entries are consecutive; of their flags only WRITE counts. `wanted` is WRITE for a
    receive buffer, in which a readable entry is an error; in a frame to send, writable
    entries are passed over. virtio 1.2 §2.8.7.
    """
    entries = length // DESC_SIZE
    if length % DESC_SIZE != 0 or entries < 1 or entries > min(size, MAX_WALK):
        return -1
    for k in range(entries):
        entry = translate(regions, first, count, table_gpa + DESC_SIZE * k, DESC_SIZE)
        if entry == 0:
            return -1
        gpa = load_any_u64(entry)
        word = load_any_u64(entry + _WORD)
        flags = (word >> _FLAGS_SHIFT) & _SHAPE
        if flags & DESC_F_INDIRECT:
            return -1
        if flags & DESC_F_WRITE != wanted:
            if wanted:
                return -1
            continue
        piece = word & _LEN_MASK
        end = append_pieces(regions, first, count, gpa, piece, segments, end, room)
        if end < 0:
            return end
    return end


@jit
def release(ring: Record, port: Record, ctx: Record, redo: int, n: int) -> None:
    """Give back the `n` chains of the last take."""
    _publish_at(ring, port, ctx, redo, n, int(ring["next_avail"]))


@jit
def put(
    ring: Record, port: Record, ctx: Record, redo: int, n: int, tally: Record
) -> int:
    """Copy the `n` picked frames into the ring's buffers; return how many arrived.

    Counts each frame under exactly one name in `tally`. The ring must be running, and
    ours: polled by us alone, or locked.
    """
    position = int(ring["next_avail"])
    burst = int(ctx["burst"])
    picked = int(ctx["picked"])
    first, count = region_rows(port)
    log, log_len = dirty.find_log(int(ctx["regions"]), first)
    arrived = 0
    sent_bytes = 0
    k = 0
    while k < n:
        run = _aim(ring, port, ctx, redo, k, n - k, position)
        if run > 0:
            sent_bytes += fill(ctx, int(ring["header_len"]), k, run)
            if log_len > 0:
                dirty.mark_aims(log, log_len, int(ctx["aims"]), run)
            position = _advance(position, run, int(ring["size"]))
            _publish_at(ring, port, ctx, redo, run, position)
            arrived += run
            k += run
            continue
        word = load_acquire_u64(_slot(ring, position) + _WORD)
        if not _is_offered(word, position):
            tally["tx_drop_ring_full"] += n - k
            break
        frame = frame_at(burst, load_u64(picked + 8 * k))
        if offload.is_too_long(frame, int(port["max_frame"])):
            tally["tx_drop_too_long"] += 1
            k += 1
            continue
        # It may take many rows, and gives up where they do not suffice.
        rows, behind, got = _put_pieces(ring, ctx, redo, first, count, frame, position)
        if rows > 0:
            position = behind
            _publish_at(ring, port, ctx, redo, rows, position)
        if got > 0:
            arrived += 1
            sent_bytes += int(frame["length"])
        elif got == _PUT_FULL:
            tally["tx_drop_ring_full"] += 1
        elif got == _PUT_TOO_LONG:
            tally["tx_drop_too_long"] += 1
        elif rows > 0:
            tally["tx_drop_bad_chain"] += 1
        else:
            break_ring(ring, tally)
            tally["tx_drop_not_ready"] += n - k
            break
        k += 1
    tally["tx_frames"] += arrived
    tally["tx_bytes"] += sent_bytes
    return arrived


@jit
def _aim(
    ring: Record,
    port: Record,
    ctx: Record,
    redo: int,
    begin: int,
    n: int,
    position: int,
) -> int:
    """Find the buffers of up to `n` picked frames, from number `begin` on.

    The first buffer is the one at `position`. Stops at the first frame that is not one
    piece which fits the next buffer, at a buffer that is not one of the guest's memory,
    and where none is offered. REDO rows are written here.

    Returns:
        How many frames have a row in `aims`; their cache lines are on the way.
    """
    size = int(ring["size"])
    header_len = int(ring["header_len"])
    max_frame = int(port["max_frame"])
    burst = int(ctx["burst"])
    regions = int(ctx["regions"])
    picks = int(ctx["picked"]) + 8 * begin
    first, count = region_rows(port)
    window_gpa = 0
    window_size = 0
    window_addr = 0
    for k in range(n):
        frame = frame_at(burst, load_u64(picks + 8 * k))
        if int(frame["segments"]) != 1 or offload.is_too_long(frame, max_frame):
            return k
        entry = _slot(ring, position)
        word = load_acquire_u64(entry + _WORD)
        flags = (word >> _FLAGS_SHIFT) & _SHAPE
        need = int(frame["length"]) + header_len
        if flags != DESC_F_WRITE or need > word & _LEN_MASK:
            return k
        if not _is_offered(word, position):
            return k
        gpa = load_u64(entry)
        offset = gpa - window_gpa
        if offset < 0 or offset > window_size - need:
            window_gpa, window_size, window_addr = find_window(
                regions, first, count, gpa
            )
            offset = gpa - window_gpa
            if offset < 0 or offset > window_size - need:
                return k
        aim(int(ctx["aims"]), k, window_addr + offset, gpa, need)
        _note(ring, redo, k, position, _used_word(position, word, need))
        position = _advance(position, 1, size)
    return n


@jit
def _publish_at(
    ring: Record, port: Record, ctx: Record, redo: int, n: int, position: int
) -> None:
    """Give a batch back after which we stand at `position`."""
    begin = int(ring["next_used"]) & _INDEX
    ring["next_avail"] = position
    ring["redo"] = n
    _publish(ring, redo, n)
    dirty.mark_slots(ring, port, ctx, begin, position & _INDEX)


@jit
def _put_pieces(
    ring: Record,
    ctx: Record,
    redo: int,
    first: int,
    count: int,
    frame: Record,
    position: int,
) -> tuple[int, int, int]:
    """Deliver one frame into chains of any shape.

    Returns:
        REDO rows written, 0 where nothing is to be given back; the position behind
        them; 1 or a verdict. A bad chain is one row, given back empty; one without an
        end is bad and no row.
    """
    size = int(ring["size"])
    mergeable = (int(ring["features"]) & F_MRG_RXBUF) != 0
    header_len = int(ring["header_len"])
    targets = int(ctx["targets"])
    missing = int(frame["length"]) + header_len
    begin = position
    behind = position
    first_word = 0
    end = 0
    rows = 0
    while missing > 0:
        entry = _slot(ring, position)
        word = load_acquire_u64(entry + _WORD)
        if not _is_offered(word, position):
            return 0, begin, _PUT_FULL
        if rows == REDO_ROWS or (rows > 0 and not mergeable):
            return 0, begin, _PUT_TOO_LONG
        before = end
        slots, last, end = _collect_targets(ring, ctx, first, count, position, end)
        if slots == 0:
            return 0, begin, _PUT_BAD
        space = 0
        for k in range(before, end):
            space += int(segment_at(targets, k)["len"])
        if rows == 0:
            first_word = last
            behind = _advance(position, slots, size)
        if end < 0 or space == 0 or (rows == 0 and space < header_len):
            # The first is handed back empty: the guest gets its buffer, we get past
            # it. Where a later chain is the bad one, its turn comes.
            _note(ring, redo, 0, begin, _used_word(begin, first_word, 0))
            return 1, behind, _PUT_BAD
        filled = min(space, missing)
        _note(ring, redo, rows, position, _used_word(position, last, filled))
        missing -= filled
        rows += 1
        position = _advance(position, slots, size)
    header = int(ctx["heads"])
    offload.write_header(header, header_len, frame, rows)
    scatter(ctx, frame, header, header_len)
    if dirty.find_log(int(ctx["regions"]), first)[1] > 0:
        need = int(frame["length"]) + header_len
        dirty.mark_pieces(int(ctx["regions"]), first, count, targets, need)
    return rows, position, 1


@jit
def _collect_targets(
    ring: Record, ctx: Record, first: int, count: int, position: int, end: int
) -> tuple[int, int, int]:
    """Append the writable pieces of the chain at `position` to `targets`.

    Returns:
        Slots that the chain takes, 0 where it has no end; the second word of its last
        descriptor; rows in use, or -1 where the chain breaks the rules.
    """
    size = int(ring["size"])
    regions = int(ctx["regions"])
    targets = int(ctx["targets"])
    slots = 0
    while True:
        if slots == min(size, MAX_WALK):
            return 0, 0, -1
        entry = _slot(ring, _advance(position, slots, size))
        gpa = load_u64(entry)
        word = load_u64(entry + _WORD)
        slots += 1
        length = word & _LEN_MASK
        flags = (word >> _FLAGS_SHIFT) & _SHAPE
        if end < 0:
            pass
        elif flags & DESC_F_INDIRECT:
            if flags & DESC_F_NEXT or (int(ring["features"]) & F_INDIRECT_DESC) == 0:
                end = -1
            else:
                end = _append_table(
                    regions,
                    first,
                    count,
                    gpa,
                    length,
                    size,
                    DESC_F_WRITE,
                    targets,
                    end,
                    MAX_TARGETS,
                )
        elif (flags & DESC_F_WRITE) == 0:
            end = -1
        else:
            end = append_pieces(
                regions, first, count, gpa, length, targets, end, MAX_TARGETS
            )
        if (flags & DESC_F_NEXT) == 0:
            return slots, word, max(end, -1)


@jit
def call(ring: Record, tally: Record) -> None:
    """Interrupt the driver if it asked for that. virtio 1.2 §2.8.10."""
    if int(ring["call_fd"]) == NO_FD:
        ring["signalled_used"] = -1
        return
    # Pairs with the driver's fence between enabling interrupts and looking at the ring.
    fence()
    new = int(ring["next_used"])
    old = int(ring["signalled_used"])
    ring["signalled_used"] = new
    area = int(ring["avail"])
    flags = load_acquire_u16(area + EVENT_FLAGS)
    wanted = flags != EVENT_DISABLE
    if flags == EVENT_DESC and old >= 0 and int(ring["features"]) & F_EVENT_IDX:
        event = load_u16(area + EVENT_OFF_WRAP)
        wanted = _passes(event, new, old, int(ring["size"]))
    if wanted:
        if eventfd_signal(int(ring["call_fd"])):
            break_ring(ring, tally)
        tally["calls"] += 1


@jit
def _passes(event: int, new: int, old: int, size: int) -> bool:
    """Whether a position that went from `old` to `new` stepped over `event`."""
    at = new & _INDEX
    wished = event & _INDEX
    before = old & _INDEX
    if (event ^ new) & _LAP:
        wished -= size
    if (old ^ new) & _LAP:
        before -= size
    return before <= wished < at


@jit
def ask_for_kicks(ring: Record) -> bool:
    """Ask the driver to kick at its next chain; True if one is here already."""
    area = int(ring["used"])
    position = int(ring["next_avail"])
    if int(ring["features"]) & F_EVENT_IDX:
        store_u16(area + EVENT_OFF_WRAP, position)
        store_u16(area + EVENT_FLAGS, EVENT_DESC)
    else:
        store_u16(area + EVENT_FLAGS, EVENT_ENABLE)
    # Pairs with the driver's fence between offering and its look at our wish.
    fence()
    return _is_offered(load_acquire_u64(_slot(ring, position) + _WORD), position)


@jit
def stop_kicks(ring: Record) -> None:
    """Ask the driver not to kick."""
    store_u16(int(ring["used"]) + EVENT_FLAGS, EVENT_DISABLE)
