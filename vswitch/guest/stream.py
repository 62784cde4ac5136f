"""Numbered frames: made at one ring, counted at another. The jitted half of `traffic`.

Every frame carries a word with a mark, its flow and its number, so the receiver can tell
what was lost, came twice, or came in another order.

Two ways to drive a ring:
- built: an ordinary driver's work; each frame is written, each received frame copied out;
- raw: frames are written once, and so are descriptors in a split ring (in a packed one the
  device overwrites them); from then on sending is the word and the index, receiving is
  reading the word and giving the buffer back. This leaves the device as the slow one. It
  relies on a device that works in order, and on frames that fit one buffer; on any other
  the numbers come out wrong, which is counted.

    offset  0   6   12         14       16       20    28
            dst src ethertype  length   -        word  payload

A paced generator sends each frame when it is due, not when there is room: one that finds
the ring full is missed. In a timed stream every eighth frame begins its payload with the
time at which it was due, so that a frame which waited to be sent has waited.
"""

from typing import Final

import numpy as np

from ports.native import (
    Record,
    copy_bytes,
    jit,
    load_any_u16,
    load_any_u64,
    load_u8,
    pause,
    rdtsc,
    records_at,
    sched_yield,
    store_any_u16,
    store_any_u64,
    store_u8,
)
from vswitch.guest import histogram
from vswitch.guest.ring import (
    buffer_of,
    clear_header,
    describe,
    free_slots,
    offer,
    publish,
    raw_arrived,
    raw_next,
    raw_offer,
    raw_oldest,
    raw_return,
    raw_room,
    reap,
    receive_frames,
    ring_at,
    take_slot,
)

ADDRESS_OFFSET: Final = 4  # the destination's last two bytes
LENGTH_OFFSET: Final = 14
WORD_OFFSET: Final = 20
PAYLOAD_OFFSET: Final = 28
MIN_LENGTH: Final = PAYLOAD_OFFSET
MIN_TIMED: Final = PAYLOAD_OFFSET + 8
MAX_FLOWS: Final = 256
PACE_SHIFT: Final = 16

_MARK: Final = 0x5EED
_MARK_SHIFT: Final = 48
_FLOW_SHIFT: Final = 40
_NUMBER_MASK: Final = (1 << _FLOW_SHIFT) - 1
_GAPS: Final = 256
_IDLE_SPINS: Final = 16
_TIMED_MASK: Final = 7  # of the numbers that are timed, these bits are 0

GENERATOR: Final = np.dtype(
    [
        ("ring", "<i8"),  # address of its DRIVER_RING
        ("raw", "<i8"),
        ("fill", "<i8"),  # 1: write the whole payload
        ("burst", "<i8"),  # frames at a time
        ("flow", "<i8"),
        ("next", "<i8"),  # number of the next frame
        ("limit", "<i8"),  # stop in front of this number
        ("min_len", "<i8"),
        ("max_len", "<i8"),
        ("template", "<i8"),  # address of the first WORD_OFFSET bytes
        ("address_mask", "<i8"),  # of the number's bits that end the destination; or 0
        ("bytes", "<i8"),  # but of a mix
        ("full", "<i8"),  # times that the ring had no room
        ("timed", "<i8"),
        ("pace", "<i8"),  # from frame to frame, in 1 / 65536 cycles; 0: as they go
        ("begin", "<i8"),  # a cycle count: when the first frame was due; 0: not yet
        ("due", "<i8"),  # the next one, after that, in 1 / 65536 cycles
        ("missed", "<i8"),  # frames that were due while the ring had no room
        ("late", "<i8"),  # frames that were due while we were elsewhere
    ]
)
SINK: Final = np.dtype(
    [
        ("ring", "<i8"),
        ("raw", "<i8"),
        ("check", "<i8"),  # 1: compare the whole payload
        ("burst", "<i8"),
        ("flows", "<i8"),  # address of its FLOW records
        ("n_flows", "<i8"),
        ("scratch", "<i8"),  # where frames are copied to
        ("room", "<i8"),
        ("frames", "<i8"),
        ("bytes", "<i8"),  # built only
        ("foreign", "<i8"),  # frames that no generator of ours made
        ("times", "<i8"),  # address of the cells of a histogram, in cycles; or 0
    ]
)
FLOW: Final = np.dtype(
    [
        ("expected", "<i8"),
        ("received", "<i8"),
        ("lost", "<i8"),  # never came, up to now
        ("longest_gap", "<i8"),  # frames lost in a row
        ("reordered", "<i8"),
        ("duplicates", "<i8"),
        ("corrupt", "<i8"),
        ("n_gaps", "<i8"),  # free-running
        ("gaps", "<i8", (2 * _GAPS,)),  # the latest, as first and behind-last number
    ]
)
generator_at: Final = records_at(GENERATOR)
sink_at: Final = records_at(SINK)
flow_at: Final = records_at(FLOW)


