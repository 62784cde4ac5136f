"""What a run's figures say, and when they say nothing.

Figures are compared in pairs, each with the one of the same round. A slice that waited for
its processor is left out; so is a pair whose halves found the machine in different states
(see `machine`). Of a state there have to be enough, or nobody is called faster.
"""

from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Final, NamedTuple, TypeVar

from bench import machine
from bench.paced import HALF, P99, Paced
from bench.traffic import Slice

ENOUGH: Final = 3  # pairs
_MANY: Final = 5  # pairs: that all of these say the same by chance is unlikely
_DISTURBED: Final = 0.05  # of the time spent waiting for a processor
_WIDE: Final = 0.3  # from quartile to quartile, of the median
TOO_NOISY: Final = "too noisy to judge"

Figure = TypeVar("Figure", Slice, Paced)


class Spread(NamedTuple):
    """A median, and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Verdict(NamedTuple):
    """What pairs of slices say of two systems."""

    ratio: Spread | None  # of the first one's figure to the second one's
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


def is_fast(one: Slice | Paced) -> bool:
    """Whether the machine was in its fast state."""
    return one.round_trip_ns < machine.FAST_NS


def is_quiet(one: Slice | Paced) -> bool:
    """Whether nobody else wanted the processors."""
    return one.waited < _DISTURBED


def worth_showing(slices: Sequence[Figure]) -> list[Figure]:
    """The quiet ones of the fast state, or else the quiet ones, or else all."""
    quiet = [one for one in slices if is_quiet(one)]
    return [one for one in quiet if is_fast(one)] or quiet or list(slices)


def compare(ours: Sequence[Slice], theirs: Sequence[Slice]) -> Verdict:
    """Say how many times as fast `ours` are, slice by slice of the same rounds."""
    found, state = _pairs(ours, theirs, lambda one: one.mpps)
    return _judge(found, state, ("faster", "slower"), agreed=False)


def compare_rates(ours: Sequence[Paced], theirs: Sequence[Paced]) -> Verdict:
    """Say how many times as high rates without loss are, search by search."""
    found, state = _pairs(ours, theirs, lambda one: one.mpps)
    return _judge(found, state, ("higher", "lower"), agreed=False)


def compare_times(ours: Sequence[Paced], theirs: Sequence[Paced]) -> Verdict:
    """Say how many times as long 99 % of frames take at most, at half the rate.

    It is in the nature of such times that they vary. Where all of many pairs say the
    same, by how much does not matter.
    """
    found, state = _pairs(ours, theirs, lambda one: one.times_us[HALF][P99])
    agreed = len(found) >= _MANY and (min(found) > 1 or max(found) < 1)
    return _judge(found, state, ("above", "below"), agreed=agreed)


def _pairs(
    ours: Sequence[Figure],
    theirs: Sequence[Figure],
    figure: Callable[[Figure], float],
) -> tuple[list[float], str]:
    """Ratios of pairs that were undisturbed in one state; the fast one, if it has enough."""
    for fast, state in ((True, "fast"), (False, "slow")):
        found = [
            figure(one) / figure(other)
            for one, other in zip(ours, theirs, strict=True)
            if is_quiet(one) and is_quiet(other)
            if is_fast(one) == is_fast(other) == fast and figure(other)
        ]
        if len(found) >= ENOUGH:
            return found, state
    return [], ""


def _judge(
    found: Sequence[float], state: str, words: tuple[str, str], *, agreed: bool
) -> Verdict:
    if not found:
        return Verdict(None, 0, "", TOO_NOISY)
    ratio = spread(found)
    if not agreed and ratio.high - ratio.low > _WIDE * ratio.median:
        text = TOO_NOISY
    elif ratio.low > 1:
        text = words[0]
    else:
        text = words[1] if ratio.high < 1 else "no difference"
    return Verdict(ratio, len(found), state, text)
