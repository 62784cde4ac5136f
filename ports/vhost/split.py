"""Split virtqueues, device side: take frames, put frames, give chains back.

A ring's three parts lie in guest memory. The driver writes the descriptor table and the
available ring, we write the used ring. `next_avail` and `next_used` in our RING record
are the truth while a ring runs; the used index in guest memory is read only when it
starts or changes hands, where it is the truth that survives us.

    take     acquire avail.idx, describe each offered chain as a frame of the burst
    release  publish used.idx past the chains of the last take
    put      fill offered buffers with frames, then publish used.idx once
    call     interrupt the driver if it wants to know

Chains come back in the order in which they were offered. Every word of guest memory is
read once; numbers that were checked are the numbers that are used. A chain that breaks
the rules becomes a frame without bytes and is still given back, or the guest would leak
it. An index that breaks the rules breaks the ring: it rests until it is set up anew.

The common shapes (one buffer a frame) are handled in the loops of `take`, and of `_aim`
and `fill` for `put`; `_take_chain` and `_put_pieces` know everything else.

virtio 1.2 §2.7.
"""

from ports import offload
from ports.base import (
    NO_FD,
    RING_RUNNING,
)
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
    load_any_u64,
    load_u16,
    load_u64,
    prefetch_read,
    store_any_u64,
    store_release_u16,
    store_u16,
)
from ports.vhost import dirty
from ports.vhost.chain import aim, break_ring, describe, fill, scatter
from ports.vhost.memory import append_pieces, find_window, region_rows, translate
from ports.vhost.virtio import (
    AVAIL_F_NO_INTERRUPT,
    AVAIL_FLAGS,
    AVAIL_IDX,
    AVAIL_RING,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_MRG_RXBUF,
    USED_ELEM_SIZE,
    USED_F_NO_NOTIFY,
    USED_FLAGS,
    USED_IDX,
    USED_RING,
)
from ports.views import frame_at, segment_at

# A descriptor is read as two words: the address, then len | flags << 32 | next << 48.
_LEN_MASK = 0xFFFFFFFF
_FLAGS_SHIFT = 32
_NEXT_SHIFT = 48

# Verdicts of `_put_pieces` beside a number of chains.
_PUT_FULL = 0
_PUT_TOO_LONG = -1
_PUT_BAD = -2
_PUT_BROKEN = -3


@jit
def start(ring: Record) -> None:
    """Take up a ring where its used index says.

    Whatever SET_VRING_BASE said: front-ends are known to send 0, or the available
    index, for a ring that was in use; we complete in order, so the used index is right.
    """
    resync(ring)
    ring["state"] = RING_RUNNING


@jit
def resync(ring: Record) -> None:
    """Set our positions from the ring itself; what a dead worker left is forgotten."""
    _move_to(ring, load_u16(int(ring["used"]) + USED_IDX))
    ring["signalled_used"] = -1


@jit
def _move_to(ring: Record, index: int) -> int:
    """Go on at a free-running index, in both rings: what we take we give back in order."""
    position = index & 0xFFFF
    ring["next_avail"] = position
    ring["next_used"] = position
    return position


@jit
def take(ring: Record, port: Record, ctx: Record, calls: Record) -> int:
    """Take up to a burst of offered chains and describe them; return how many.

    Used elements are written here, while the heads are at hand; `release` makes them
    visible after the copy.
    """
    avail = int(ring["avail"])
    next_avail = int(ring["next_avail"])
    size = int(ring["size"])
    # Pairs with the driver's write of avail.idx: entries up to it are complete.
    pending = (load_acquire_u16(avail + AVAIL_IDX) - next_avail) & 0xFFFF
    if pending == 0:
        return 0
    if pending > size:
        break_ring(ring, calls)
        return 0
    n = min(pending, BURST_SIZE)
    mask = size - 1
    desc = int(ring["desc"])
    used = int(ring["used"]) + USED_RING
    header_len = int(ring["header_len"])
    shortest = header_len + MIN_FRAME
    burst = int(ctx["burst"])
    regions = int(ctx["regions"])
    first, count = region_rows(port)
    window_gpa = 0
    window_size = 0
    window_addr = 0
    n_segments = 0
    for i in range(n):
        slot = (next_avail + i) & mask
        head = load_u16(avail + AVAIL_RING + 2 * slot)
        if head >= size:
            break_ring(ring, calls)
            n = i
            break
        entry = desc + DESC_SIZE * head
        gpa = load_u64(entry)
        word = load_u64(entry + 8)
        length = word & _LEN_MASK
        flags = (word >> _FLAGS_SHIFT) & 0xFFFF
        store_any_u64(used + USED_ELEM_SIZE * slot, head)
        frame = frame_at(burst, i)
        frame["offload"] = 0
        addr = 0
        if flags == 0 and 0 <= length - shortest <= MAX_FRAME - MIN_FRAME:
            offset = gpa - window_gpa
            if offset < 0 or offset > window_size - length:
                window_gpa, window_size, window_addr = find_window(
                    regions, first, count, gpa
                )
                offset = gpa - window_gpa
            if 0 <= offset <= window_size - length:
                addr = window_addr + offset + header_len
        if addr == 0:
            n_segments = _take_chain(ring, ctx, first, count, gpa, word, i, n_segments)
            continue
        prefetch_read(addr)
        frame["addr"] = addr
        frame["eth"] = addr
        frame["length"] = length - header_len
        frame["segments"] = 1
    _move_to(ring, next_avail + n)
    return n


