"""How often which time came: counts in cells that grow with the time, jitted.

Up to 127 each number has its own cell; above, each doubling has 64 of them, so what is read
back is at most 1/64 below what was noted. Fixed in size, whatever comes.
"""

from typing import Any, Final

import numpy as np

from ports.native import add_u64, jit

_FINE_BITS: Final = 6
_FINE: Final = 1 << _FINE_BITS
_MOST_SHIFT: Final = 40
CELLS: Final = (_MOST_SHIFT + 2) << _FINE_BITS

Cells = np.ndarray[Any, np.dtype[np.int64]]


@jit
def note(cells: int, value: int) -> None:
    """Count `value` at the address of CELLS words; what is below 0 counts as 0."""
    rest = max(value, 0)
    shift = 0
    while rest >= 2 * _FINE and shift < _MOST_SHIFT:
        rest >>= 1
        shift += 1
    cell = (shift << _FINE_BITS) + min(rest, 2 * _FINE - 1)
    add_u64(cells + 8 * cell, 1)


def new() -> Cells:
    """Cells with nothing noted."""
    return np.zeros(CELLS, np.int64)


def percentile(cells: Cells, percent: float) -> float:
    """What `percent` of the values did not exceed, to 1/64; 0 if there are none."""
    total = int(cells.sum())
    if total == 0:
        return 0.0
    rank = max(int(np.ceil(total * percent / 100)), 1)
    return float(_value(int(np.searchsorted(np.cumsum(cells), rank))))


def _value(cell: int) -> int:
    """The least value that is counted in a cell."""
    shift = max((cell >> _FINE_BITS) - 1, 0)
    return (cell - (shift << _FINE_BITS)) << shift
