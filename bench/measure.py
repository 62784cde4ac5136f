"""A run of the whole: cases one after the other, systems in turn within each."""

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any, Final, NamedTuple, Self, TypeVar

from bench import machine, paced, peers, testpmd, traffic, virtio_user
from bench.cases import IDLE, Case
from bench.daemon import DaemonError
from bench.machine import Place
from bench.paced import Paced
from bench.peers import Kind, Need, System
from bench.traffic import CountsError, Load, Slice, Streams, Wiring
from bench.turns import take_turns
from vswitch.errors import VswitchError
from vswitch.guest import GuestError

# What a peer that does not do as it should, or dies on the way, makes of us.
FAILURES: Final = (
    *(CountsError, DaemonError, GuestError, VswitchError),
    *(OSError, subprocess.SubprocessError),
)
_IDLE_NEED: Final = Need(2, 1514)
_IDLE_SLICES: Final = 4  # as long as so many

Measured = TypeVar("Measured")
Say = Callable[[str], None]


class Plan(NamedTuple):
    """How much of it."""

    rounds: int
    seconds: float  # of a slice
    queue_size: int = 256

    @property
    def searches(self) -> int:
        """How often a rate without loss is looked for: each takes as long as slices do."""
        return self.rounds // 2 + 1


class Party(NamedTuple):
    """A system under a load."""

    system: System
    load: Load


def run(
    kinds: Mapping[str, Kind],
    cases: Sequence[Case],
    plan: Plan,
    place: Place,
    say: Say,
    *,
    with_idle: bool = True,
) -> dict[str, Any]:
    """Measure everything; the result as it is written to the JSON file.

    A system that is missing or fails is left out by name; the rest goes on.
    """
    missing = {name: kind.missing() for name, kind in kinds.items()}
    present = {name: kind for name, kind in kinds.items() if not missing[name]}
    if any(case.load.dpdk for case in cases) and testpmd.missing():
        missing[virtio_user.NAME] = testpmd.missing()
        cases = [case for case in cases if not case.load.dpdk]
    result: dict[str, Any] = {
        "machine": machine.statement()
        | {"forwarding on": f"CPU {place.cpu}", "generating on": f"CPU {place.other}"},
        "plan": plan._asdict(),
        "versions": {},
        "starts": {},
        "left_out": {name: reason for name, reason in missing.items() if reason},
        "reference": [machine.reference()],
        "failed": {},
        "cases": [],
        "no_loss": [],
        "idle": {},
    }
    for name, reason in result["left_out"].items():
        say(f"{name} is left out: {reason}")
    groups = [(n, list(some)) for n, some in groupby(cases, key=lambda case: case.need)]
    if with_idle and _IDLE_NEED not in dict(groups):
        groups.append((_IDLE_NEED, []))
    for need, group in groups:
        with _started(present, need, place, result, say) as systems:
            for case in group:
                say(case.title)
                found, measure = (
                    (result["no_loss"], _search)
                    if case.no_loss
                    else (result["cases"], _measure)
                )
                found.append(measure(case, systems, plan, place, result["failed"]))
                result["reference"].append(machine.reference())
            if with_idle and need == _IDLE_NEED:
                say(IDLE)
                _measure_idle(systems, plan, place, result)
    return result


def _measure_idle(
    systems: Sequence[System], plan: Plan, place: Place, result: dict[str, Any]
) -> None:
    """What each takes while nothing comes, and how soon the machine wakes anybody."""
    median, most = machine.wake_us(place, traffic.SILENCE_US, traffic.WAKES)
    said = f"in {median:.1f} us, 99 % in {most:.1f} us"
    result["machine"]["a bare sleeper wakes"] = said
    seconds = _IDLE_SLICES * plan.seconds
    for system in systems:
        try:
            found = traffic.idle(system, seconds, plan.queue_size)
        except FAILURES as error:
            result["failed"][f"{system.name}, {IDLE}"] = str(error)
        else:
            result["idle"][system.name] = found._asdict()


@contextmanager
def _started(
    kinds: Mapping[str, Kind],
    need: Need,
    place: Place,
    result: dict[str, Any],
    say: Say,
) -> Iterator[list[System]]:
    """All systems, halted, with as many ports as needed."""
    with ExitStack() as owned:
        systems = []
        for name, kind in kinds.items():
            say(f"starting {name} with {need.ports} ports")
            began = time.monotonic()
            try:
                system = owned.enter_context(peers.running(name, kind, need, place))
            except FAILURES as error:
                result["failed"][f"{name}, {need.ports} ports"] = str(error)
                continue
            result["versions"][name] = system.version
            if need == _IDLE_NEED:
                result["starts"][name] = time.monotonic() - began
            systems.append(system)
        # Not before: what is started would have to stay there, too.
        owned.enter_context(machine.only_on(place.other))
        yield systems