@jit
def _take_chain(
    ring: Record,
    ctx: Record,
    first: int,
    count: int,
    gpa: int,
    word: int,
    i: int,
    n_segments: int,
) -> int:
    """Describe a chain of any shape as frame `i`; return segment rows in use.

    Walks at most `size` and at most MAX_WALK descriptors, direct and indirect together.
    virtio 1.2 §2.7.5.3 indirect descriptors, §2.7.4.2 message framing.
    """
    size = int(ring["size"])
    regions = int(ctx["regions"])
    segments = int(ctx["segments"])
    end = n_segments
    room = n_segments + MAX_SEGMENTS
    table = int(ring["desc"])  # 0: entries are looked up at `table_gpa`
    table_gpa = 0
    table_len = size
    verdict = 0
    budget = min(size, MAX_WALK)
    while True:
        length = word & _LEN_MASK
        flags = (word >> _FLAGS_SHIFT) & 0xFFFF
        if flags & DESC_F_INDIRECT:
            entries = length // DESC_SIZE
            bad = (
                (int(ring["features"]) & F_INDIRECT_DESC) == 0
                or table == 0
                or (flags & DESC_F_NEXT) != 0
                or length % DESC_SIZE != 0
                or entries < 1
                or entries > size
            )
            if bad:
                verdict = BAD_CHAIN
                break
            table = 0
            table_gpa = gpa
            table_len = entries
            following = 0
        else:
            if (flags & DESC_F_WRITE) == 0:
                end = append_pieces(
                    regions, first, count, gpa, length, segments, end, room
                )
                if end < 0:
                    verdict = BAD_CHAIN if end == -1 else TOO_LONG
                    break
            if (flags & DESC_F_NEXT) == 0:
                break
            following = (word >> _NEXT_SHIFT) & 0xFFFF
        budget -= 1
        if budget < 0 or following >= table_len:
            verdict = BAD_CHAIN
            break
        entry = table + DESC_SIZE * following
        if table == 0:
            entry_gpa = table_gpa + DESC_SIZE * following
            entry = translate(regions, first, count, entry_gpa, DESC_SIZE)
            if entry == 0:
                verdict = BAD_CHAIN
                break
        gpa = load_any_u64(entry)
        word = load_any_u64(entry + 8)
    frame = frame_at(int(ctx["burst"]), i)
    if verdict == 0:
        verdict = describe(ring, ctx, frame, i, n_segments, end)
    if verdict != 0:
        frame["length"] = verdict
        frame["segments"] = 0
        return n_segments
    return end


@jit
def release(ring: Record, port: Record, ctx: Record, n: int) -> None:
    """Give back the `n` chains of the last take."""
    next_used = int(ring["next_used"])
    store_release_u16(int(ring["used"]) + USED_IDX, next_used)
    dirty.mark_used(ring, port, ctx, next_used - n, n)


