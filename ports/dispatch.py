"""One port contract for every kind: receive, release, transmit, kicks.

Who calls: a worker's turn, for rings it owns (receive side) or for any port (transmit).
A kind that is not listed receives nothing and transmits nothing. To add a kind, add a
line to each if-chain; chains of ints inline where function values do not.
"""

from typing import Final

from ports import eth_data, flow, offload, tap_data, vhost_net_data, xdp_data
from ports.base import (
    KIND_ETH,
    KIND_TAP,
    KIND_VHOST_NET,
    KIND_VHOST_USER,
    KIND_XDP,
    RING,
    RING_RUNNING,
    RINGS_PER_PORT,
    TX,
)
from ports.native import (
    Record,
    jit,
    load_u64,
    pause,
    sched_yield,
    store_release_u64,
    store_u64,
    swap_if_u64,
)
from ports.vhost import chain, virtqueue
from ports.views import frame_at, port_at, ring_at

_RING_SIZE: Final = RING.itemsize
_LOCK: Final = RING.fields["lock"][1] if RING.fields else 0
_SPINS_BEFORE_YIELD: Final = 256
_MAX_SPINS: Final = 1 << 16


@jit
def mark_ring(ctx: Record, index: int) -> None:
    """Say which ring we are at from now on, or -1: none.

    Whoever finds us dead wants to know. A store to a line that only we write.
    """
    store_u64(int(ctx["serving"]), index + 1)


@jit
def receive(ring: Record, port: Record, ctx: Record, tally: Record) -> int:
    """Take up to a burst of frames from the port; return how many."""
    if int(port["kind"]) == KIND_VHOST_USER:
        return virtqueue.take(ring, port, ctx, tally)
    if int(port["kind"]) == KIND_TAP:
        return tap_data.receive(ring, ctx)
    if int(port["kind"]) == KIND_ETH:
        return eth_data.receive(ring, ctx)
    if int(port["kind"]) == KIND_XDP:
        return xdp_data.receive(ring, ctx, tally)
    if int(port["kind"]) == KIND_VHOST_NET:
        return vhost_net_data.receive(ring, ctx, tally)
    return 0


@jit
def asks_for_offload(frame: Record, header_len: int) -> bool:
    """Whether a frame's header asks for anything; `header_len` is not 0."""
    return chain.asks_for_offload(frame, header_len)


@jit
def accept_offload(ring: Record, ctx: Record, frame: Record, i: int) -> bool:
    """Check what frame `i` of the burst asks for; False: it may not, or lies."""
    return chain.accept_offload(ring, ctx, frame, i)


@jit
def release(ring: Record, port: Record, ctx: Record, n: int, tally: Record) -> None:
    """Give back the `n` frames of the last `receive`; they are not ours any more."""
    if int(port["kind"]) == KIND_VHOST_USER:
        virtqueue.release(ring, port, ctx, n)
        virtqueue.call(ring, tally)
    elif int(port["kind"]) == KIND_ETH:
        eth_data.release(ring, n)
    elif int(port["kind"]) == KIND_XDP:
        xdp_data.release(ring)
    elif int(port["kind"]) == KIND_VHOST_NET:
        vhost_net_data.release(ring)


@jit
def transmit(ctx: Record, egress: int, worker: int, n: int, tally: Record) -> int:
    """Send the `n` picked frames out of port `egress`; return how many arrived.

    Every frame is counted in `tally`, sent or dropped.
    """
    port = port_at(int(ctx["ports"]), egress)
    if int(port["up"]) == 0:
        tally["tx_drop_not_ready"] += n
        return 0
    mark_ring(ctx, egress * RINGS_PER_PORT + TX)
    if int(ctx["offloads"]) == 0:
        return _transmit_run(ctx, port, egress, worker, n, tally)
    return _transmit_mixed(ctx, port, egress, worker, n, tally)