@jit
def exchange(
    generators: int,
    n_generators: int,
    sinks: int,
    n_sinks: int,
    cycles: int,
    linger: int,
    enough: int,
    offsets: np.ndarray,
    lengths: np.ndarray,
) -> int:
    """Send and receive in turn for `cycles`; then only receive while frames come.

    Ends early when every generator has reached its limit. The second part ends when
    nothing came for `linger` cycles, or `enough` frames have come in all.

    Returns:
        Cycles that the first part took.
    """
    begin = rdtsc()
    now = begin
    idle = 0
    got = 0
    while now - begin < cycles:
        moved = 0
        left = 0
        for i in range(n_generators):
            generator = generator_at(generators, i)
            moved += generate(generator)
            left += int(generator["limit"]) - int(generator["next"])
        arrived = 0
        for i in range(n_sinks):
            arrived += collect(sink_at(sinks, i), offsets, lengths)
        got += arrived
        moved += arrived
        now = rdtsc()
        if n_generators > 0 and left == 0:
            break
        idle = 0 if moved > 0 else idle + 1
        _relax(idle)
    took = now - begin
    end = now
    last = now
    while got < enough and now - last < linger and now - end < 64 * linger:
        moved = 0
        for i in range(n_sinks):
            moved += collect(sink_at(sinks, i), offsets, lengths)
        got += moved
        now = rdtsc()
        if moved > 0:
            last = now
        idle = 0 if moved > 0 else idle + 1
        _relax(idle)
    return took


@jit
def hammer(
    generator: Record,
    sink: Record,
    min_gap: int,
    max_gap: int,
    timeout: int,
    offsets: np.ndarray,
    lengths: np.ndarray,
    latencies: np.ndarray,
) -> int:
    """Send single frames, each some pseudo-random gap after the one before arrived.

    A frame that takes longer than `timeout` ends it: either it was lost, or somebody
    sleeps who should not. All times in cycles.

    Returns:
        How many arrived; their times are in `latencies`.
    """
    flow = flow_at(int(sink["flows"]), int(generator["flow"]))
    state = 1
    for i in range(latencies.size):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        until = rdtsc() + min_gap + state % (max_gap - min_gap + 1)
        while rdtsc() < until:
            pause()
        before = int(flow["received"])
        begin = rdtsc()
        now = begin
        generator["limit"] = int(generator["next"]) + 1
        idle = 0
        while int(flow["received"]) == before:
            if int(generator["next"]) < int(generator["limit"]):
                generate(generator)
            collect(sink, offsets, lengths)
            now = rdtsc()
            if now - begin > timeout:
                return i
            idle += 1
            _relax(idle)
        latencies[i] = now - begin
    return int(latencies.size)


@jit
def _relax(idle: int) -> None:
    """Spin politely; let others run when it lasts."""
    if idle > 0:
        pause()
    if idle % _IDLE_SPINS == _IDLE_SPINS - 1:
        sched_yield()


# --- sending ------------------------------------------------------------------------


@jit
def generate(generator: Record) -> int:
    """Send up to a burst, as far as there is room; how many."""
    room = min(
        int(generator["burst"]), int(generator["limit"]) - int(generator["next"])
    )
    if room <= 0:
        return 0
    if int(generator["pace"]) != 0:
        return _generate_due(generator, room)
    return _generate(generator, room)


@jit
def _generate(generator: Record, room: int) -> int:
    ring = ring_at(int(generator["ring"]), 0)
    if int(generator["raw"]) != 0:
        sent = _generate_raw(generator, ring, room)
    else:
        sent = _generate_built(generator, ring, room)
    if sent == 0:
        generator["full"] += 1
    return sent


@jit
def _generate_due(generator: Record, room: int) -> int:
    """Send what is due by now, up to `room`; what has no place is missed.

    More than `room` can be due only if we were not here: that is no fault of the
    switch's, and the pace goes on from now.
    """
    now = rdtsc()
    pace = int(generator["pace"])
    if int(generator["begin"]) == 0:
        generator["begin"] = now
        generator["due"] = 0
    behind = ((now - int(generator["begin"])) << PACE_SHIFT) - int(generator["due"])
    if behind < 0:
        return 0
    count = behind // pace + 1
    if count > room:
        generator["late"] += count - room
        generator["due"] += (count - room) * pace
        count = room
    sent = _generate(generator, count)
    generator["missed"] += count - sent
    generator["due"] += count * pace
    return sent


