"""Bars as SVG, without a library: one group a row, one bar a series, whiskers around it."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from bench.judge import Spread

_COLOURS: Final = ("#2f6fb0", "#d9822b", "#5a9e4b", "#a05195", "#7f7f7f")
_BAR: Final = 14
_GAP: Final = 12
_LABELS: Final = 240  # pixels for the groups' names
_VALUES: Final = 220
_WIDE: Final = 360
_TOP: Final = 26


def bars(
    title: str,
    groups: Sequence[str],
    series: Mapping[str, Mapping[str, Spread]],
    unit: str,
    first_colour: int = 0,
) -> str:
    """Draw them.

    Args:
        title: What it shows.
        groups: Names of groups, from top to bottom.
        series: By its name, a spread for some of the groups; negative ones cannot be.
        unit: Of the values.
        first_colour: Number of the first series' colour.
    """
    most = max(
        (value.high for values in series.values() for value in values.values()),
        default=0.0,
    )
    scale = _WIDE / most if most else 0.0
    colours = {
        name: _COLOURS[number % len(_COLOURS)]
        for number, name in enumerate(series, first_colour)
    }
    drawn, y = _legend(colours), _TOP * 2
    for group in groups:
        begin = y
        for name, colour in colours.items():
            if group in series[name]:
                drawn += _bar(series[name][group], y, scale, colour, unit)
                y += _BAR
        if y > begin:
            drawn.append(_text(_LABELS - 8, (begin + y) / 2 + 4, group, "end"))
            y += _GAP
    width = _LABELS + _WIDE + _VALUES
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" '
        f'viewBox="0 0 {width} {y}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, _text(0, 16, title, "start", bold=True), *drawn, "</svg>"])


def _legend(colours: Mapping[str, str]) -> list[str]:
    drawn, x = [], _LABELS
    for name, colour in colours.items():
        drawn.append(_rectangle(x, _TOP, 10, 10, colour))
        drawn.append(_text(x + 14, _TOP + 10, name, "start"))
        x += 24 + 7 * len(name)
    return drawn


def _bar(value: Spread, y: float, scale: float, colour: str, unit: str) -> list[str]:
    middle = y + _BAR / 2
    low, high = _LABELS + value.low * scale, _LABELS + value.high * scale
    return [
        _rectangle(_LABELS, y + 1, value.median * scale, _BAR - 2, colour),
        f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#222" stroke-width="1.5"/>',
        _text(high + 6, middle + 4, f"{value} {unit}", "start"),
    ]


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{colour}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>'
        f"{escape(text)}</text>"
    )
