"""What listings look like: aligned columns, SI units, empty where nothing is.

Pure: values in, lines out. Colours and screen widths are the CLI's business.
"""

import time
from collections.abc import Sequence
from typing import Any, Final

_PREFIXES: Final = ("", "k", "M", "G", "T")
_DROP: Final = "drop"

Row = Sequence[str]


def align(head: Row, rows: Sequence[Row], right: frozenset[int] = frozenset()) -> str:
    """Columns as wide as their longest cell; those numbered in `right` end alike."""
    table = [head, *rows]
    widths = [max(len(row[n]) for row in table) for n in range(len(head))]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def show(answer: dict[str, Any]) -> str:
    """Workers and ports."""
    workers = [
        (
            str(worker["id"]),
            str(worker["pid"]),
            str(worker["cpu"]),
            worker["role"],
            worker["state"],
            f"{worker['busy_percent']:.1f} %",
        )
        for worker in answer["workers"]
    ]
    ports = [
        (
            port["name"],
            port["kind"],
            port["state"],
            _since(port["since"]),
            f"{port['queues']['enabled']}/{port['queues']['max']}",
            port["backend"] or "-",
            "; ".join(filter(None, (port["reason"], port["backend_reason"]))),
        )
        for port in answer["ports"]
    ]
    text = align(
        ("WORKER", "PID", "CPU", "ROLE", "STATE", "BUSY"),
        workers,
        frozenset({0, 1, 2, 5}),
    )
    if not ports:
        return text + "\n\nno ports (add one with: vswitch add-port vm1.sock)"
    head = ("PORT", "KIND", "STATE", "SINCE", "QUEUES", "BACKEND", "REASON")
    return text + "\n\n" + align(head, ports, frozenset({3, 4}))


def fdb(entries: Sequence[dict[str, Any]]) -> str:
    """The forwarding database."""
    if not entries:
        return "no addresses"
    rows = [
        (
            entry["ifname"],
            str(entry["vlan"]) if entry["vlan"] else "-",
            entry["mac"],
            entry["state"],
            "-" if entry["state"] == "static" else _age(entry["age_s"]),
        )
        for entry in entries
    ]
    return align(("PORT", "VLAN", "MAC", "STATE", "AGE"), rows, frozenset({1, 4}))


def stats(answer: dict[str, Any]) -> str:
    """Counters since the start; drops only where there are any."""
    ports = answer["ports"]
    rows = [
        (
            name,
            *(f"{port[counter]:,}" for counter in _TRAFFIC),
            f"{sum(_drops(port).values()):,}",
        )
        for name, port in ports.items()
    ]
    head = ("PORT", *(c.upper().replace("_", " ") for c in _TRAFFIC), "DROPS")
    parts = [align(head, rows, frozenset(range(1, 7)))] if rows else ["no ports"]
    drops = [
        (name, counter, f"{count:,}")
        for name, port in ports.items()
        for counter, count in (_drops(port) | _missed(port)).items()
    ]
    if drops:
        parts.append(align(("PORT", "DROP", "FRAMES"), drops, frozenset({2})))
    workers = [
        (number, f"{worker['frames']:,}", f"{worker['cycles_per_frame']:.0f}")
        for number, worker in answer["workers"].items()
    ]
    head = ("WORKER", "FRAMES", "BUSY CYCLES A FRAME")
    parts.append(align(head, workers, frozenset({0, 1, 2})))
    return "\n\n".join(parts)


def rates(before: dict[str, Any], after: dict[str, Any], seconds: float) -> str:
    """What happened a second between two answers of `stats`."""
    rows = []
    for name, port in after["ports"].items():
        old = before["ports"].get(name, dict.fromkeys(port, 0))
        change = {key: (port[key] - old[key]) / seconds for key in port}
        drops = {key: rate for key, rate in _drops(change).items() if rate > 0}
        worst = max(drops, key=lambda key: drops[key], default="")
        rows.append(
            (
                name,
                f"{si(change['rx_frames'])}/s",
                f"{si(8 * change['rx_bytes'])}b/s",
                f"{si(change['tx_frames'])}/s",
                f"{si(8 * change['tx_bytes'])}b/s",
                f"{si(sum(drops.values()))}/s",
                worst,
            )
        )
    head = ("PORT", "RX FRAMES", "RX", "TX FRAMES", "TX", "DROPS", "MOST OF THEM")
    text = align(head, rows, frozenset(range(1, 6))) if rows else "no ports"
    workers = []
    for number, worker in after["workers"].items():
        old = before["workers"].get(number, dict.fromkeys(worker, 0))
        frames = worker["frames"] - old["frames"]
        busy = worker["busy_cycles"] - old["busy_cycles"]
        workers.append(
            (
                number,
                f"{si(frames / seconds)}/s",
                f"{100 * busy / max(1, worker['cycles_per_s'] * seconds):.1f} %",
                f"{busy / frames:.0f}" if frames > 0 else "-",
            )
        )
    of_workers = ("WORKER", "FRAMES", "BUSY", "CYCLES A FRAME")
    return text + "\n\n" + align(of_workers, workers, frozenset(range(4)))


_TRAFFIC: Final = ("rx_frames", "rx_bytes", "tx_frames", "tx_bytes")


def si(number: float) -> str:
    """Three digits and a prefix: 950, 1.25 k, 38.1 M."""
    step = 0
    while abs(number) >= 999.5 and step < len(_PREFIXES) - 1:
        number /= 1000
        step += 1
    if step == 0:
        return f"{number:.0f} "
    decimals = max(0, 3 - len(f"{abs(number):.0f}"))
    return f"{number:.{decimals}f} {_PREFIXES[step]}"


def _drops(port: dict[str, Any]) -> dict[str, Any]:
    return {name: n for name, n in port.items() if f"_{_DROP}_" in name and n}


def _missed(port: dict[str, Any]) -> dict[str, Any]:
    """Frames that the kernel lost before they came to us, if any."""
    return {"rx_missed": port["rx_missed"]} if port.get("rx_missed") else {}


def _since(moment: float) -> str:
    return _age(max(0, int(time.time() - moment)))


def _age(seconds: int) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
