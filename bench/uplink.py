"""From one network namespace to another, by this switch's uplinks and by others' means.

    python -m bench.uplink [--seconds S] [--slices N] [--only WAY,WAY] [-j]

All ways are there from the beginning and take turns, slice by slice, with iperf3 (TCP,
all offloads that the interfaces have by themselves) and with frames of 60 bytes sent as
fast as one thread can make the kernel send them; what counts is what the other end's
interface received. A ratio is the median over the slices' own, each with its neighbour.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, Final, NamedTuple

from bench import daemon, machine, report
from bench.blast import Blaster
from bench.judge import ratios, spread
from bench.measure import FAILURES
from bench.namespace import Namespace
from bench.turns import take_turns
from bench.ways import WAYS, Land, missing
from vswitch import tables

_BASES: Final = {
    "tap": ("bridge", "ovs tap", "vde"),
    "eth": ("bridge", "ovs veth"),
    "xdp": ("bridge", "ovs veth"),
}
# Beside the figures of vhost-user ports.
FULL: Final = ("bridge", "tap", "ovs tap", "vde")
_FULL_S: Final = 1  # of a slice
_START_S: Final = 30.0
_SLACK_S: Final = 30.0
_TEST_TYPE: Final = b"\x88\xb5"  # IEEE 802: for local experiments; nobody answers


class NoAnswerError(Exception):
    """TCP did not come through."""


class Way(NamedTuple):
    """One that is there: its interfaces and addresses."""

    name: str
    number: int
    land: Land
    blaster: Blaster

    @property
    def address(self) -> str:
        """Of the far end."""
        return f"10.88.{self.number}.2"

    def tcp(self, seconds: int) -> float:
        """Gb/s that arrived."""
        server = ("iperf3", "--server", "--one-off", "--forceflush")
        with self.land.other.start(*server) as process:
            if not any("listening" in line for line in process.stdout or ()):
                message = "iperf3 cannot listen"
                raise NoAnswerError(message)
            said = self.land.one.run(
                *("iperf3", "--client", self.address, "--time", str(seconds)),
                *("--interval", "0", "--json"),
                timeout=seconds + _SLACK_S,
            )
        result = json.loads(said)
        if "error" in result:
            raise NoAnswerError(result["error"])
        return float(result["end"]["sum_received"]["bits_per_second"]) / 1e9

    def small(self, seconds: float) -> float:
        """Millions of small frames a second that arrived."""
        before = self._arrived()
        took = self.blaster.run(seconds)
        return (self._arrived() - before) / took / 1e6

    def _arrived(self) -> int:
        link = self.land.other.link(f"b{self.number}")
        return int(link["stats64"]["rx"]["packets"]) if link else 0


class Measured(NamedTuple):
    """Slices of one way."""

    tcp: list[float]
    small: list[float]


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=2, help="of a slice")
    parser.add_argument("--slices", type=int, default=5, help="of each way")
    parser.add_argument("--only", default=",".join(WAYS), help="ways, by commas")
    parser.add_argument("-j", "--json", action="store_true")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(WAYS):
        parser.error(f"no such way: {', '.join(unknown)} (known: {', '.join(WAYS)})")
    if lack := lacking():
        sys.exit(f"cannot measure uplinks: {lack}")
    facts = machine.statement()
    try:
        with ways(names) as present:
            found = measure(present, options.seconds, options.slices)
    except NoAnswerError as error:
        sys.exit(str(error))
    if options.json:
        for name, measured in found.items():
            for figure in _as_json(name, measured):
                print(json.dumps(figure))
        return
    print(report.facts(facts))
    rows = [
        (name, *(str(spread(values)) for values in measured))
        for name, measured in found.items()
    ]
    print(tables.align(("way", "TCP Gb/s", "60 B Mpps"), rows, frozenset({1, 2})))
    head = ("way", "to", "TCP", "60 B")
    print(tables.align(head, list(_ratios(found)), frozenset({2, 3})))


def add_to(result: dict[str, Any], slices: int, say: Callable[[str], None]) -> None:
    """Measure what kernel and user space can do with taps, for a report of the whole."""
    what = "taps"
    if lack := lacking():
        result["left_out"][what] = lack
        return
    say("between taps")
    lacks = {name: missing(name) for name in FULL}
    result["left_out"] |= {name: lack for name, lack in lacks.items() if lack}
    try:
        with ways([name for name, lack in lacks.items() if not lack]) as present:
            found = measure(present, _FULL_S, slices)
    except (NoAnswerError, *FAILURES) as error:
        result["failed"][what] = str(error)
    else:
        result["taps"] = {name: one._asdict() for name, one in found.items()}


def lacking() -> str:
    """Why nothing of this can be measured here, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    return daemon.missing(["iperf3"], "iperf3")