@jit
def put(ring: Record, port: Record, ctx: Record, n: int, tally: Record) -> int:
    """Copy the `n` picked frames into the ring's buffers; return how many arrived.

    Counts each frame under exactly one name in `tally`. The ring must be running, and
    ours: polled by us alone, or locked.
    """
    avail = int(ring["avail"])
    room = (load_acquire_u16(avail + AVAIL_IDX) - int(ring["next_avail"])) & 0xFFFF
    if room > int(ring["size"]):
        break_ring(ring, tally)
        tally["tx_drop_not_ready"] += n
        return 0
    burst = int(ctx["burst"])
    picked = int(ctx["picked"])
    first, count = region_rows(port)
    log, log_len = dirty.find_log(int(ctx["regions"]), first)
    taken = 0
    arrived = 0
    sent_bytes = 0
    k = 0
    while k < n:
        run = _aim(ring, port, ctx, k, min(n - k, room - taken), taken)
        sent_bytes += fill(ctx, int(ring["header_len"]), k, run)
        if log_len > 0:
            dirty.mark_aims(log, log_len, int(ctx["aims"]), run)
        taken += run
        arrived += run
        k += run
        if k == n:
            break
        if taken == room:
            tally["tx_drop_ring_full"] += n - k
            break
        frame = frame_at(burst, load_u64(picked + 8 * k))
        k += 1
        if offload.is_too_long(frame, int(port["max_frame"])):
            tally["tx_drop_too_long"] += 1
            continue
        got = _put_pieces(ring, ctx, first, count, frame, taken, room, tally)
        if got > 0:
            taken += got
            arrived += 1
            sent_bytes += int(frame["length"])
        elif got == _PUT_FULL:
            tally["tx_drop_ring_full"] += 1
        elif got == _PUT_TOO_LONG:
            tally["tx_drop_too_long"] += 1
        elif got == _PUT_BAD:
            taken += 1
            tally["tx_drop_bad_chain"] += 1
        else:
            tally["tx_drop_not_ready"] += n - k + 1
            break
    if taken > 0:
        next_used = _move_to(ring, int(ring["next_avail"]) + taken)
        # Everything written above is visible to the driver that sees this index.
        store_release_u16(int(ring["used"]) + USED_IDX, next_used)
        if log_len > 0:
            dirty.mark_used(ring, port, ctx, next_used - taken, taken)
    tally["tx_frames"] += arrived
    tally["tx_bytes"] += sent_bytes
    return arrived


@jit
def _aim(
    ring: Record, port: Record, ctx: Record, begin: int, n: int, taken: int
) -> int:
    """Find the buffers of up to `n` picked frames, from number `begin` on.

    Stops at the first frame that is not one piece which fits the next buffer, or a
    buffer that is not one of the guest's memory. Used elements are written here, while
    the heads are at hand. `taken` buffers before these have been filled.

    Returns:
        How many frames have a row in `aims`; their cache lines are on the way.
    """
    size = int(ring["size"])
    mask = size - 1
    avail = int(ring["avail"]) + AVAIL_RING
    used = int(ring["used"]) + USED_RING
    desc = int(ring["desc"])
    aims = int(ctx["aims"])
    position = int(ring["next_avail"]) + taken
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
        slot = (position + k) & mask
        head = load_u16(avail + 2 * slot)
        if head >= size or int(frame["segments"]) != 1:
            return k
        if offload.is_too_long(frame, max_frame):
            return k
        need = int(frame["length"]) + header_len
        entry = desc + DESC_SIZE * head
        gpa = load_u64(entry)
        word = load_u64(entry + 8)
        flags = (word >> _FLAGS_SHIFT) & 0xFFFF
        if flags != DESC_F_WRITE or need > word & _LEN_MASK:
            return k
        offset = gpa - window_gpa
        if offset < 0 or offset > window_size - need:
            window_gpa, window_size, window_addr = find_window(
                regions, first, count, gpa
            )
            offset = gpa - window_gpa
            if offset < 0 or offset > window_size - need:
                return k
        aim(aims, k, window_addr + offset, gpa, need)
        store_any_u64(used + USED_ELEM_SIZE * slot, head | (need << 32))
    return n


@jit
def _put_pieces(
    ring: Record,
    ctx: Record,
    first: int,
    count: int,
    frame: Record,
    taken: int,
    room: int,
    tally: Record,
) -> int:
    """Deliver one frame into chains of any shape; chains used, or a verdict <= 0.

    With MRG_RXBUF a frame may fill several chains, all but the last completely; used
    elements are written here and become visible with the burst. Nothing is written to
    a buffer before there is room for everything. virtio 1.2 §5.1.6.3.2, §5.1.6.4.
    """
    size = int(ring["size"])
    mask = size - 1
    avail = int(ring["avail"]) + AVAIL_RING
    position = int(ring["next_avail"]) + taken
    mergeable = (int(ring["features"]) & F_MRG_RXBUF) != 0
    header_len = int(ring["header_len"])
    need = int(frame["length"]) + header_len
    used = int(ring["used"]) + USED_RING
    targets = int(ctx["targets"])
    end = 0
    first_head = 0
    chains = 0
    missing = need
    while missing > 0:
        if chains > 0 and not mergeable:
            return _PUT_TOO_LONG
        if chains == room - taken:
            return _PUT_FULL
        slot = (position + chains) & mask
        head = load_u16(avail + 2 * slot)
        if head >= size:
            break_ring(ring, tally)
            return _PUT_BROKEN
        before = end
        end = _collect_targets(ring, ctx, first, count, head, end)
        if chains == 0:
            first_head = head
        space = 0
        for k in range(before, end):
            space += int(segment_at(targets, k)["len"])
        if end < 0 or space == 0 or (chains == 0 and space < header_len):
            return _hand_back(ring, taken, first_head)
        filled = min(space, missing)
        store_any_u64(used + USED_ELEM_SIZE * slot, head | (filled << 32))
        missing -= filled
        chains += 1
    header = int(ctx["heads"])
    offload.write_header(header, header_len, frame, chains)
    scatter(ctx, frame, header, header_len)
    if dirty.find_log(int(ctx["regions"]), first)[1] > 0:
        dirty.mark_pieces(int(ctx["regions"]), first, count, targets, need)
    return chains


