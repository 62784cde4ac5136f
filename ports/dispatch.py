"""One port contract for every kind: receive, release, transmit, kicks.

Who calls: a worker's turn, for rings it owns (receive side) or for any port (transmit).
A kind that is not listed receives nothing and transmits nothing. To add a kind, add a
line to each if-chain; chains of ints inline where function values do not.
"""

from typing import Final

from ports import tap_data
from ports.base import (
    KIND_TAP,
    KIND_VHOST_USER,
    RING,
    RING_RUNNING,
    RINGS_PER_PORT,
    TX,
)
from ports.native import (
    Record,
    jit,
    pause,
    sched_yield,
    store_release_u64,
    swap_if_u64,
)
from ports.vhost import chain, virtqueue
from ports.views import port_at, ring_at

_RING_SIZE: Final = RING.itemsize
_LOCK: Final = RING.fields["lock"][1] if RING.fields else 0
_SPINS_BEFORE_YIELD: Final = 256
_MAX_SPINS: Final = 1 << 16


@jit
def receive(ring: Record, port: Record, ctx: Record, tally: Record) -> int:
    """Take up to a burst of frames from the port; return how many."""
    if int(port["kind"]) == KIND_VHOST_USER:
        return virtqueue.take(ring, port, ctx, tally)
    if int(port["kind"]) == KIND_TAP:
        return tap_data.receive(port, ctx)
    return 0


@jit
def asks_for_offload(frame: Record, header_len: int) -> bool:
    """Whether a frame's header asks for what was not negotiated; 0 means no header."""
    return chain.asks_for_offload(frame, header_len)


@jit
def release(ring: Record, port: Record, ctx: Record, n: int, tally: Record) -> None:
    """Give back the `n` frames of the last `receive`; they are not ours any more."""
    if int(port["kind"]) == KIND_VHOST_USER:
        virtqueue.release(ring, ctx, n)
        virtqueue.call(ring, tally)


@jit
def transmit(ctx: Record, egress: int, worker: int, n: int, tally: Record) -> int:
    """Send the `n` picked frames out of port `egress`; return how many arrived.

    Every frame is counted in `tally`, sent or dropped.
    """
    port = port_at(int(ctx["ports"]), egress)
    arrived = 0
    if int(port["up"]) == 0:
        tally["tx_drop_not_ready"] += n
    elif int(port["kind"]) == KIND_TAP:
        arrived = tap_data.transmit(port, ctx, n, tally)
    else:
        # One ring a worker where the guest has enough of them: a flow enters by one
        # worker, so it leaves by one ring, in order.
        pair = worker % max(int(port["pairs"]), 1)
        index = egress * RINGS_PER_PORT + 2 * pair + TX
        arrived = _transmit_ring(ctx, index, port, worker, n, tally)
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
        arrived = virtqueue.put(ring, port, ctx, n, tally)
        if arrived > 0:
            virtqueue.call(ring, tally)
        return arrived
    lock = int(ctx["rings"]) + index * _RING_SIZE + _LOCK
    if not _lock(lock, worker + 1):
        tally["tx_drop_lock_busy"] += n
        return 0
    arrived = virtqueue.put(ring, port, ctx, n, tally)
    if arrived > 0:
        virtqueue.call(ring, tally)
    unlock(ctx, index)
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
def ask_for_kicks(ring: Record, port: Record) -> bool:
    """Ask to be woken by the next frame; True if one is here already."""
    if int(port["kind"]) == KIND_VHOST_USER:
        return virtqueue.ask_for_kicks(ring)
    return False


@jit
def stop_kicks(ring: Record, port: Record) -> None:
    """Ask not to be woken, since we are looking."""
    if int(port["kind"]) == KIND_VHOST_USER:
        virtqueue.stop_kicks(ring)
