"""What a pair of guests keeps of its throughput beside a guest that misbehaves.

    python -m bench.isolation [--seconds S] [--slices N] [-j]

One worker serves a pair that we look at and a neighbour. The neighbour misbehaves in one
slice and in the next does as much work decently: the pair's share is what it gets then.

    kicks       kicks for nothing, sixteen times a burst of the pair; decently: the same
                system calls on a descriptor that the switch does not have
    no refill   sends to a guest that gives no buffers; decently: to one that does
    addresses   every frame comes from another station; decently: from one

The figure is the ratio of the two, the median over neighbouring slices.
"""

import argparse
import json
import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Final, NamedTuple

import numpy as np

from bench import machine
from bench.local import Local, running
from ports.native import eventfd_signal, jit, rdtsc, store_any_u32
from vswitch.guest import Guest, stream
from vswitch.guest.frontend import eventfd
from vswitch.guest.stream import collect, generate, generator_at, sink_at
from vswitch.guest.traffic import Generator, Sink, tsc_hz

LENGTH: Final = 64
LEAST: Final = 0.7  # of a share
KICKS: Final = 16  # a burst
_SOURCE: Final = 6  # where a frame has its source
_WORD: Final = (1 << 62) - 1
_FINISH_S: Final = 30.0


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


class Work(NamedTuple):
    """What the neighbour does after each burst, beside sending."""

    kick_fd: int = -1  # write to it KICKS times
    sources: int = 0  # give each of its frames another source; address of the first
    stride: int = 0  # bytes from one to the next
    frames: int = 0  # how many
    mask: int = 0  # bits of an address that may change


def rate(all_of: Neighbours, seconds: float, to: Guest | None, work: Work) -> float:
    """The pair's rate while the neighbour sends to `to` and does its work."""
    generators = [Generator(all_of.sender, all_of.receiver, LENGTH)]
    sinks = [Sink(all_of.receiver, 2)]
    if to is not None:
        generators.append(Generator(all_of.other, to, LENGTH, flow=1))
    if to is all_of.taker:
        sinks.append(Sink(to, 2))
    for sink in sinks:
        sink.prepare()
    for generator in generators:
        generator.prepare()
    sending = np.array([one.record for one in generators], stream.GENERATOR)
    receiving = np.array([one.record for one in sinks], stream.SINK)
    cycles = _stream(
        *(int(sending.ctypes.data), len(sending)),
        *(int(receiving.ctypes.data), len(receiving)),
        int(seconds * tsc_hz()),
        *work,
        *np.zeros((2, 1024), np.int64),
    )
    received = int(sinks[0].flows["received"][0])
    for generator, row in zip(generators, sending, strict=True):
        generator.table[0] = row
        generator.finish(time.monotonic() + _FINISH_S)
    return received / (cycles / tsc_hz()) / 1e6


@jit
def _stream(
    generators: int,
    n_generators: int,
    sinks: int,
    n_sinks: int,
    cycles: int,
    kick_fd: int,
    sources: int,
    stride: int,
    n_sources: int,
    mask: int,
    offsets: np.ndarray,
    lengths: np.ndarray,
) -> int:
    """Send, receive and do the neighbour's work in turn; the cycles that it took."""
    begin = rdtsc()
    now = begin
    state = begin
    while now - begin < cycles:
        for i in range(n_generators):
            generate(generator_at(generators, i))
        for i in range(n_sinks):
            collect(sink_at(sinks, i), offsets, lengths)
        if kick_fd >= 0:
            for _ in range(KICKS):
                eventfd_signal(kick_fd)
        for i in range(n_sources):
            state = (state * 6364136223846793005 + 1442695040888963407) & _WORD
            # The four bytes behind the first two of the address.
            store_any_u32(sources + i * stride + 2, (state >> 16) & mask)
        now = rdtsc()
    return now - begin


def kicks(all_of: Neighbours, seconds: float) -> Slice:
    """A storm of kicks."""
    nobody, theirs = eventfd(), int(all_of.other.rings[1]["kick_fd"])
    with select.epoll() as waits:  # a worker's descriptor is watched like this
        waits.register(nobody, select.EPOLLIN | select.EPOLLET)
        share = rate(all_of, seconds, None, Work(nobody))
    os.close(nobody)
    return Slice(share, rate(all_of, seconds, None, Work(theirs)))


def no_refill(all_of: Neighbours, seconds: float) -> Slice:
    """Frames to a ring without buffers."""
    share = rate(all_of, seconds, all_of.taker, Work())
    return Slice(share, rate(all_of, seconds, all_of.miser, Work()))


def addresses(all_of: Neighbours, seconds: float) -> Slice:
    """Frames of ever new stations."""
    layout = all_of.other.layouts[1]
    buffers = layout.buffers
    first = buffers.ctypes.data + int(layout.ring["header_len"]) + _SOURCE
    decent = Work(-1, first, buffers.strides[0], len(buffers), 0)
    share = rate(all_of, seconds, all_of.taker, decent)
    other = decent._replace(mask=0xFFFFFFFF)
    return Slice(share, rate(all_of, seconds, all_of.taker, other))


NUISANCES: Final[dict[str, Callable[[Neighbours, float], Slice]]] = {
    "kicks": kicks,
    "no refill": no_refill,
    "addresses": addresses,
}


@contextmanager
def neighbours(rig: Local) -> Iterator[Neighbours]:
    """Five guests; the switch knows where each is."""
    with ExitStack() as owned:
        guests = []
        for name in Neighbours._fields:
            buffers = 0 if name == "miser" else None
            guests.append(owned.enter_context(rig.guest(name, rx_buffers=buffers)))
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
        rate(all_of, 0.1, all_of.taker, Work())
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