@jit
def _hand_back(ring: Record, taken: int, head: int) -> int:
    """Give a chain back empty: the guest gets its buffer, we get past it.

    It is the first that its frame would have taken; where a later one is the bad one,
    that one's turn comes.
    """
    used = int(ring["used"]) + USED_RING
    slot = (int(ring["next_used"]) + taken) & (int(ring["size"]) - 1)
    store_any_u64(used + USED_ELEM_SIZE * slot, head)
    return _PUT_BAD


@jit
def _collect_targets(
    ring: Record,
    ctx: Record,
    first: int,
    count: int,
    head: int,
    end: int,
) -> int:
    """Append the writable pieces of a chain to `targets`; rows in use, or -1 if bad.

    A readable descriptor in a receive chain is an error: we never write into it.
    """
    size = int(ring["size"])
    regions = int(ctx["regions"])
    targets = int(ctx["targets"])
    table = int(ring["desc"])
    table_gpa = 0
    table_len = size
    following = head
    for _ in range(min(size, MAX_WALK) + 1):
        entry = table + DESC_SIZE * following
        if table == 0:
            entry_gpa = table_gpa + DESC_SIZE * following
            entry = translate(regions, first, count, entry_gpa, DESC_SIZE)
            if entry == 0:
                return -1
        gpa = load_any_u64(entry)
        word = load_any_u64(entry + 8)
        length = word & _LEN_MASK
        flags = (word >> _FLAGS_SHIFT) & 0xFFFF
        if flags & DESC_F_INDIRECT:
            table_len = length // DESC_SIZE
            bad = (
                (int(ring["features"]) & F_INDIRECT_DESC) == 0
                or table == 0
                or (flags & DESC_F_NEXT) != 0
                or length % DESC_SIZE != 0
                or table_len < 1
                or table_len > size
            )
            if bad:
                return -1
            table = 0
            table_gpa = gpa
            following = 0
            continue
        if (flags & DESC_F_WRITE) == 0:
            return -1
        end = append_pieces(
            regions, first, count, gpa, length, targets, end, MAX_TARGETS
        )
        if end < 0:
            return -1
        if (flags & DESC_F_NEXT) == 0:
            return end
        following = (word >> _NEXT_SHIFT) & 0xFFFF
        if following >= table_len:
            return -1
    return -1


@jit
def call(ring: Record, tally: Record) -> None:
    """Interrupt the driver if it asked for that. virtio 1.2 §2.7.10."""
    if int(ring["call_fd"]) == NO_FD:
        ring["signalled_used"] = -1
        return
    # Pairs with the driver's fence between enabling interrupts and looking at used.idx:
    # either it sees our index, or we see its wish.
    fence()
    avail = int(ring["avail"])
    new = int(ring["next_used"])
    old = int(ring["signalled_used"])
    if int(ring["features"]) & F_EVENT_IDX:
        event = load_u16(avail + AVAIL_RING + 2 * int(ring["size"]))
        wanted = old < 0 or ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)
    else:
        wanted = (load_u16(avail + AVAIL_FLAGS) & AVAIL_F_NO_INTERRUPT) == 0
    ring["signalled_used"] = new
    if wanted:
        if eventfd_signal(int(ring["call_fd"])):
            break_ring(ring, tally)
        tally["calls"] += 1


@jit
def ask_for_kicks(ring: Record) -> bool:
    """Ask the driver to kick at its next chain; True if one is here already."""
    used = int(ring["used"])
    next_avail = int(ring["next_avail"])
    if int(ring["features"]) & F_EVENT_IDX:
        event = used + USED_RING + USED_ELEM_SIZE * int(ring["size"])
        store_u16(event, next_avail)
    else:
        store_u16(used + USED_FLAGS, 0)
    # Pairs with the driver's fence between avail.idx and its look at our wish: either
    # we see its chain, or it sees that it has to kick.
    fence()
    return load_u16(int(ring["avail"]) + AVAIL_IDX) != next_avail


@jit
def stop_kicks(ring: Record) -> None:
    """Ask the driver not to kick. With EVENT_IDX a stale event index does that."""
    if (int(ring["features"]) & F_EVENT_IDX) == 0:
        store_u16(int(ring["used"]) + USED_FLAGS, USED_F_NO_NOTIFY)
