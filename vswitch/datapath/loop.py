"""A worker's turns: poll its rings until the budget is spent.

    poll_turn -> _serve -> receive -> forward_burst (decide, transmit) -> release

Everything here is jitted, takes the shared records and returns numbers. The worker's
Python half runs between turns only, so nothing that it changes (mappings, ring states)
changes under a turn.
"""

from typing import Final

import numpy as np

from ports import dispatch
from ports.base import (
    KIND_VHOST_USER,
    RING_RUNNING,
    RING_STARTING,
    RINGS_PER_PORT,
    RX,
)
from ports.burst import CONTEXT, make_scratch
from ports.native import (
    Record,
    Records,
    jit,
    load_u8,
    load_u64,
    pause,
    rdtsc,
    store_u8,
)
from ports.vhost import virtqueue
from ports.views import frame_at, port_at, ring_at
from vswitch.datapath import clock, fdb, forward
from vswitch.datapath.views import header_at, tally_at, worker_at
from vswitch.records import WORKER, Shared

# An idle turn ends after this part of the budget, so that idling is noticed early.
_IDLE_PART: Final = 8
# While frames move, rings that bring none are looked at in so many rounds once, by turns,
# where there are more than that: what idle guests take is what the others lose.
_LANES: Final = 8
# While frames move, the interpreter has its turn after so many, or when somebody rings:
# meanwhile no frame moves, and it may be slow.
_TURNS: Final = 100
_TURNS_AN_ALARM: Final = 10
_WORKER_SIZE: Final = WORKER.itemsize
_BELL: Final = WORKER.fields["bell"][1] if WORKER.fields else 0
# A worker number that owns no ring and holds no lock: not -1, as 0 is a free lock.
_NOBODY: Final = -2


def make_context(shared: Shared, worker: int) -> tuple[Record, object]:
    """A worker's CONTEXT, and what has to stay alive as long as it is used."""
    scratch = make_scratch()
    context = np.zeros(1, CONTEXT)
    for name, array in (shared._asdict() | scratch).items():
        context[0][name] = array.ctypes.data
    records = shared.workers["serving"]
    context[0]["serving"] = records.ctypes.data + worker * records.strides[0]
    time = clock.make_clock()
    context[0]["clock"] = time.ctypes.data
    return context[0], (context, shared, scratch, time)


@jit
def poll_turns(
    ctx: Record, worker: int, polled: Records, budget: int, bell: int
) -> int:
    """Turn after turn, while frames move and nobody has rung since it was `bell`.

    What is due by the clock is done after each.

    Returns:
        Frames taken from all rings.
    """
    record = int(ctx["workers"]) + worker * _WORKER_SIZE
    frames = 0
    for turn in range(_TURNS):
        if turn % _TURNS_AN_ALARM == 0:
            clock.start_alarm(ctx)
        now_s = clock.elapsed_s(ctx)
        moved = poll_turn(ctx, worker, polled, now_s, budget)
        frames += moved
        clock.age(ctx, worker, now_s)
        if moved == 0 or load_u64(record + _BELL) != bell:
            break
    return frames


