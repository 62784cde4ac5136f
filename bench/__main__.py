"""This switch beside its peers on this machine.

    python -m bench [--full] [--only CASE,CASE] [--systems NAME,NAME] [--out DIRECTORY]

Every system gets the same processor for its one forwarding thread and takes turns with
the others; generator and sinks have another. The result is a table here and, in the
directory, report.json, report.md and report.html.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Final

from bench import daemon, machine, measure, report, starts, tcp, uplink
from bench.cases import CASES, IDLE, STARTS, Case
from bench.measure import Plan
from bench.peers import KINDS, Kind, by_command, vpp_at

_QUICK: Final = Plan(rounds=5, seconds=0.5)
_FULL: Final = Plan(rounds=9, seconds=1.0)
_OUT: Final = Path("bench-report")


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    parser = _parser()
    options = parser.parse_args(arguments)
    kinds = _kinds(parser, options)
    cases, others = _cases(parser, options)
    try:
        place = machine.place(options.cpus)
    except ValueError as error:
        parser.error(f"cannot use --cpus: {error}")
    usual = _FULL if options.full else _QUICK
    plan = Plan(
        options.rounds or usual.rounds,
        options.seconds or usual.seconds,
        options.queue_size,
    )
    with_idle = IDLE in others
    result = measure.run(kinds, cases, plan, place, _say, with_idle=with_idle)
    if STARTS in others:
        starts.add_to(result, kinds, plan, place, _say)
    if options.full and not options.only and not options.systems:
        tcp.add_to(result, plan.rounds, _say)
        uplink.add_to(result, plan.rounds, _say)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("report.json", json.dumps(result, indent=1) + "\n"),
        ("report.md", report.markdown(result)),
        ("report.html", report.html(result)),
    ):
        (options.out / name).write_text(content)
    print(report.text(result))
    print(f"\nwritten: {options.out}/report.json, report.md, report.html")
    if result["failed"]:
        sys.exit(f"{len(result['failed'])} failed (named above)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all cases, more slices")
    parser.add_argument(
        "--only", help=f"cases, by commas; `{IDLE}` and `{STARTS}`, too"
    )
    parser.add_argument("--systems", help=f"by commas; known: {', '.join(KINDS)}")
    parser.add_argument("--rounds", type=int, help="slices of each system and case")
    parser.add_argument("--seconds", type=float, help="of a slice")
    parser.add_argument("--queue-size", type=int, default=256, help="of every ring")
    parser.add_argument(
        "--cpus", default="", metavar="N,M", help="to forward on, to generate on"
    )
    parser.add_argument("--out", type=Path, default=_OUT, help="directory to write to")
    parser.add_argument("--vpp", metavar="PATH", help="VPP, where it is not on PATH")
    for name, text in (
        ("--peer", "a switch that listens at $SOCKETS; any number of them"),
        ("--peer-connects", "the same, but it connects to them"),
    ):
        parser.add_argument(
            name, metavar="NAME=COMMAND", action="append", default=[], help=text
        )
    return parser


def _kinds(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> dict[str, Kind]:
    known = dict(KINDS)
    if options.vpp:
        known["vpp"] = vpp_at(options.vpp)
    for given, connects in ((options.peer, False), (options.peer_connects, True)):
        for one in given:
            name, _, command = one.partition("=")
            if not name or not command:
                parser.error(f"cannot use the peer {one!r}: it is not NAME=COMMAND")
            known[name] = by_command(command, guests_listen=connects)
    names = options.systems.split(",") if options.systems else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no such system: {unknown[0]} (known: {', '.join(known)})")
    return {name: known[name] for name in names}


def _cases(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[list[Case], list[str]]:
    """Those of the table, and what else there is to measure."""
    if not options.only:
        others = [IDLE, STARTS] if options.full else [IDLE]
        return [case for case in CASES if case.quick or options.full], others
    names = options.only.split(",")
    known = [*(case.name for case in CASES), IDLE, STARTS]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no such case: {unknown[0]} (known: {', '.join(known)})")
    others = [name for name in (IDLE, STARTS) if name in names]
    return [case for case in CASES if case.name in names], others


def _say(what: str) -> None:
    print(what, file=sys.stderr)


if __name__ == "__main__":
    daemon.end_in_order()
    main()
