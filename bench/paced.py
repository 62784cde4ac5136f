"""The rate that a system forwards without loss, and how long frames take below it.

RFC 2544 section 26.1: between a rate that loses frames and one that does not, the middle is
tried; by ratio, so that steps are as fine for every system. Section 26.2, but as
percentiles, and at parts of each system's own rate, as times at full rings only say how
long rings are. A frame's time begins when it is due, not when there was room for it.

Every sender sends at its part of the rate. A frame that finds its ring full is lost; one
that is late because the generator had no processor is nobody's loss, but a trial with many
of them was none at that rate: where only such trials are above the rate that was found, the
system may be capable of more. Hosts take processors away for longer than rings last, so a
rate has to lose nothing in one of several trials.
"""

import math
import time
from typing import Final, NamedTuple

from bench import machine
from bench.machine import Place
from bench.traffic import Streams, agreed, waited_s
from vswitch.guest.traffic import Totals

PARTS: Final = ("10", "50", "90")  # per cent of the rate without loss
HALF: Final = "50"  # where times are judged
PERCENTILES: Final = (50.0, 99.0, 99.9)
P99: Final = PERCENTILES.index(99.0)
_STEPS: Final = 7
_TRIALS: Final = 3
_TRIAL_PART: Final = 0.2  # of a slice's seconds
_TIMES_PART: Final = 0.5
_LINGER_S: Final = 0.01
_LATE: Final = 0.02  # of what was due
_BEYOND: Final = 1.1  # of what comes through when all is sent that goes
_SPAN: Final = 256  # the highest rate that is tried is so many times the lowest


class Found(NamedTuple):
    """What a search found."""

    mpps: float  # 0: there was loss at all rates that were tried
    at_least: bool  # above it the generator was too slow, not the system
    lossy_mpps: float  # the lowest rate tried above it


class Paced(NamedTuple):
    """One search, and times below what it found."""

    mpps: float  # without loss, as in `Found`
    at_least: bool
    times_us: dict[str, list[float]]  # the PERCENTILES, by the PARTS
    round_trip_ns: float  # the longer one of before and after
    waited: float  # for a processor, of the time: the generator's and the forwarder's


def measure(it: Streams, place: Place, seconds: float) -> Paced:
    """Search once, where a slice takes so many seconds.

    Raises:
        CountsError: The figures would be worth nothing.
    """
    near = machine.round_trip_ns(place.other, place.cpu)
    with it.system.forwarding():
        waited, began = waited_s(it.system, place), time.monotonic()
        totals = _run(it, 0.0, seconds * _TRIAL_PART)
        found = search(it, totals.mpps * _BEYOND, seconds * _TRIAL_PART)
        rate = found.mpps or found.lossy_mpps  # at none there are no times
        times = {}
        for part in PARTS:
            it.times_us()  # forget those of before
            _run(it, rate * int(part) / 100, seconds * _TIMES_PART)
            times[part] = it.times_us(*PERCENTILES)
        waited = waited_s(it.system, place) - waited
        took = time.monotonic() - began
    near = max(near, machine.round_trip_ns(place.other, place.cpu))
    return Paced(found.mpps, found.at_least, times, near, waited / took)


def search(it: Streams, most: float, seconds: float) -> Found:
    """The highest rate below `most` of which no frame is lost in one of the trials."""
    low, high, found, at_least = most / _SPAN, most, 0.0, False
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        lost = [_lost(it, middle, seconds)]
        while lost[-1] != 0 and len(lost) < _TRIALS:
            lost.append(_lost(it, middle, seconds))
        if lost[-1] == 0:
            low = found = middle
        else:
            high, at_least = middle, None in lost
    return Found(found, at_least, high)


def _lost(it: Streams, mpps: float, seconds: float) -> int | None:
    """How many frames a trial lost; None: none, but the generator did not keep its pace."""
    totals = _run(it, mpps, seconds)
    due = totals.sent + totals.missed + totals.late
    lost = totals.missed + totals.sent - totals.received
    return None if lost == 0 and totals.late > _LATE * due else lost


def _run(it: Streams, mpps: float, seconds: float) -> Totals:
    it.pace(mpps)
    before = it.system.work()
    totals = it.send(seconds, _LINGER_S)
    return agreed(it, totals, before)[0]
