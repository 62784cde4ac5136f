"""A result as tables and plots: for the terminal, as Markdown, as one HTML file.

All of it is made of what is in the JSON file, so an old one can be shown again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final, NamedTuple

from bench import plot
from bench.judge import (
    TOO_NOISY,
    Figure,
    Spread,
    Verdict,
    compare,
    compare_rates,
    compare_times,
    is_fast,
    is_quiet,
    ratios,
    spread,
    worth_showing,
)
from bench.paced import HALF, P99, PARTS, PERCENTILES, Paced
from bench.traffic import Slice
from vswitch import tables

OURS: Final = "vswitch"
_DISTURBED: Final = "~"
_PAIRED: Final = "(median of paired searches, quartiles)"
Result = Mapping[str, Any]


class Table(NamedTuple):
    """One of the report's; cells after the first are figures."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def facts(said: Mapping[str, str]) -> str:
    """What figures have to be read with, a line each."""
    return "\n".join(f"{name}: {value}" for name, value in said.items())


def text(result: Result) -> str:
    """For the terminal."""
    parts = ["\n".join(_facts(result))]
    for table in _tables(result):
        right = frozenset(range(1, len(table.head)))
        parts.append(
            f"{table.title}\n{tables.align(table.head, table.rows, right)}",
        )
    return "\n\n".join(parts)


def markdown(result: Result) -> str:
    """The same for a document."""
    parts = ["# Measured beside peers", "\n".join(f"- {f}" for f in _facts(result))]
    for table in _tables(result):
        lines = [table.head, ("---",) + ("---:",) * (len(table.head) - 1), *table.rows]
        rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"## {table.title}\n\n{rows}")
    return "\n\n".join(parts) + "\n"


def html(result: Result) -> str:
    """One file that needs no other, with plots."""
    items = "".join(f"<li>{escape(fact)}</li>" for fact in _facts(result))
    parts = [f"<h1>Measured beside peers</h1><ul>{items}</ul>", *_plots(result)]
    for table in _tables(result):
        head = _html_row(table.head, "th")
        rows = "".join(_html_row(row, "td") for row in table.rows)
        parts.append(f"<h2>{escape(table.title)}</h2><table>{head}{rows}</table>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        "<title>vswitch beside its peers</title><style>"
        "body{font-family:sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right}"
        "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f4f4f4}"
        "</style>\n" + "\n".join(parts) + "\n</html>\n"
    )


def verdicts(case: Mapping[str, Any]) -> dict[str, Verdict]:
    """What a case says of this switch beside each other one."""
    slices = _slices(case["slices"])
    if OURS not in slices:
        return {}
    return {
        name: compare(slices[OURS], theirs)
        for name, theirs in slices.items()
        if name != OURS
    }


# --- tables -------------------------------------------------------------------------


def _facts(result: Result) -> Iterator[str]:
    yield from facts(result["machine"] | result["versions"]).splitlines()
    plan = result["plan"]
    yield (
        f"{plan['rounds']} rounds of {plan['seconds']:g} s, rings of "
        f"{plan['queue_size']}, one forwarding thread each, in turns"
    )
    yield (
        f"{_DISTURBED} before a figure: no slice of it was undisturbed, all waited for a "
        "processor"
    )
    for name, reason in result["left_out"].items():
        yield f"{name} is left out: {reason}"
    for name, reason in result["failed"].items():
        yield f"failed: {name}: {reason}"


def _tables(result: Result) -> Iterator[Table]:
    return (table for table in _all_tables(result) if table.rows)


def _all_tables(result: Result) -> Iterator[Table]:
    names = list(result["versions"])
    peers = [name for name in names if name != OURS]
    yield Table(
        "Million frames a second (median of slices, quartiles)",
        ("case", *names),
        [_row(case, names, _rate) for case in result["cases"]],
    )
    if OURS in names and peers:
        yield Table(
            f"How many times as fast {OURS} is (median of paired slices, quartiles)",
            ("case", *peers),
            [_ratio_row(case, peers) for case in result["cases"]],
        )
    if any(case["slices_beside"] for case in result["cases"]):
        yield Table(
            "Within one system: to plain 64 or 512 bytes of the same rounds",
            ("case", *names),
            [
                (case["title"], *(_verdict_text(v) for v in _own(case, names)))
                for case in result["cases"]
                if case["slices_beside"]
            ],
        )
    yield Table(
        "Busy cycles a frame, by each system's own account",
        ("case", *names),
        [_row(case, names, _cycles) for case in result["cases"]],
    )
    yield Table(
        "Frames lost, as a part of those sent",
        ("case", *names),
        [_row(case, names, _lost) for case in result["cases"]],
    )
    if searched := result.get("no_loss"):
        yield from _no_loss_tables(searched, names, peers)
    if result["idle"]:
        yield _idle_table(result)
    if first_frames := result.get("first_frames"):
        yield _first_frames_table(first_frames)
    if tcp := result.get("tcp"):
        yield _tcp_table(tcp)
    if taps := result.get("taps"):
        yield Table(
            "From one tap to another, or on a bridge from one veth pair to another",
            ("way", "TCP, Gb/s", "60 bytes, Mpps"),
            [
                (name, str(spread(one["tcp"])), str(spread(one["small"])))
                for name, one in taps.items()
            ],
        )
    yield Table(
        "How the machine was",
        (
            "case",
            "slices",
            "undisturbed",
            "of those in the fast state",
            "round trip, ns",
        ),
        [
            *(
                _state_row(case["title"], _slices(case["slices"]))
                for case in result["cases"]
            ),
            *(
                _state_row(case["title"], _searches(case))
                for case in result.get("no_loss", [])
            ),
        ],
    )