@jit
def _transmit_mixed(
    ctx: Record, port: Record, egress: int, worker: int, n: int, tally: Record
) -> int:
    """Send frames of which some have to be lowered for this port, in their order."""
    able = int(port["offloads"])
    picked = int(ctx["picked"])
    begin = 0
    arrived = 0
    room = offload.SEGMENTS_PER_BURST
    for k in range(n):
        frame = frame_at(int(ctx["burst"]), load_u64(picked + 8 * k))
        if offload.passes(frame, able):
            continue
        ctx["picked"] = picked + 8 * begin
        if k > begin:
            arrived += _transmit_run(ctx, port, egress, worker, k - begin, tally)
        if room <= 0 and offload.is_cut(frame):
            tally["tx_drop_gso_limit"] += 1
        else:
            came, made = _transmit_lowered(
                ctx, port, egress, worker, frame, room, tally
            )
            arrived += came
            room -= made
        begin = k + 1
    ctx["picked"] = picked + 8 * begin
    if n > begin:
        arrived += _transmit_run(ctx, port, egress, worker, n - begin, tally)
    ctx["picked"] = picked
    return arrived


@jit
def _transmit_lowered(
    ctx: Record,
    port: Record,
    egress: int,
    worker: int,
    frame: Record,
    room: int,
    tally: Record,
) -> tuple[int, int]:
    """Send what a frame is made into for a port that cannot take it as it is.

    Returns:
        How many frames arrived, and how many segments were made: `room`, rounded up to
        a burst, at most.
    """
    ctx["picked"] = int(ctx["lowered_rows"])
    made = 0
    arrived = 0
    at = 0
    while True:
        n, at = offload.lower(ctx, frame, at)
        came = 0
        if n > 0:
            came = _transmit_run(ctx, port, egress, worker, n, tally)
        made += n
        arrived += came
        # Where nothing arrives any more, what is left is not worth cutting.
        if at == 0 or came == 0:
            break
        if made >= room:
            tally["tx_drop_gso_limit"] += 1  # what is left counts as one segment
            made += 1
            break
    if made == 0:
        tally["tx_drop_bad_offload"] += 1
    elif not offload.is_cut(frame):
        tally["tx_csum_completed"] += 1
        return arrived, 0
    else:
        tally["tx_gso_split"] += 1
        tally["tx_gso_segments"] += made
    return arrived, made


@jit
def _transmit_run(
    ctx: Record, port: Record, egress: int, worker: int, n: int, tally: Record
) -> int:
    """Send the `n` picked frames as they are."""
    first = egress * RINGS_PER_PORT + TX
    if int(port["kind"]) == KIND_TAP:
        ring = ring_at(int(ctx["rings"]), _own_ring(ctx, first, port, worker))
        return tap_data.transmit(ring, port, ctx, n, tally)
    if int(port["kind"]) == KIND_VHOST_NET:
        own = _own_ring(ctx, first, port, worker)
        if int(ring_at(int(ctx["rings"]), own)["enabled"]) == 0:
            tally["tx_drop_link_down"] += n
            return 0
        return _transmit_ring(ctx, own, port, worker, n, tally)
    if int(port["kind"]) == KIND_ETH:
        ring = ring_at(int(ctx["rings"]), _own_ring(ctx, first, port, worker))
        return eth_data.transmit(port, ring, ctx, n, tally)
    if int(port["pairs"]) <= 1:
        return _transmit_ring(ctx, first, port, worker, n, tally)
    return _transmit_spread(ctx, first, port, worker, n, tally)


@jit
def _own_ring(ctx: Record, first: int, port: Record, worker: int) -> int:
    """The transmit ring of the pair that this worker serves, or else one that it may use.

    An index, as is `first`, which is the ring of the port's first queue pair.
    """
    pairs = int(port["pairs"])
    for pair in range(pairs):
        ring = ring_at(int(ctx["rings"]), first + 2 * pair)
        if int(ring["owner"]) == worker:
            return first + 2 * pair
    return first + 2 * (worker % pairs)