def _measure(
    case: Case,
    systems: Sequence[System],
    plan: Plan,
    place: Place,
    failed: dict[str, str],
) -> dict[str, Any]:
    """One case; a system that fails in it is named and not asked again."""
    if case.load.shape != traffic.PAIRS:
        systems = [system for system in systems if system.looks_up]
    loads = [case.load] if case.beside is None else [case.load, case.beside]
    parties = [Party(system, load) for system in systems for load in loads]
    with Plugs(plan, place) as plugs:
        found = _attempt(case, plan.rounds, parties, plugs.measure, failed)
    slices: dict[Load, dict[str, Any]] = {load: {} for load in loads}
    for party, measured in found:
        slices[party.load][party.system.name] = [one._asdict() for one in measured]
    return {
        "name": case.name,
        "title": case.title,
        "length": case.load.length,
        "slices": slices[case.load],
        "slices_beside": {} if case.beside is None else slices[case.beside],
    }


def _search(
    case: Case,
    systems: Sequence[System],
    plan: Plan,
    place: Place,
    failed: dict[str, str],
) -> dict[str, Any]:
    """The same for a case of a rate without loss."""
    parties = [Party(system, case.load) for system in systems]
    with Plugs(plan, place) as plugs:
        found = _attempt(case, plan.searches, parties, plugs.search, failed)
    return {
        "name": case.name,
        "title": case.title,
        "length": case.load.length,
        "percentiles": paced.PERCENTILES,
        "found": {
            party.system.name: [one._asdict() for one in measured]
            for party, measured in found
        },
    }


def _attempt(
    case: Case,
    rounds: int,
    parties: Sequence[Party],
    measure: Callable[[Party], Measured],
    failed: dict[str, str],
) -> list[tuple[Party, list[Measured]]]:
    """What was found for those that did not fail, in turns."""

    def attempt(party: Party) -> Measured | None:
        name = f"{party.system.name}, {case.title}"
        if name in failed:
            return None
        try:
            return measure(party)
        except FAILURES as error:
            failed[name] = str(error)
            return None

    found = []
    for party, measured in zip(
        parties, take_turns(rounds, parties, attempt), strict=True
    ):
        whole = [one for one in measured if one is not None]
        if len(whole) == rounds:
            found.append((party, whole))
    return found


class Plugs:
    """What is attached to each system; it stays as long as it suits the load."""

    def __init__(self, plan: Plan, place: Place) -> None:
        self._plan, self._place = plan, place
        self._there: dict[str, tuple[Wiring | Load, _Guests | virtio_user.Pair]] = {}

    def measure(self, party: Party) -> Slice:
        """A slice of this load by guests, or DPDK, that are attached and known."""
        there = self._attached(party)
        if isinstance(there, virtio_user.Pair):
            return there.measure(self._plan.seconds)
        streams = there.streams(party.load)
        return traffic.measure(streams, self._place, self._plan.seconds)

    def search(self, party: Party) -> Paced:
        """A rate without loss between guests, and times below it."""
        there = self._attached(party)
        assert isinstance(there, _Guests)
        streams = there.streams(party.load)
        return paced.measure(streams, self._place, self._plan.seconds)

    def _attached(self, party: Party) -> "_Guests | virtio_user.Pair":
        system, load = party
        wiring = load if load.dpdk else Wiring.of(load)
        if system.name in self._there and self._there[system.name][0] != wiring:
            self._there.pop(system.name)[1].close()
        if system.name not in self._there:
            new = (
                virtio_user.Pair(system, load, self._plan.queue_size, self._place)
                if load.dpdk
                else _Guests(system, Wiring.of(load), self._plan.queue_size)
            )
            self._there[system.name] = (wiring, new)
        return self._there[system.name][1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._there:
            self._there.popitem()[1][1].close()


class _Guests:
    """Attached guests, and the streams that were laid between them so far."""

    def __init__(self, system: System, wiring: Wiring, queue_size: int) -> None:
        self._system = system
        self._owned = ExitStack()
        self._guests = self._owned.enter_context(
            traffic.attached(system, wiring, queue_size)
        )
        self._streams: dict[Load, Streams] = {}

    def streams(self, load: Load) -> Streams:
        if load not in self._streams:
            self._streams[load] = Streams(self._system, load, self._guests)
        return self._streams[load]

    def close(self) -> None:
        self._owned.close()
