"""What two streams keep of their rate when many more guests are attached and idle.

    python -m bench.load [--ports N] [--seconds S] [--slices N] [-j]

Two guests send to each other as fast as they can, through one busy worker. In one slice
nobody else is attached; in the next, all the other ports have an idle guest each, whose
ring is looked at all the same. The figure is the ratio of the two rates, slice by slice.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final, NamedTuple

from bench import machine
from bench.judge import ratios, spread
from bench.local import Local, running
from bench.turns import take_turns
from vswitch.guest import Guest
from vswitch.guest.traffic import Generator, Sink, run

LENGTH: Final = 64
LEAST: Final = 0.8  # of the rate with two ports
STREAMS: Final = 2
_WARM_S: Final = 0.1
_SMALL: Final = 64  # entries of an idle guest's rings


class Crowd(NamedTuple):
    """Two guests that talk, and those that are only there."""

    pair: tuple[Guest, Guest]
    idle: Sequence[Guest]  # not attached

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Have the idle guests on the switch."""
        try:
            for guest in self.idle:
                guest.open()
            yield
        finally:
            for guest in self.idle:
                guest.disconnect()


def rate(pair: tuple[Guest, Guest], seconds: float) -> float:
    """Millions of frames a second that arrive in all while both send to each other."""
    ways = (pair, pair[::-1])
    generators = [Generator(sender, receiver, LENGTH) for sender, receiver in ways]
    return run(generators, [Sink(guest) for guest in pair], seconds).mpps


def measure(crowd: Crowd, seconds: float, *, crowded: bool) -> float:
    """The pair's rate, with the others attached or without."""
    if not crowded:
        return rate(crowd.pair, seconds)
    with crowd.attached():
        rate(crowd.pair, _WARM_S)  # the worker looks at what is new
        return rate(crowd.pair, seconds)


@contextmanager
def crowd_of(rig: Local, ports: int) -> Iterator[Crowd]:
    """So many ports with a guest each; two of the guests are attached."""
    with ExitStack() as owned:
        guests = [
            owned.enter_context(rig.guest(f"g{n}", queue_size=_SMALL if n > 1 else 256))
            for n in range(ports)
        ]
        for guest in guests[2:]:
            guest.disconnect()
        yield Crowd((guests[0], guests[1]), guests[2:])


def main() -> None:
    """Measure, and print a line or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ports", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a slice")
    parser.add_argument("--slices", type=int, default=9, help="of each kind")
    parser.add_argument("-j", "--json", action="store_true")
    options = parser.parse_args()
    with running() as rig, crowd_of(rig, options.ports) as crowd:
        rate(crowd.pair, _WARM_S)
        alone, beside = take_turns(
            options.slices,
            (False, True),
            lambda crowded: measure(crowd, options.seconds, crowded=crowded),
        )
    report = _json_line if options.json else _table
    print(report(options.ports, alone, beside))


def _table(ports: int, alone: Sequence[float], beside: Sequence[float]) -> str:
    ratio = ratios(beside, alone)
    low = "" if ratio.median >= LEAST else f"  BELOW {LEAST}"
    return (
        f"{machine.processor()}, one worker, {STREAMS} streams of {LENGTH} bytes,"
        " raw generators; median (quartiles)\n"
        f"2 ports    {spread(alone)} Mpps\n"
        f"{ports} ports  {spread(beside)} Mpps\n"
        f"ratio      {ratio}{low}"
    )


def _json_line(ports: int, alone: Sequence[float], beside: Sequence[float]) -> str:
    return json.dumps(
        {
            "name": f"load_{ports}_ports",
            "value": ratios(beside, alone).median,
            "unit": "of the rate with 2 ports",
            "better": "higher",
            "alone_mpps": alone,
            "beside_mpps": beside,
        }
    )


if __name__ == "__main__":
    main()