def _row(
    case: Mapping[str, Any], names: Sequence[str], cell: Callable[[list[Slice]], str]
) -> tuple[str, ...]:
    slices = _slices(case["slices"])
    cells = (_marked(slices.get(n, []), cell) for n in names)
    return (case["title"], *cells)


def _marked(slices: list[Figure], cell: Callable[[list[Figure]], str]) -> str:
    if not slices:
        return ""
    shown = worth_showing(slices)
    mark = "" if all(map(is_quiet, shown)) else _DISTURBED
    text = cell(shown)
    return text and mark + text


def _rate(slices: Sequence[Slice]) -> str:
    return str(spread([one.mpps for one in slices]))


def _cycles(slices: Sequence[Slice]) -> str:
    known = [one.cycles for one in slices if one.cycles is not None]
    return f"{spread(known).median:.0f}" if known else ""


def _lost(slices: Sequence[Slice]) -> str:
    part = spread([one.lost for one in slices]).median
    again = spread([one.reordered or 0.0 for one in slices]).median
    return f"{part:.2%}" + (f", {again:.2%} out of order" if again else "")


def _no_loss_tables(
    cases: Sequence[Mapping[str, Any]], names: Sequence[str], peers: Sequence[str]
) -> Iterator[Table]:
    """Of the cases of `bench.paced`."""
    searches = [(case["title"], _searches(case)) for case in cases]
    yield Table(
        "Million frames a second without loss (median of searches, quartiles)",
        ("case", *names),
        [
            (title, *(_marked(found.get(name, []), _no_loss_rate) for name in names))
            for title, found in searches
        ],
    )
    percents = ", ".join(f"{percent:g} %" for percent in PERCENTILES)
    yield Table(
        "Microseconds from when a frame is due to when it is there, at parts of a "
        f"system's own rate without loss: {percents}",
        ("case", *names),
        [
            (
                f"{title}, at {part} %",
                *(_marked(found.get(n, []), _times_at(part)) for n in names),
            )
            for title, found in searches
            for part in PARTS
        ],
    )
    if OURS not in names:
        return
    yield Table(
        f"How many times as high {OURS}'s rate without loss is {_PAIRED}",
        ("case", *peers),
        [(title, *_judged(found, peers, compare_rates)) for title, found in searches],
    )
    yield Table(
        f"How many times as long {PERCENTILES[P99]:g} % of {OURS}'s frames take at most, "
        f"each system at {HALF} % of its own rate without loss {_PAIRED}",
        ("case", *peers),
        [(title, *_judged(found, peers, compare_times)) for title, found in searches],
    )


def _judged(
    found: Mapping[str, list[Paced]],
    peers: Sequence[str],
    judge: Callable[[list[Paced], list[Paced]], Verdict],
) -> Iterator[str]:
    for name in peers:
        both = OURS in found and name in found
        yield _verdict_text(judge(found[OURS], found[name]) if both else None)


def _searches(case: Mapping[str, Any]) -> dict[str, list[Paced]]:
    return {
        name: [Paced(**one) for one in some] for name, some in case["found"].items()
    }


def _no_loss_rate(searches: Sequence[Paced]) -> str:
    mark = "at least " if any(one.at_least for one in searches) else ""
    return mark + str(spread([one.mpps for one in searches]))


def _times_at(part: str) -> Callable[[Sequence[Paced]], str]:
    def cell(searches: Sequence[Paced]) -> str:
        columns = zip(*(one.times_us[part] for one in searches), strict=True)
        return ", ".join(f"{spread(column).median:.1f}" for column in columns)

    return cell


def _idle_table(result: Result) -> Table:
    found = {
        name: one | {"start_s": result["starts"][name]}
        for name, one in result["idle"].items()
    }
    return Table(
        "With two guests that send nothing",
        ("", *found),
        [(what, *map(cell, found.values())) for what, cell in _IDLE.items()],
    )


def _times(one: tuple[float, float]) -> str:
    median, most = one
    return f"{median:.1f}, {most:.1f}"


def _round_cycles(idle: Mapping[str, Any]) -> str:
    cycles = idle["round_cycles"]
    return "" if cycles is None else f"{cycles:.0f}"


