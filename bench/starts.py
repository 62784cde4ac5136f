"""How soon a system forwards: from the start of its process to a frame's arrival.

Two guests attach as soon as its ports are there, and the first one broadcasts a frame every
millisecond until the second one has one: no address has to be known for that.

Warm is with all that a system keeps from one start to the next; what it, the machine and we
ourselves have to load for the first time is loaded by a start that does not count. Cold is
without what it keeps: this switch has to compile itself. Who keeps nothing starts the same
way each time.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from bench import peers
from bench.daemon import START_S
from bench.machine import Place, only_on
from bench.measure import FAILURES, Plan
from bench.peers import Kind, Need
from bench.traffic import Load, Wiring, attached, expect_frames_by
from bench.turns import take_turns
from vswitch.guest import Guest
from vswitch.guest.traffic import ETHERTYPE

_NEED: Final = Need(2, 1514)
_WIRING: Final = Wiring.of(Load())
_EACH_S: Final = 0.001
_BROADCAST: Final = b"\xff" * 6
_PAYLOAD: Final = bytes(46)


class First(NamedTuple):
    """A frame that came through."""

    version: str  # of the system
    seconds: float  # from its start


def add_to(
    result: dict[str, Any],
    kinds: Mapping[str, Kind],
    plan: Plan,
    place: Place,
    say: Callable[[str], None],
) -> None:
    """Measure those of the kinds that are there, in turns, for a report of the whole."""
    kinds = {name: kind for name, kind in kinds.items() if not kind.missing()}
    failed = result["failed"]

    def attempt(name: str) -> float | None:
        what = f"{name}, start"
        if what in failed:
            return None
        try:
            first = first_frame(name, kinds[name], plan.queue_size, place)
        except FAILURES as error:
            failed[what] = str(error)
            return None
        result["versions"].setdefault(name, first.version)
        return first.seconds

    say("starting each with what it keeps")
    found = take_turns(1 + plan.rounds, list(kinds), attempt)
    result["first_frames"] = {
        "warm": {
            name: times[1:]
            for name, times in zip(kinds, found, strict=True)
            if None not in times
        },
        "cold": {},
    }
    for name, kind in kinds.items():
        if kind.cache:
            say(f"starting {name} without what it keeps")
            with _nothing_kept(kind.cache):
                time_cold = attempt(name)
            if time_cold is not None:
                result["first_frames"]["cold"][name] = [time_cold]


def first_frame(name: str, kind: Kind, queue_size: int, place: Place) -> First:
    """Start it, and wait until a frame has come through.

    Raises:
        CountsError: None did.
        DaemonError: It did not start.
    """
    began = time.monotonic()
    with (
        peers.running(name, kind, _NEED, place) as system,
        only_on(place.other),
        attached(system, _WIRING, queue_size) as guests,
        system.forwarding(),
    ):
        _send_until_one_comes(name, *guests)
        return First(system.version, time.monotonic() - began)


def _send_until_one_comes(name: str, sender: Guest, receiver: Guest) -> None:
    frame = _BROADCAST + sender.mac + ETHERTYPE.to_bytes(2, "big") + _PAYLOAD
    deadline = time.monotonic() + START_S
    sender.send([frame])
    while frame not in receiver.receive(timeout=_EACH_S):
        expect_frames_by(deadline, name)
        sender.send([frame])  # where the ring is full there are enough of them


@contextmanager
def _nothing_kept(variable: str) -> Iterator[None]:
    """An empty directory for what a system keeps, named in its environment."""
    before = os.environ.get(variable)
    with tempfile.TemporaryDirectory(prefix="vswitch-bench-") as directory:
        os.environ[variable] = directory
        try:
            yield
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before