@jit
def poll_turn(
    ctx: Record,
    worker: int,
    polled: Records,
    now_s: int,
    budget: int,
) -> int:
    """Serve the rings in `polled` in turn for about `budget` cycles.

    One burst a ring and round, so that a guest that refills its ring as fast as we take
    from it does not starve the others. The first round, and each after one that moved
    nothing, looks at all of them.

    Returns:
        Frames taken from all rings.
    """
    begin = rdtsc()
    mark = begin
    busy = 0
    frames = 0
    rounds = 0
    moved = 0
    while True:
        lanes = _LANES if moved > 0 and polled.size > _LANES else 1
        moved = _round(ctx, worker, polled, now_s, rounds, lanes)
        rounds += 1
        now = rdtsc()
        if moved > 0:
            busy += now - mark
            frames += moved
        else:
            pause()
        mark = now
        spent = now - begin
        if spent >= budget or (frames == 0 and spent >= budget // _IDLE_PART):
            break
    dispatch.mark_ring(ctx, -1)
    record = worker_at(int(ctx["workers"]), worker)
    record["turns"] += 1
    record["polls"] += rounds
    record["frames"] += frames
    record["busy_cycles"] += busy
    record["idle_cycles"] += mark - begin - busy
    return frames


@jit
def _round(
    ctx: Record, worker: int, polled: Records, now_s: int, number: int, lanes: int
) -> int:
    """Serve what moved when it was last looked at, and one lane of the others."""
    awake = int(ctx["awake"])
    moved = 0
    for at in range(polled.size):
        if (at + number) & (lanes - 1) != 0 and load_u8(awake + at) == 0:
            continue
        n = _serve(ctx, worker, int(polled[at]), now_s)
        store_u8(awake + at, int(n > 0))
        moved += n
    return moved


@jit
def _serve(ctx: Record, worker: int, index: int, now_s: int) -> int:
    """Move one burst from ring `index`; return its frames."""
    ring = ring_at(int(ctx["rings"]), index)
    if int(ring["state"]) != RING_RUNNING:
        return 0
    ingress = int(ring["port"])
    port = port_at(int(ctx["ports"]), ingress)
    tally = tally_at(ctx, worker, ingress)
    dispatch.mark_ring(ctx, index)
    n = dispatch.receive(ring, port, ctx, tally)
    if n == 0:
        return 0
    if int(ring["enabled"]) != 0:
        forward.forward_burst(ctx, worker, ring, n, now_s)
    else:
        # vhost-user: a disabled ring of a running device is drained and discarded.
        tally["rx_frames"] += n
        tally["rx_drop_disabled"] += n
    dispatch.mark_ring(ctx, index)
    dispatch.release(ring, port, ctx, n, tally)
    return n


@jit
def inject(
    ctx: Record, worker: int, slot: int, addr: int, length: int, now_s: int
) -> None:
    """Forward a frame of our own, between turns, as if port `slot` had received it.

    Before `addr` are as many zero bytes as a virtio-net header may have. No bytes are
    no frame.
    """
    if length == 0:
        return
    frame = frame_at(int(ctx["burst"]), 0)
    frame["addr"] = addr
    frame["eth"] = addr
    frame["length"] = length
    frame["segments"] = 1
    frame["offload"] = 0
    ring = ring_at(int(ctx["rings"]), slot * RINGS_PER_PORT + RX)
    forward.forward_burst(ctx, worker, ring, 1, now_s)
    dispatch.mark_ring(ctx, -1)


@jit
def start_rings(ctx: Record, worker: int) -> int:
    """Take up the STARTING rings that this worker owns; how many there were.

    Their memory is mapped in every worker before they are handed to us.
    """
    started = 0
    for index in range(
        int(header_at(int(ctx["header"]), 0)["port_slots"]) * RINGS_PER_PORT
    ):
        ring = ring_at(int(ctx["rings"]), index)
        if int(ring["state"]) != RING_STARTING or int(ring["owner"]) != worker:
            continue
        port = port_at(int(ctx["ports"]), int(ring["port"]))
        dispatch.mark_ring(ctx, index)
        if int(port["kind"]) == KIND_VHOST_USER:
            virtqueue.start(ring, port, ctx)
        else:
            ring["state"] = RING_RUNNING
        dispatch.mark_ring(ctx, -1)
        started += 1
    return started


@jit
def repair_rings(ctx: Record, dead: int, worker: int) -> int:
    """Make usable what worker `dead` left behind, now that `worker` owns it.

    A receive ring had no other user. A transmit ring may have been in the hands of a
    live worker; it needs repair only if the dead one held its lock, or used it alone.

    Returns:
        How many rings were repaired.
    """
    fdb.free_locks(ctx, dead)
    repaired = 0
    for index in range(
        int(header_at(int(ctx["header"]), 0)["port_slots"]) * RINGS_PER_PORT
    ):
        ring = ring_at(int(ctx["rings"]), index)
        if int(ring["state"]) != RING_RUNNING:
            continue
        port = port_at(int(ctx["ports"]), int(ring["port"]))
        held = int(ring["lock"]) == dead + 1
        alone = int(ring["shared"]) == 0 and int(ring["owner"]) == worker
        polled = index % 2 == 1 and int(ring["owner"]) == worker
        dispatch.mark_ring(ctx, index)
        if (held or alone or polled) and dispatch.resync(ring, port, ctx):
            dispatch.unlock(ctx, index)
            repaired += 1
    dispatch.mark_ring(ctx, -1)
    return repaired


@jit
def ask_for_kicks(ctx: Record, worker: int, polled: Records) -> int:
    """Before sleep: ask every guest to kick; the number of rings with frames."""
    waiting = 0
    for at in range(polled.size):
        ring = ring_at(int(ctx["rings"]), int(polled[at]))
        if int(ring["state"]) == RING_RUNNING and int(ring["owner"]) == worker:
            port = port_at(int(ctx["ports"]), int(ring["port"]))
            dispatch.mark_ring(ctx, int(polled[at]))
            waiting += int(dispatch.ask_for_kicks(ring, port, ctx))
    dispatch.mark_ring(ctx, -1)
    return waiting


@jit
def stop_kicks(ctx: Record, worker: int, polled: Records) -> None:
    """After sleep: we are looking again."""
    for at in range(polled.size):
        ring = ring_at(int(ctx["rings"]), int(polled[at]))
        if int(ring["state"]) == RING_RUNNING and int(ring["owner"]) == worker:
            port = port_at(int(ctx["ports"]), int(ring["port"]))
            dispatch.mark_ring(ctx, int(polled[at]))
            dispatch.stop_kicks(ring, port, ctx)
    dispatch.mark_ring(ctx, -1)


@jit
def read_cycles() -> int:
    """The cycle counter that budgets and accounts are in."""
    return rdtsc()


def warm_up(ctx: Record, worker: int) -> None:
    """Compile whatever a worker may call, by calling it on nothing.

    The switch may be running: the rings belong to others, or were those of a dead
    worker with our number, and the guests' memory is not mapped yet.
    """
    none = np.zeros(0, np.int64)
    poll_turns(ctx, worker, none, 1, 0)
    start_rings(ctx, _NOBODY)
    repair_rings(ctx, _NOBODY, _NOBODY)
    ask_for_kicks(ctx, worker, none)
    stop_kicks(ctx, worker, none)
    inject(ctx, worker, 0, 0, 0, 0)
    read_cycles()
    fdb.warm_up(ctx)


def polled_rings(
    shared: Shared, worker: int
) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Indexes of the receive rings that this worker has to poll, in order."""
    rings = shared.rings
    receives = np.arange(len(rings)) % 2 == 1
    running = (rings["state"] == RING_RUNNING) & (rings["owner"] == worker)
    return np.flatnonzero(receives & running).astype(np.int64)