_IDLE: Final[dict[str, Callable[[Mapping[str, Any]], str]]] = {
    "CPU": lambda one: f"{one['cpu_percent']:.1f} %",
    "memory": lambda one: f"{one['memory_mib']:.0f} MiB",
    "start until its ports are there": lambda one: f"{one['start_s']:.1f} s",
    "a single frame, us: median, 99 %": lambda one: _times(one["single_us"]),
    "after 20 ms of silence, us: median, 99 %": lambda one: _times(one["wake_us"]),
    "cycles a round": _round_cycles,
}


def _first_frames_table(found: Mapping[str, Mapping[str, list[float]]]) -> Table:
    """Of `bench.starts`."""
    warm, cold = found["warm"], found["cold"]
    names = [*warm, *(name for name in cold if name not in warm)]
    rows = [
        ("with what it keeps from earlier ones", warm, ""),
        ("without", cold, "keeps nothing"),
    ]
    return Table(
        "Seconds from starting a system to its first frame, from guest to guest",
        ("", *names),
        [
            (what, *(str(spread(by[name])) if name in by else none for name in names))
            for what, by, none in rows
        ]
        if names
        else [],
    )


def _tcp_table(cases: Sequence[Mapping[str, Any]]) -> Table:
    """Of the cases of `bench.tcp`."""
    by_rings: dict[str, dict[bool, list[float]]] = {}
    for case in cases:
        rates = [one["gbps"] for one in case["slices"]]
        by_rings.setdefault(case["rings"], {})[case["offloads"]] = rates
    return Table(
        f"TCP between two real guests (interpreted ones) by {OURS}, Gb/s",
        ("rings", "with offloads", "without", "times"),
        [
            (
                rings,
                *(str(spread(rates[offloads])) for offloads in (True, False)),
                str(ratios(rates[True], rates[False])),
            )
            for rings, rates in by_rings.items()
        ],
    )


def _ratio_row(case: Mapping[str, Any], peers: Sequence[str]) -> tuple[str, ...]:
    found = verdicts(case)
    cells = (_verdict_text(found[name]) if name in found else "" for name in peers)
    return (case["title"], *cells)


def _own(case: Mapping[str, Any], names: Sequence[str]) -> Iterator[Verdict | None]:
    slices, beside = _slices(case["slices"]), _slices(case["slices_beside"])
    for name in names:
        both = name in slices and name in beside
        yield compare(slices[name], beside[name]) if both else None


def _verdict_text(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    if verdict.ratio is None:
        return verdict.text
    state = "" if verdict.state == "fast" else f", {verdict.state} state"
    return f"{verdict.ratio}, {verdict.pairs} pairs{state}: {verdict.text}"


def _state_row(title: str, by_system: Mapping[str, list[Figure]]) -> tuple[str, ...]:
    slices = [one for some in by_system.values() for one in some]
    quiet = [one for one in slices if is_quiet(one)]
    fast = sum(is_fast(one) for one in quiet)
    trips = (
        f"{spread([one.round_trip_ns for one in slices]).median:.0f}" if slices else ""
    )
    return (title, str(len(slices)), str(len(quiet)), str(fast), trips)


def _slices(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[Slice]]:
    return {name: [Slice(**one) for one in some] for name, some in rows.items()}


# --- plots --------------------------------------------------------------------------


def _plots(result: Result) -> Iterator[str]:
    titles = [case["title"] for case in result["cases"]]
    peers = [name for name in result["versions"] if name != OURS]
    ordered = [name for name in result["versions"] if name == OURS] + peers
    rates: dict[str, dict[str, Spread]] = {name: {} for name in ordered}
    ratios: dict[str, dict[str, Spread]] = {name: {} for name in peers}
    for case in result["cases"]:
        for name, slices in _slices(case["slices"]).items():
            shown = [one.mpps for one in worth_showing(slices)]
            rates[name][case["title"]] = spread(shown)
        for name, verdict in verdicts(case).items():
            if verdict.ratio is not None and verdict.text != TOO_NOISY:
                ratios[name][case["title"]] = verdict.ratio
    if any(rates.values()):
        yield plot.bars("Rate", titles, rates, "Mpps")
    if any(ratios.values()):
        title = f"How many times as fast {OURS} is; what was too noisy is not here"
        yield plot.bars(title, titles, ratios, "times", first_colour=1)
    if searched := result.get("no_loss"):
        yield from _no_loss_plots(searched, ordered)


def _no_loss_plots(
    cases: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Iterator[str]:
    """Rates without loss, and the times that are judged."""
    figures: dict[str, Callable[[Paced], float]] = {
        "Mpps": lambda one: one.mpps,
        "us": lambda one: one.times_us[HALF][P99],
    }
    titles = {
        "Mpps": "Rate without loss",
        "us": f"What {PERCENTILES[P99]:g} % of frames take at most at {HALF} % of it",
    }
    for unit, figure in figures.items():
        series: dict[str, dict[str, Spread]] = {name: {} for name in names}
        for case in cases:
            for name, searches in _searches(case).items():
                shown = [figure(one) for one in worth_showing(searches)]
                series[name][case["title"]] = spread(shown)
        yield plot.bars(titles[unit], [c["title"] for c in cases], series, unit)


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"
