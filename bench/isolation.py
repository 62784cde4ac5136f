"""What a pair of guests keeps of its throughput beside a guest that misbehaves.

    python -m bench.isolation [--seconds S] [--slices N] [-j]

One worker serves a pair that we look at and a neighbour. The neighbour misbehaves in one
slice and in the next does as much work decently: the pair's share is what it gets then.

    kicks       kicks without a pause, and offers nothing; decently: the same system calls
                on a descriptor that the switch does not have
    no refill   sends to a guest that gives no buffers; decently: to one that does
    addresses   every frame comes from another station; decently: from one

The figure is the ratio of the two, the median over neighbouring slices.
"""

import argparse
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Final, NamedTuple

import numpy as np

from bench import machine
from bench.rig import Rig, running
from vswitch.guest import Guest
from vswitch.guest.frontend import eventfd
from vswitch.guest.traffic import Generator, Sink, run

LENGTH: Final = 64
LEAST: Final = 0.7  # of a share
_ADDRESS: Final = 6  # bytes; the source's lies behind the destination's


class Neighbours(NamedTuple):
    """The pair, and those who may disturb it."""

    sender: Guest
    receiver: Guest
    other: Guest  # misbehaves
    taker: Guest  # receives decently
    miser: Guest  # gives no buffers


class Slice(NamedTuple):
    """The pair's rates, in millions of frames a second."""

    share: float  # beside a decent neighbour
    beside: float  # beside the other kind

    @property
    def ratio(self) -> float:
        """What is left of the share."""
        return self.beside / self.share


def rate(
    all_of: Neighbours,
    seconds: float,
    to: Guest | None,
    each: Callable[[], None] | None,
) -> float:
    """The pair's rate while the neighbour sends to `to` and `each` is done on and on."""
    generators = [Generator(all_of.sender, all_of.receiver, LENGTH)]
    sinks = [Sink(all_of.receiver, 2)]
    if to is not None:
        generators.append(Generator(all_of.other, to, LENGTH, flow=1))
    if to is all_of.taker:
        sinks.append(Sink(to, 2))
    with repeated(each):
        totals = run(generators, sinks, seconds)
    return float(sinks[0].flows["received"][0] / totals.seconds / 1e6)


@contextmanager
def repeated(each: Callable[[], None] | None) -> Iterator[None]:
    """Call a function on and on in a thread."""
    over = threading.Event()

    def work() -> None:
        while each and not over.is_set():
            each()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def kicks(all_of: Neighbours, seconds: float) -> Slice:
    """A storm of kicks."""
    (nobody, theirs) = eventfd(), int(all_of.other.rings[1]["kick_fd"])
    try:
        share = rate(all_of, seconds, None, partial(os.eventfd_write, nobody, 1))
    finally:
        os.close(nobody)
    beside = rate(all_of, seconds, None, partial(os.eventfd_write, theirs, 1))
    return Slice(share, beside)


def no_refill(all_of: Neighbours, seconds: float) -> Slice:
    """Frames to a ring without buffers."""
    share = rate(all_of, seconds, all_of.taker, None)
    return Slice(share, rate(all_of, seconds, all_of.miser, None))


def addresses(all_of: Neighbours, seconds: float) -> Slice:
    """Frames of ever new stations; the sender's buffers are rewritten under the switch."""
    layout, noise = all_of.other.layouts[1], np.random.default_rng(1)
    at = int(layout.ring["header_len"]) + _ADDRESS
    sources = layout.buffers[:, at : at + _ADDRESS]

    def invent() -> None:
        sources[:] = noise.integers(0, 256, sources.shape, np.uint8) & 0xFE

    def repeat() -> None:
        noise.integers(0, 256, sources.shape, np.uint8)
        sources[:] = np.frombuffer(all_of.other.mac, np.uint8)

    share = rate(all_of, seconds, all_of.taker, repeat)
    return Slice(share, rate(all_of, seconds, all_of.taker, invent))


NUISANCES: Final[dict[str, Callable[[Neighbours, float], Slice]]] = {
    "kicks": kicks,
    "no refill": no_refill,
    "addresses": addresses,
}


@contextmanager
def neighbours(rig: Rig) -> Iterator[Neighbours]:
    """Five guests; the switch knows where each is."""
    with ExitStack() as owned:
        guests = []
        for name in Neighbours._fields:
            buffers = 0 if name == "miser" else None
            guest = owned.enter_context(rig.guest(name, rx_buffers=buffers))
            rig.manager.ask("fdb_add", mac=guest.mac_text, ifname=name)
            guests.append(guest)
        yield Neighbours(*guests)


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="of a slice")
    parser.add_argument("--slices", type=int, default=5, help="of each nuisance")
    parser.add_argument("-j", "--json", action="store_true")
    options = parser.parse_args()
    found: dict[str, list[Slice]] = {name: [] for name in NUISANCES}
    with running() as rig, neighbours(rig) as all_of:
        rate(all_of, 0.1, all_of.taker, None)
        for _ in range(options.slices):
            for name, slices in found.items():
                slices.append(NUISANCES[name](all_of, options.seconds))
    if not options.json:
        print(f"{machine.processor()}, one worker, {LENGTH} bytes, raw generators")
        print("neighbour   share Mpps  beside it  ratio  (least to most)")
    for name, slices in found.items():
        print(_json_line(name, slices) if options.json else _row(name, slices))


def _row(name: str, slices: Sequence[Slice]) -> str:
    ratios = [one.ratio for one in slices]
    share, beside = (
        median(getattr(one, field) for one in slices) for field in Slice._fields
    )
    low = "" if median(ratios) >= LEAST else f"  BELOW {LEAST}"
    return (
        f"{name:10}  {share:10.2f}  {beside:9.2f}  {median(ratios):5.2f}"
        f"  ({min(ratios):.2f} to {max(ratios):.2f}){low}"
    )


def _json_line(name: str, slices: Sequence[Slice]) -> str:
    return json.dumps(
        {
            "name": f"isolation_{name.replace(' ', '_')}",
            "value": median(one.ratio for one in slices),
            "unit": "of a share",
            "better": "higher",
            "slices": [one._asdict() for one in slices],
        }
    )


if __name__ == "__main__":
    main()
