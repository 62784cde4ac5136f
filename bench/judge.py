"""What a run's figures say, and when they say nothing.

Figures are compared in pairs, each with the one of the same round. A slice that waited for
its processor is left out; so is a pair whose halves found the machine in different states
(see `machine`). Of a state there have to be enough, or nobody is called faster.
"""

from collections.abc import Sequence
from statistics import median, quantiles
from typing import Final, NamedTuple

from bench import machine
from bench.traffic import Slice

ENOUGH: Final = 3  # pairs
_DISTURBED: Final = 0.05  # of the time spent waiting for a processor
_WIDE: Final = 0.3  # from quartile to quartile, of the median
TOO_NOISY: Final = "too noisy to judge"


class Spread(NamedTuple):
    """A median, and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Verdict(NamedTuple):
    """What pairs of slices say of two systems."""

    ratio: Spread | None  # how many times as fast the first one is
    pairs: int  # that could be used
    state: str  # of the machine: fast, slow
    text: str


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Spread(median(values), low, high)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of figures of the same rounds, each to its neighbour."""
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])


def is_fast(one: Slice) -> bool:
    """Whether the machine was in its fast state."""
    return one.round_trip_ns < machine.FAST_NS


def is_quiet(one: Slice) -> bool:
    """Whether nobody else wanted the processors."""
    return one.waited < _DISTURBED


def worth_showing(slices: Sequence[Slice]) -> list[Slice]:
    """The quiet ones of the fast state, or else the quiet ones, or else all."""
    quiet = [one for one in slices if is_quiet(one)]
    return [one for one in quiet if is_fast(one)] or quiet or list(slices)


def compare(ours: Sequence[Slice], theirs: Sequence[Slice]) -> Verdict:
    """Say how many times as fast `ours` are, slice by slice of the same rounds."""
    for fast, state in ((True, "fast"), (False, "slow")):
        ratios = [
            one.mpps / other.mpps
            for one, other in zip(ours, theirs, strict=True)
            if is_quiet(one) and is_quiet(other)
            if is_fast(one) == is_fast(other) == fast and other.mpps
        ]
        if len(ratios) >= ENOUGH:
            return _judge(spread(ratios), len(ratios), state)
    return Verdict(None, 0, "", TOO_NOISY)


def _judge(ratio: Spread, pairs: int, state: str) -> Verdict:
    if ratio.high - ratio.low > _WIDE * ratio.median:
        return Verdict(ratio, pairs, state, TOO_NOISY)
    if ratio.low > 1:
        return Verdict(ratio, pairs, state, "faster")
    if ratio.high < 1:
        return Verdict(ratio, pairs, state, "slower")
    return Verdict(ratio, pairs, state, "no difference")
