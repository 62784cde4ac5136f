"""Whether this switch has become slower: beside a loop of fixed work, and a file.

    python -m bench.baseline [--write] [--file bench/baseline.json]

A figure is a rate divided by that of a loop that no change of ours makes faster, measured
in the same run, so that another machine's baseline still means something. Slices that
waited for a processor, or found the machine in its slow state, are no figures.

Exit status: 0 as fast as before, 1 slower or there is no baseline, 2 too noisy to say.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench import daemon, machine, measure, report
from bench.cases import CASES
from bench.judge import ENOUGH, Spread, is_fast, is_quiet, spread
from bench.machine import Place
from bench.measure import Plan
from bench.peers import KINDS
from bench.traffic import Slice
from vswitch import tables

FILE: Final = Path(__file__).with_name("baseline.json")
TOLERANCE: Final = 0.1
_PLAN: Final = Plan(rounds=7, seconds=0.5)
_ATTEMPTS: Final = 5  # at a case that is too noisy to judge
_GUARDED: Final = ("64", "512", "1500", "64-packed", "64-16-ports")
_SLOWER, _TOO_NOISY = 1, 2

Figures = dict[str, Spread]


def main(arguments: list[str] | None = None) -> None:
    """Measure, then compare or write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make it the baseline")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument(
        "--cpus", default="", metavar="N,M", help="as of python -m bench"
    )
    options = parser.parse_args(arguments)
    if not options.write and not options.file.exists():
        sys.exit(
            f"there is no baseline at {options.file} (write one while nothing else "
            "runs here: python -m bench.baseline --write)"
        )
    try:
        place = machine.place(options.cpus)
    except ValueError as error:
        parser.error(f"cannot use --cpus: {error}")
    now, facts = _measure(place)
    print(report.facts(facts))
    if options.write:
        _write(options.file, now, facts)
    else:
        before = json.loads(options.file.read_text())
        text, status = judge(before["figures"], now)
        print(
            report.facts({f"baseline's {k}": v for k, v in before["machine"].items()})
        )
        print(text)
        sys.exit(status)


def _measure(place: Place) -> tuple[Figures, dict[str, str]]:
    """What can be judged of the guarded cases, and what was the machine."""
    found: Figures = {}
    facts: dict[str, str] = {}
    for _ in range(_ATTEMPTS):
        cases = [case for case in CASES if case.name in {*_GUARDED} - {*found}]
        if not cases:
            break
        result = measure.run(
            {report.OURS: KINDS[report.OURS]},
            cases,
            _PLAN,
            place,
            lambda what: print(what, file=sys.stderr),
            with_idle=False,
        )
        if result["failed"]:
            sys.exit(f"cannot measure: {result['failed']}")
        found |= figures(result)
        facts = result["machine"]
    return found, facts


def figures(result: Mapping[str, Any]) -> Figures:
    """Rate by case, in steps of the reference loop; cases that were too noisy are not in."""
    steps = median(result["reference"])
    found = {}
    for case in result["cases"]:
        slices = [Slice(**one) for one in case["slices"].get(report.OURS, ())]
        good = [one.mpps / steps for one in slices if is_quiet(one) and is_fast(one)]
        if len(good) >= ENOUGH:
            found[case["name"]] = spread(good)
    return found


def judge(
    before: Mapping[str, Sequence[float]], now: Figures, tolerance: float = TOLERANCE
) -> tuple[str, int]:
    """A table, and the exit status.

    Slower is what lost more than the tolerance even by its upper quartile.
    """
    rows, statuses = [], set()
    for name, values in before.items():
        old = Spread(*values)
        if name not in now:
            statuses.add(_TOO_NOISY)
            rows.append((name, f"{old.median:.4f}", "", "", "too noisy to judge"))
            continue
        ratio = now[name].median / old.median
        slower = now[name].high < (1 - tolerance) * old.median
        statuses.add(_SLOWER if slower else 0)
        rows.append(
            (
                *(name, f"{old.median:.4f}", f"{now[name].median:.4f}"),
                *(f"{ratio:.2f}", "slower" if slower else "as before"),
            )
        )
    head = ("case", "baseline", "now", "ratio", "")
    status = _SLOWER if _SLOWER in statuses else max(statuses, default=_TOO_NOISY)
    return tables.align(head, rows, frozenset({1, 2, 3})), status


def _write(file: Path, now: Figures, facts: Mapping[str, str]) -> None:
    if missing := [name for name in _GUARDED if name not in now]:
        print(f"no baseline written: {', '.join(missing)} too noisy", file=sys.stderr)
        sys.exit(_TOO_NOISY)
    content = {"machine": facts, "figures": now}
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {file}")


if __name__ == "__main__":
    daemon.end_in_order()
    main()