@jit
def _transmit_spread(
    ctx: Record, first: int, port: Record, worker: int, n: int, tally: Record
) -> int:
    """Send the `n` picked frames, each flow by a receive queue of its own.

    `first` is the ring of the port's first queue pair.
    """
    pairs = int(port["pairs"])
    picked = int(ctx["picked"])
    pair_of = int(ctx["pair_of"])
    spread = int(ctx["spread"])
    for k in range(n):
        frame = frame_at(int(ctx["burst"]), load_u64(picked + 8 * k))
        pair = (flow.flow_of(ctx, frame) * pairs) >> 32
        store_u64(pair_of + 8 * k, pair)
    ctx["picked"] = spread
    arrived = 0
    for pair in range(pairs):
        share = 0
        for k in range(n):
            if load_u64(pair_of + 8 * k) == pair:
                store_u64(spread + 8 * share, load_u64(picked + 8 * k))
                share += 1
        if share > 0:
            index = first + 2 * pair
            arrived += _transmit_ring(ctx, index, port, worker, share, tally)
    ctx["picked"] = picked
    return arrived


@jit
def _transmit_ring(
    ctx: Record, index: int, port: Record, worker: int, n: int, tally: Record
) -> int:
    ring = ring_at(int(ctx["rings"]), index)
    if int(ring["state"]) != RING_RUNNING or int(ring["enabled"]) == 0:
        tally["tx_drop_not_ready"] += n
        return 0
    if int(ring["shared"]) == 0:
        return _put(ring, port, ctx, n, tally)
    lock = int(ctx["rings"]) + index * _RING_SIZE + _LOCK
    if not _lock(lock, worker + 1):
        tally["tx_drop_lock_busy"] += n
        return 0
    arrived = _put(ring, port, ctx, n, tally)
    unlock(ctx, index)
    return arrived


@jit
def _put(ring: Record, port: Record, ctx: Record, n: int, tally: Record) -> int:
    """Put frames and call the driver if anything went back to it, bad chains included."""
    if int(port["kind"]) == KIND_XDP:
        return xdp_data.transmit(ring, port, ctx, n, tally)
    if int(port["kind"]) == KIND_VHOST_NET:
        return vhost_net_data.transmit(ring, port, ctx, n, tally)
    before = int(ring["next_used"])
    arrived = virtqueue.put(ring, port, ctx, n, tally)
    if int(ring["next_used"]) != before:
        virtqueue.call(ring, tally)
    return arrived


@jit
def unlock(ctx: Record, index: int) -> None:
    """Free a ring's lock: what its holder wrote is there for the next one."""
    store_release_u64(int(ctx["rings"]) + index * _RING_SIZE + _LOCK, 0)


@jit
def _lock(lock: int, owner: int) -> bool:
    """Wait for a ring's lock, but not for ever: its holder may be dead."""
    for spin in range(_MAX_SPINS):
        if swap_if_u64(lock, 0, owner) == 0:
            return True
        pause()
        if spin % _SPINS_BEFORE_YIELD == _SPINS_BEFORE_YIELD - 1:
            sched_yield()
    return False


@jit
def ask_for_kicks(ring: Record, port: Record, ctx: Record) -> bool:
    """Ask to be woken by the next frame; True if one is here already."""
    if int(port["kind"]) == KIND_VHOST_USER:
        return virtqueue.ask_for_kicks(ring, port, ctx)
    if int(port["kind"]) == KIND_ETH:
        return eth_data.has_frame(ring)
    if int(port["kind"]) == KIND_XDP:
        return xdp_data.has_frame(ring)
    if int(port["kind"]) == KIND_VHOST_NET:
        return vhost_net_data.ask_for_kicks(ring)
    return False


@jit
def resync(ring: Record, port: Record, ctx: Record) -> bool:
    """Find out where a ring is that a worker was at when it died; False: it has none."""
    if int(port["kind"]) == KIND_VHOST_USER:
        virtqueue.resync(ring, port, ctx)
    elif int(port["kind"]) == KIND_ETH:
        eth_data.resync(ring)
    elif int(port["kind"]) == KIND_XDP:
        xdp_data.resync(ring)
    elif int(port["kind"]) == KIND_VHOST_NET:
        vhost_net_data.kick(ring)
    else:
        return False
    return True


@jit
def stop_kicks(ring: Record, port: Record, ctx: Record) -> None:
    """Ask not to be woken, since we are looking."""
    if int(port["kind"]) == KIND_VHOST_USER:
        virtqueue.stop_kicks(ring, port, ctx)
    elif int(port["kind"]) == KIND_VHOST_NET:
        vhost_net_data.stop_kicks(ring)