@jit
def _generate_raw(generator: Record, ring: Record, room: int) -> int:
    """Number the frames that are there already and move the index."""
    count = min(room, raw_room(ring, room))
    if count <= 0:
        return 0
    stride = int(ring["stride"])
    header = int(ring["header_len"])
    words = int(ring["buffers"]) + header + WORD_OFFSET
    first = int(generator["next"])
    word = _word(int(generator["flow"]), first)
    slot = raw_next(ring)
    size = int(ring["size"])
    mask = int(generator["address_mask"])
    for i in range(count):
        at = words + slot * stride
        store_any_u64(at, word + i)
        if mask != 0:
            store_any_u16(at - WORD_OFFSET + ADDRESS_OFFSET, (first + i) & mask)
        slot += 1
        if slot == size:
            slot = 0
    if int(generator["timed"]) != 0:
        _stamp(generator, ring, count)
    raw_offer(ring, count, header + int(generator["min_len"]))
    publish(ring)
    generator["next"] = first + count
    generator["bytes"] += count * int(generator["min_len"])
    return count


@jit
def _stamp(generator: Record, ring: Record, count: int) -> None:
    """Write into every eighth of the next `count` frames when it is due."""
    stride, size = int(ring["stride"]), int(ring["size"])
    payloads = int(ring["buffers"]) + int(ring["header_len"]) + PAYLOAD_OFFSET
    slot = raw_next(ring)
    i = -int(generator["next"]) & _TIMED_MASK
    pace = int(generator["pace"])
    now = rdtsc()
    while i < count:
        at = slot + i
        if at >= size:
            at -= size
        due = now
        if pace != 0:
            passed = int(generator["due"]) + i * pace
            due = int(generator["begin"]) + (passed >> PACE_SHIFT)
        store_any_u64(payloads + at * stride, due)
        i += _TIMED_MASK + 1


@jit
def _generate_built(generator: Record, ring: Record, room: int) -> int:
    """Write each frame anew, as a driver does."""
    reap(ring)
    flow = int(generator["flow"])
    mask = int(generator["address_mask"])
    sent = 0
    while sent < room and free_slots(ring) > 0:
        number = int(generator["next"])
        length = _length_of(generator, number)
        slot = take_slot(ring)
        header = int(ring["header_len"])
        buffer = buffer_of(ring, slot)
        clear_header(buffer)
        frame = buffer + header
        copy_bytes(frame, int(generator["template"]), WORD_OFFSET)
        if mask != 0:
            store_any_u16(frame + ADDRESS_OFFSET, number & mask)
        store_any_u16(frame + LENGTH_OFFSET, length)
        store_any_u64(frame + WORD_OFFSET, _word(flow, number))
        if int(generator["fill"]) != 0:
            _fill(frame, length, number)
        describe(ring, slot, header + length)
        offer(ring, slot, header + length)
        generator["next"] = number + 1
        generator["bytes"] += length
        sent += 1
    publish(ring)
    return sent


@jit
def _word(flow: int, number: int) -> int:
    return _MARK << _MARK_SHIFT | flow << _FLOW_SHIFT | number


@jit
def _length_of(generator: Record, number: int) -> int:
    """Every length of the range comes, in no obvious order."""
    least = int(generator["min_len"])
    return least + number * 7919 % (int(generator["max_len"]) - least + 1)


@jit
def _payload(number: int, at: int) -> int:
    return (number + at) * 1000003 & 0x7FFFFFFFFFFFFFFF


@jit
def _fill(frame: int, length: int, number: int) -> None:
    at = PAYLOAD_OFFSET
    while at + 8 <= length:
        store_any_u64(frame + at, _payload(number, at))
        at += 8
    while at < length:
        store_u8(frame + at, _payload(number, at) & 0xFF)
        at += 1


@jit
def _is_filled(frame: int, length: int, number: int) -> bool:
    at = PAYLOAD_OFFSET
    while at + 8 <= length:
        if load_any_u64(frame + at) != _payload(number, at):
            return False
        at += 8
    while at < length:
        if load_u8(frame + at) != _payload(number, at) & 0xFF:
            return False
        at += 1
    return True


# --- receiving ----------------------------------------------------------------------


@jit
def collect(sink: Record, offsets: np.ndarray, lengths: np.ndarray) -> int:
    """Count and check up to a burst of what has arrived; how many frames."""
    ring = ring_at(int(sink["ring"]), 0)
    if int(sink["raw"]) != 0:
        return _collect_raw(sink, ring)
    return _collect_built(sink, ring, offsets, lengths)


