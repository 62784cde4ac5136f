"""Counts in cells: what is read back is what was noted, to 1/64."""

import numpy as np
import pytest

from vswitch.guest import histogram


def noted(values):
    cells = histogram.new()
    for value in values:
        histogram.note(int(cells.ctypes.data), int(value))
    return cells


@pytest.mark.parametrize("scale", [10, 1000, 10**6, 10**10])
@pytest.mark.parametrize("percent", [0, 50, 90, 99, 99.9, 100])
def test_a_percentile_is_that_of_the_values_to_a_64th(scale, percent):
    values = np.random.default_rng(scale).gamma(2, scale, 2003).astype(np.int64)
    truth = np.percentile(values, percent, method="inverted_cdf")
    found = histogram.percentile(noted(values), percent)
    assert truth * 63 / 64 - 1 <= found <= truth


def test_every_value_is_counted_once_in_a_cell_of_its_own_size():
    for value in (0, 1, 127, 128, 129, 255, 256, 12_345, (1 << 46) - 1):
        cells = noted([value])
        assert cells.sum() == 1
        assert value * 63 / 64 <= histogram.percentile(cells, 50) <= value


def test_what_is_out_of_range_is_in_the_last_cell_of_that_end():
    cells = noted([-5, 1 << 62])
    assert (cells[0], cells[-1]) == (1, 1)


def test_of_nothing_there_is_nothing():
    assert histogram.percentile(histogram.new(), 50) == 0.0
