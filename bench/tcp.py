"""TCP between two real guests, with and without segmentation offload.

    python -m bench.tcp [--seconds S] [--slices N] [-j]

Each case is a pair of QEMU guests on one switch; all are there from the beginning, and
they take turns with iperf3, so that whatever else the machine does meets them all. Bytes
a frame by the switch's own count tell whether there were super-frames.

Without offloads a guest has neither segmentation nor checksums: Linux does not send
super-frames without both. QEMU runs as an interpreter (TCG) here, so the guests' own
work is the limit, not the switch's; offloads save the guests work for every frame.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from bench import daemon, machine, report
from bench.judge import ratios, spread
from bench.measure import FAILURES
from bench.rig import switch
from bench.turns import take_turns
from vswitch import tables
from vswitch.control.client import Client
from vswitch.demo import image
from vswitch.demo.qemu import QEMU, Machine, QemuGuest

_WARM_S: Final = 1
_FULL_S: Final = 2.0  # of a slice
_SLACK_S: Final = 30
_FULL_SIZE: Final = 1600  # bytes of an ordinary frame at most, and then some


class Case(NamedTuple):
    """What a pair of guests is offered."""

    rings: str
    offloads: bool

    @property
    def name(self) -> str:
        """For JSON."""
        return f"tcp_{self.rings}_{'with' if self.offloads else 'without'}_offloads"


CASES: Final = [
    Case(rings, offloads) for rings in ("split", "packed") for offloads in (True, False)
]


class Slice(NamedTuple):
    """One stretch of traffic."""

    gbps: float
    retransmits: int
    bytes_per_frame: float  # from the sender into the switch


class CasesError(Exception):
    """A case is not what it says."""


class Pair(NamedTuple):
    """The guests of a case."""

    case: Case
    manager: Client
    sender: QemuGuest
    receiver: QemuGuest

    def run(self, seconds: float) -> Slice:
        """Send as much as goes for so long."""
        before = self._counters()
        address = self.receiver.machine.address.split("/")[0]
        said = self.sender.check(
            f"iperf3 --client {address} --time {seconds:g} --interval 0 --json",
            timeout=seconds + _SLACK_S,
        )
        after = self._counters()
        end = json.loads(said)["end"]
        frames = after["rx_frames"] - before["rx_frames"]
        sent = after["rx_bytes"] - before["rx_bytes"]
        received = end["sum_received"]
        if sent < received["bytes"]:
            message = f"{received['bytes']} bytes arrived and {sent} came by the switch"
            raise CasesError(message)
        return Slice(
            received["bits_per_second"] / 1e9,
            end["sum_sent"]["retransmits"],
            sent / frames,
        )

    def _counters(self) -> dict[str, int]:
        stats = self.manager.ask("stats")["ports"]
        return dict(stats[self.sender.machine.name])


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of a slice")
    parser.add_argument("--slices", type=int, default=5, help="of each case")
    parser.add_argument("-j", "--json", action="store_true")
    options = parser.parse_args()
    facts = machine.statement() | {"guests": "QEMU's interpreter (TCG)"}
    try:
        slices = measure(options.seconds, options.slices)
    except CasesError as error:
        sys.exit(str(error))
    if options.json:
        for case, measured in slices.items():
            print(json.dumps(_as_json(case, measured)))
        return
    print(report.facts(facts))
    rows = [_row(case, measured) for case, measured in slices.items()]
    head = ("rings", "offloads", "Gb/s", "bytes a frame", "retransmits")
    print(tables.align(head, rows, frozenset({2, 3, 4})))
    for rings in dict.fromkeys(case.rings for case in CASES):
        both = (slices[Case(rings, offloads)] for offloads in (True, False))
        ratio = ratios(*([one.gbps for one in some] for some in both))
        print(f"{rings} rings: {ratio} times as fast with offloads")


def add_to(result: dict[str, Any], slices: int, say: Callable[[str], None]) -> None:
    """Measure the same for a report of the whole."""
    what = "TCP between real guests"
    if lack := daemon.missing([QEMU], "qemu-system-x86"):
        result["left_out"][what] = lack
        return
    say(what)
    try:
        found = measure(_FULL_S, slices)
    except (CasesError, *FAILURES) as error:
        result["failed"][what] = str(error)
        return
    result["tcp"] = [
        case._asdict() | {"slices": [one._asdict() for one in measured]}
        for case, measured in found.items()
    ]


def measure(seconds: float, slices: int) -> dict[Case, list[Slice]]:
    """Let the cases take turns.

    Raises:
        CasesError: The figures would be worth nothing.
    """
    with pairs(CASES) as running:
        for pair in running:
            pair.run(_WARM_S)
        found = take_turns(slices, running, lambda pair: pair.run(seconds))
    by_case = dict(zip(CASES, found, strict=True))
    _check(by_case)
    return by_case


@contextmanager
def pairs(cases: list[Case]) -> Iterator[list[Pair]]:
    """A switch and two guests for each case, with a server in the second."""
    booted = image.prepare(image.TOOLS)
    with ExitStack() as owned:
        manager, directory = owned.enter_context(switch())
        guests = [
            owned.enter_context(_guest(manager, directory, booted, case, number))
            for number, case in enumerate(case for case in cases for _ in range(2))
        ]
        for guest in guests:
            guest.wait_ready()
        for receiver in guests[1::2]:
            receiver.check("iperf3 --server --daemon")
        yield [
            Pair(case, manager, *ends)
            for case, *ends in zip(cases, guests[::2], guests[1::2], strict=True)
        ]


def _guest(
    manager: Client, directory: Path, booted: image.Image, case: Case, number: int
) -> QemuGuest:
    name = f"vm{number}"
    path = directory / f"{name}.sock"
    manager.ask("add_port", name=name, endpoint=f"vhost:{path}", mode="server")
    guest = Machine(
        name=name,
        socket_path=path,
        mac=f"52:54:00:00:00:{number + 1:02x}",
        address=f"10.77.0.{number + 1}/24",
        packed=case.rings == "packed",
        offloads=case.offloads,
    )
    return QemuGuest(booted, guest, directory)


def _check(slices: dict[Case, list[Slice]]) -> None:
    """Stop where the cases are not what they say."""
    for case, measured in slices.items():
        for one in measured:
            if (one.bytes_per_frame > _FULL_SIZE) != case.offloads:
                message = f"{case.name}: {one.bytes_per_frame:.0f} bytes a frame"
                raise CasesError(message)


def _row(case: Case, slices: list[Slice]) -> tuple[str, ...]:
    size = median(one.bytes_per_frame for one in slices)
    again = sum(one.retransmits for one in slices)
    offloads = "with" if case.offloads else "without"
    rate = str(spread([one.gbps for one in slices]))
    return case.rings, offloads, rate, f"{size:.0f}", str(again)


def _as_json(case: Case, slices: list[Slice]) -> dict[str, Any]:
    return {
        "name": case.name,
        "value": median(one.gbps for one in slices),
        "unit": "Gb/s",
        "better": "higher",
        "slices": [one._asdict() for one in slices],
    }


if __name__ == "__main__":
    daemon.end_in_order()
    main()