@jit
def _collect_raw(sink: Record, ring: Record) -> int:
    """Read the words, give the buffers back where they are."""
    count = min(int(sink["burst"]), raw_arrived(ring, int(sink["burst"])))
    if count == 0:
        return 0
    if int(sink["times"]) != 0:
        _note_times(sink, ring, count)
    stride = int(ring["stride"])
    words = int(ring["buffers"]) + int(ring["header_len"]) + WORD_OFFSET
    slot = raw_oldest(ring)
    size = int(ring["size"])
    wanted = -1
    run = 0
    last = -1
    for _ in range(count):
        word = load_any_u64(words + slot * stride)
        slot += 1
        if slot == size:
            slot = 0
        if word == wanted:
            wanted += 1
            run += 1
        else:
            _came_in_order(sink, last, run)
            last = _arrived(sink, word)
            flow = flow_at(int(sink["flows"]), max(last, 0))
            wanted = _word(last, int(flow["expected"])) if last >= 0 else -1
            run = 0
    _came_in_order(sink, last, run)
    raw_return(ring, count)
    publish(ring)
    sink["frames"] += count
    return count


@jit
def _note_times(sink: Record, ring: Record, count: int) -> None:
    """Note how long after they were due those frames came that say when that was."""
    now = rdtsc()
    stride, size = int(ring["stride"]), int(ring["size"])
    words = int(ring["buffers"]) + int(ring["header_len"]) + WORD_OFFSET
    slot = raw_oldest(ring)
    for _ in range(count):
        at = words + slot * stride
        word = load_any_u64(at)
        if word >> _MARK_SHIFT == _MARK and word & _TIMED_MASK == 0:
            due = load_any_u64(at + PAYLOAD_OFFSET - WORD_OFFSET)
            histogram.note(int(sink["times"]), now - due)
        slot += 1
        if slot == size:
            slot = 0


@jit
def _came_in_order(sink: Record, flow: int, count: int) -> None:
    if flow >= 0:
        record = flow_at(int(sink["flows"]), flow)
        record["expected"] += count
        record["received"] += count


@jit
def _collect_built(
    sink: Record, ring: Record, offsets: np.ndarray, lengths: np.ndarray
) -> int:
    """Copy frames out and look at each."""
    burst = int(sink["burst"])
    scratch = int(sink["scratch"])
    room = int(sink["room"])
    count = receive_frames(ring, scratch, room, offsets[:burst], lengths[:burst], 0)
    for i in range(count):
        frame = scratch + int(offsets[i])
        length = int(lengths[i])
        sink["bytes"] += length
        if length < MIN_LENGTH:
            sink["foreign"] += 1
            continue
        word = load_any_u64(frame + WORD_OFFSET)
        flow = _arrived(sink, word)
        if flow < 0:
            continue
        good = load_any_u16(frame + LENGTH_OFFSET) == length
        if good and int(sink["check"]) != 0:
            good = _is_filled(frame, length, word & _NUMBER_MASK)
        if not good:
            flow_at(int(sink["flows"]), flow)["corrupt"] += 1
    sink["frames"] += count
    return count


@jit
def _arrived(sink: Record, word: int) -> int:
    """Note one frame; its flow, or -1 if it is none of ours."""
    flow = word >> _FLOW_SHIFT & 0xFF
    if word >> _MARK_SHIFT != _MARK or flow >= int(sink["n_flows"]):
        sink["foreign"] += 1
        return -1
    number = word & _NUMBER_MASK
    record = flow_at(int(sink["flows"]), flow)
    expected = int(record["expected"])
    if number < expected:
        _late(record, number)
        return flow
    if number > expected:
        missing = number - expected
        record["lost"] += missing
        record["longest_gap"] = max(int(record["longest_gap"]), missing)
        _note_gap(record, expected, number)
    record["expected"] = number + 1
    record["received"] += 1
    return flow


@jit
def _late(record: Record, number: int) -> None:
    """A number from before: out of order if it was missing, else a duplicate."""
    gaps = record["gaps"]
    for i in range(_GAPS):
        first = int(gaps[2 * i])
        behind = int(gaps[2 * i + 1])
        if first <= number < behind:
            gaps[2 * i + 1] = number
            if number + 1 < behind:
                _note_gap(record, number + 1, behind)
            record["lost"] -= 1
            record["reordered"] += 1
            record["received"] += 1
            return
    record["duplicates"] += 1


@jit
def _note_gap(record: Record, first: int, behind: int) -> None:
    at = int(record["n_gaps"]) % _GAPS
    record["n_gaps"] += 1
    record["gaps"][2 * at] = first
    record["gaps"][2 * at + 1] = behind
