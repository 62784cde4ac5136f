"""Frames from one built-in guest to another through one worker.

    python -m bench.guest_to_guest [--seconds S] [--slices N] [-j]

The worker has one processor, generator and sink share the other. The raw generator fills
its buffers once and then writes a number into each frame and moves indexes; the sink
checks every number, and what it counted has to be what the switch counted.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from statistics import median
from typing import Any, Final, NamedTuple

from bench import machine
from bench.rig import Rig, pair, running
from vswitch.guest import Guest
from vswitch.guest.traffic import Generator, Sink, Totals, run, tsc_hz

LENGTHS: Final = (64, 512, 1500, 9000)
_WARM_S: Final = 0.1


class Slice(NamedTuple):
    """One stretch of traffic."""

    mpps: float
    cycles_per_frame: float
    round_trip_ns: float  # the longer one of before and after

    @property
    def is_fast(self) -> bool:
        """Whether the machine was in its fast state."""
        return self.round_trip_ns < machine.FAST_NS


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a slice")
    parser.add_argument("--slices", type=int, default=5, help="of each frame length")
    parser.add_argument("-j", "--json", action="store_true")
    options = parser.parse_args()
    with running() as rig:
        idle = idle_round_cycles(rig, options.seconds)
        rows = [
            (length, slices_of(rig, length, options.slices, options.seconds))
            for length in LENGTHS
        ]
    if options.json:
        for line in _json_lines(rows, idle):
            print(json.dumps(line))
        return
    print(f"{machine.processor()}, one worker, raw generator, ring of 256")
    print("bytes     Mpps  (least to most)     Gb/s  cycles a frame  slices")
    for length, slices in rows:
        print(_row(length, slices))
    print(f"an idle round over 2 rings: {idle:.0f} cycles, {_ns(idle):.0f} ns")


def slices_of(rig: Rig, length: int, count: int, seconds: float) -> list[Slice]:
    """Measure `count` slices of frames of one length."""
    with pair(rig, length) as (sender, receiver):
        _run(sender, receiver, length, _WARM_S)
        return [_slice(rig, sender, receiver, length, seconds) for _ in range(count)]


def _slice(
    rig: Rig, sender: Guest, receiver: Guest, length: int, seconds: float
) -> Slice:
    near = machine.round_trip_ns(rig.generator_cpu, rig.cpu)
    before = rig.stats()
    totals = _run(sender, receiver, length, seconds)
    after = rig.stats()
    near = max(near, machine.round_trip_ns(rig.generator_cpu, rig.cpu))
    _check(totals, before["ports"], after["ports"], f"b{length}")
    (old,), (new,) = before["workers"].values(), after["workers"].values()
    busy = new["busy_cycles"] - old["busy_cycles"]
    return Slice(totals.mpps, busy / (new["frames"] - old["frames"]), near)


def _run(sender: Guest, receiver: Guest, length: int, seconds: float) -> Totals:
    return run([Generator(sender, receiver, length)], [Sink(receiver)], seconds)


def _check(
    totals: Totals, before: dict[str, Any], after: dict[str, Any], port: str
) -> None:
    """Stop where the figures would be worth nothing."""
    arrived = after[port]["tx_frames"] - before[port]["tx_frames"]
    full = after[port]["tx_drop_ring_full"] - before[port]["tx_drop_ring_full"]
    harmed = totals.reordered + totals.duplicates + totals.corrupt + totals.foreign
    lost = totals.sent - totals.received
    if harmed or arrived != totals.received or full != lost:
        sys.exit(
            f"the counts do not agree: {totals}, switch: {arrived} and {full} full"
        )


def idle_round_cycles(rig: Rig, seconds: float) -> float:
    """Cycles of one round over the empty rings of two guests."""
    with pair(rig, LENGTHS[0]) as (sender, _):
        before = rig.stats()["workers"]
        sender.receive(timeout=seconds)
        after = rig.stats()["workers"]
    (old,), (new,) = before.values(), after.values()
    cycles, rounds = (new[name] - old[name] for name in ("idle_cycles", "polls"))
    return float(cycles / rounds)


def _chosen(slices: list[Slice]) -> list[Slice]:
    """The slices in the fast state, or all where there was none."""
    return [one for one in slices if one.is_fast] or slices


def _row(length: int, slices: list[Slice]) -> str:
    chosen = _chosen(slices)
    rates = [one.mpps for one in chosen]
    rate = median(rates)
    cycles = median(one.cycles_per_frame for one in chosen)
    fast = sum(one.is_fast for one in slices)
    near = median(one.round_trip_ns for one in slices)
    state = f"{fast} of {len(slices)} fast ({near:.0f} ns)"
    spread = f"({min(rates):.1f} to {max(rates):.1f})"
    gbps = rate * length * 8 / 1e3
    return f"{length:5}  {rate:7.2f}  {spread:16} {gbps:8.1f}  {cycles:14.0f}  {state}"


def _json_lines(
    rows: list[tuple[int, list[Slice]]], idle: float
) -> Iterator[dict[str, object]]:
    for length, slices in rows:
        chosen = _chosen(slices)
        yield {
            "name": f"guest_to_guest_{length}",
            "value": median(one.mpps for one in chosen),
            "unit": "Mpps",
            "better": "higher",
            "cycles_per_frame": median(one.cycles_per_frame for one in chosen),
            "slices": [one._asdict() for one in slices],
        }
    yield {"name": "idle_round", "value": idle, "unit": "cycles", "better": "lower"}


def _ns(cycles: float) -> float:
    return cycles / tsc_hz() * 1e9


if __name__ == "__main__":
    main()