def measure(present: list[Way], seconds: int, slices: int) -> dict[str, Measured]:
    """Let the ways take turns, with one kind of traffic after the other."""
    tcp = take_turns(slices, present, lambda way: way.tcp(seconds))
    small = take_turns(slices, present, lambda way: way.small(seconds))
    names = [way.name for way in present]
    return dict(zip(names, map(Measured, tcp, small), strict=True))


@contextmanager
def ways(names: list[str]) -> Iterator[list[Way]]:
    """Make them all, in namespaces of our own; those that cannot be are named."""
    with ExitStack() as owned:
        one, other = (owned.enter_context(Namespace()) for _ in range(2))
        present = []
        for number, name in enumerate(names, 1):
            reason = missing(name)
            if reason:
                print(f"{name} is left out: {reason}", file=sys.stderr)
                continue
            land = Land(one, owned.enter_context(Namespace()), other)
            owned.enter_context(WAYS[name](land, number))
            present.append(_furnish(owned, name, number, land))
        for way in present:
            _await_answer(way)
        yield present


def _furnish(owned: ExitStack, name: str, number: int, land: Land) -> Way:
    """Give the ends addresses and open what sends small frames."""
    addresses = []
    for last, (space, letter) in enumerate(land.ends, 1):
        interface = f"{letter}{number}"
        space.ip(f"address add 10.88.{number}.{last}/24 dev {interface}")
        space.ip(f"link set {interface} up")
        (link,) = json.loads(space.ip(f"-json link show {interface}"))
        addresses.append(bytes.fromhex(link["address"].replace(":", "")))
    frame = addresses[1] + addresses[0] + _TEST_TYPE
    blaster = owned.enter_context(Blaster(land.one, f"a{number}", frame))
    return Way(name, number, land, blaster)


def _await_answer(way: Way) -> None:
    """Once TCP has come through, everybody knows where the ends are."""
    deadline = time.monotonic() + _START_S
    while True:
        try:
            way.tcp(1)
        except (subprocess.CalledProcessError, NoAnswerError) as error:
            if time.monotonic() > deadline:
                message = f"{way.name}: TCP does not come through: {error}"
                raise NoAnswerError(message) from error
        else:
            return


def _ratios(found: dict[str, Measured]) -> Iterator[tuple[str, ...]]:
    """Each of our ways beside the others'."""
    pairs = [(way, base) for way, bases in _BASES.items() for base in bases]
    for name, base in pairs:
        if name in found and base in found:
            yield name, base, *map(str, map(ratios, found[name], found[base]))


def _as_json(name: str, measured: Measured) -> Iterator[dict[str, Any]]:
    for what, unit, values in (
        ("tcp", "Gb/s", measured.tcp),
        ("small_frames", "Mpps", measured.small),
    ):
        yield {
            "name": f"uplink_{name.replace(' ', '_')}_{what}",
            "value": median(values),
            "unit": unit,
            "better": "higher",
            "slices": values,
        }


if __name__ == "__main__":
    daemon.end_in_order()
    main()
