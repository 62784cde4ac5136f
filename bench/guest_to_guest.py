"""Frames from one built-in guest to another through one worker.

    python -m bench.guest_to_guest [--seconds S] [--slices N] [--format F] [--ordinary] [-j]

Split and packed rings take turns, slice by slice, so that a machine that changes its
state in between is as bad for the one as for the other.

The worker has one processor, generator and sink share the other. The raw generator fills
its buffers once and then writes a number into each frame and moves indexes; the sink
checks every number, and what it counted has to be what the switch counted.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from statistics import median
from typing import Any, Final, NamedTuple

from bench import machine
from bench.rig import Rig, pair, running
from vswitch.guest import Guest
from vswitch.guest.traffic import Generator, Sink, Totals, run, tsc_hz

LENGTHS: Final = (64, 512, 1500, 9000)
FORMATS: Final = ("split", "packed")
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


class Measured(NamedTuple):
    """Slices of one frame length in one ring format, with one kind of generator."""

    length: int
    form: str
    raw: bool
    slices: list[Slice]

    @property
    def chosen(self) -> list[Slice]:
        """The slices in the fast state, or all where there was none."""
        return [one for one in self.slices if one.is_fast] or self.slices

    @property
    def mpps(self) -> float:
        """The figure."""
        return median(one.mpps for one in self.chosen)

    @property
    def cycles(self) -> float:
        """The worker's busy cycles a frame."""
        return median(one.cycles_per_frame for one in self.chosen)

    @property
    def name(self) -> str:
        """What it is called in JSON."""
        packed = "_packed" if self.form == "packed" else ""
        ordinary = "" if self.raw else "_ordinary"
        return f"guest_to_guest_{self.length}{packed}{ordinary}"


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a slice")
    parser.add_argument("--slices", type=int, default=5, help="of each frame length")
    parser.add_argument("--format", choices=[*FORMATS, "both"], default="both")
    parser.add_argument("--ordinary", action="store_true", help="guests use their data")
    parser.add_argument("-j", "--json", action="store_true")
    options = parser.parse_args()
    forms = FORMATS if options.format == "both" else (options.format,)
    with running() as rig:
        idle = idle_round_cycles(rig, options.seconds)
        rows = [
            Measured(length, form, not options.ordinary, [])
            for length in LENGTHS
            for form in forms
        ]
        for _, turns in groupby(rows, key=lambda row: row.length):
            measure(rig, list(turns), options.slices, options.seconds)
    if options.json:
        for line in _json_lines(rows, idle):
            print(json.dumps(line))
        return
    kind = "ordinary" if options.ordinary else "raw"
    print(f"{machine.processor()}, one worker, {kind} generator, ring of 256")
    print("bytes  rings     Mpps  (least to most)     Gb/s  cycles a frame  slices")
    for row in rows:
        print(_row(row))
    for length, ratio in _ratios(rows):
        print(f"{length} bytes, packed to split: {ratio:.2f}")
    print(f"an idle round over 2 rings: {idle:.0f} cycles, {_ns(idle):.0f} ns")


def measure(rig: Rig, rows: Sequence[Measured], count: int, seconds: float) -> None:
    """Measure `count` slices of each row, the rows in turn."""
    for _ in range(count):
        for row in rows:
            packed = row.form == "packed"
            with pair(rig, row.length, packed=packed) as (sender, receiver):
                _run(sender, receiver, row, _WARM_S)
                row.slices.append(_slice(rig, sender, receiver, row, seconds))


def _slice(
    rig: Rig, sender: Guest, receiver: Guest, row: Measured, seconds: float
) -> Slice:
    near = machine.round_trip_ns(rig.generator_cpu, rig.cpu)
    before = rig.stats()
    totals = _run(sender, receiver, row, seconds)
    after = rig.stats()
    near = max(near, machine.round_trip_ns(rig.generator_cpu, rig.cpu))
    _check(totals, before["ports"], after["ports"], f"b{row.length}")
    (old,), (new,) = before["workers"].values(), after["workers"].values()
    busy = new["busy_cycles"] - old["busy_cycles"]
    return Slice(totals.mpps, busy / (new["frames"] - old["frames"]), near)


def _run(sender: Guest, receiver: Guest, row: Measured, seconds: float) -> Totals:
    generator = Generator(sender, receiver, row.length, raw=row.raw)
    return run([generator], [Sink(receiver, raw=row.raw)], seconds)


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


def _ratios(rows: Sequence[Measured]) -> Iterator[tuple[int, float]]:
    """How many times as fast packed rings are, by length, where there were both.

    Only slices that followed each other in the same state of the machine are compared.
    """
    for split, packed in pairwise(rows):
        if (split.form, packed.form) != FORMATS:
            continue
        ratios = [
            two.mpps / one.mpps
            for one, two in zip(split.slices, packed.slices, strict=True)
            if one.is_fast == two.is_fast
        ]
        if ratios:
            yield split.length, median(ratios)


def _row(row: Measured) -> str:
    rates = [one.mpps for one in row.chosen]
    fast = sum(one.is_fast for one in row.slices)
    near = median(one.round_trip_ns for one in row.slices)
    state = f"{fast} of {len(row.slices)} fast ({near:.0f} ns)"
    spread = f"({min(rates):.1f} to {max(rates):.1f})"
    gbps = row.mpps * row.length * 8 / 1e3
    return (
        f"{row.length:5}  {row.form:6}  {row.mpps:7.2f}  {spread:16} {gbps:8.1f}  "
        f"{row.cycles:14.0f}  {state}"
    )


def _json_lines(rows: Sequence[Measured], idle: float) -> Iterator[dict[str, object]]:
    for row in rows:
        yield {
            "name": row.name,
            "value": row.mpps,
            "unit": "Mpps",
            "better": "higher",
            "cycles_per_frame": row.cycles,
            "slices": [one._asdict() for one in row.slices],
        }
    for length, ratio in _ratios(rows):
        yield {
            "name": f"packed_to_split_{length}",
            "value": ratio,
            "unit": "times",
            "better": "higher",
        }
    yield {"name": "idle_round", "value": idle, "unit": "cycles", "better": "lower"}


def _ns(cycles: float) -> float:
    return cycles / tsc_hz() * 1e9


if __name__ == "__main__":
    main()
