"""A virtqueue of either format: split or packed, as the driver chose.

The format decides only how chains are found and given back; here it is looked up, once
a burst and ring. Everything else about a frame is the same for both.
"""

from typing import Final

from ports.base import REDO, REDO_ROWS
from ports.native import Record, jit
from ports.vhost import dirty, packed, split

_REDO_SIZE: Final = REDO.itemsize * REDO_ROWS


@jit
def start(ring: Record, port: Record, ctx: Record) -> None:
    """Take up a ring that was set up, and ask its driver not to kick."""
    if int(ring["packed"]) != 0:
        packed.start(ring)
    else:
        split.start(ring)
    stop_kicks(ring, port, ctx)


@jit
def resync(ring: Record, port: Record, ctx: Record) -> None:
    """Bring a ring that a dead worker left to where its driver will look next."""
    if int(ring["packed"]) != 0:
        packed.resync(ring, _redo_of(ring, ctx))
    else:
        split.resync(ring)
    stop_kicks(ring, port, ctx)
    dirty.mark_ring(ring, port, ctx)


@jit
def take(ring: Record, port: Record, ctx: Record, tally: Record) -> int:
    """Take up to a burst of offered chains and describe them; return how many."""
    if int(ring["packed"]) != 0:
        return packed.take(ring, port, ctx, _redo_of(ring, ctx), tally)
    return split.take(ring, port, ctx, tally)


@jit
def release(ring: Record, port: Record, ctx: Record, n: int) -> None:
    """Give back the `n` chains of the last take."""
    if int(ring["packed"]) != 0:
        packed.release(ring, port, ctx, _redo_of(ring, ctx), n)
    else:
        split.release(ring, port, ctx, n)


@jit
def put(ring: Record, port: Record, ctx: Record, n: int, tally: Record) -> int:
    """Copy the `n` picked frames into the ring's buffers; return how many arrived."""
    if int(ring["packed"]) != 0:
        return packed.put(ring, port, ctx, _redo_of(ring, ctx), n, tally)
    return split.put(ring, port, ctx, n, tally)


@jit
def call(ring: Record, tally: Record) -> None:
    """Interrupt the driver if it asked for that."""
    if int(ring["packed"]) != 0:
        packed.call(ring, tally)
    else:
        split.call(ring, tally)


@jit
def ask_for_kicks(ring: Record, port: Record, ctx: Record) -> bool:
    """Ask the driver to kick at its next chain; True if one is here already."""
    if int(ring["packed"]) != 0:
        here = packed.ask_for_kicks(ring)
    else:
        here = split.ask_for_kicks(ring)
    dirty.mark_events(ring, port, ctx)
    return here


@jit
def stop_kicks(ring: Record, port: Record, ctx: Record) -> None:
    """Ask the driver not to kick."""
    if int(ring["packed"]) != 0:
        packed.stop_kicks(ring)
    else:
        split.stop_kicks(ring)
    dirty.mark_events(ring, port, ctx)


@jit
def _redo_of(ring: Record, ctx: Record) -> int:
    return int(ctx["redo"]) + int(ring["number"]) * _REDO_SIZE
