"""The rate without loss: a search with systems whose limit is known, and once for real."""

import json
from types import SimpleNamespace

import pytest

from bench import paced
from bench.__main__ import main
from bench.judge import TOO_NOISY, Spread, compare_rates, compare_times
from bench.peers import Work
from bench.traffic import Load
from tests.bench.made_up import searches
from vswitch.guest.traffic import Totals

MOST = 12.8
STEP = paced._SPAN**0.5**paced._STEPS  # from a rate to the next
FIRST = MOST / paced._SPAN**0.5


class Limited:
    """Streams through a system that loses what is beyond its limit, in Mpps."""

    def __init__(self, limit, generator=100.0, unlucky=()):
        self.system, self.load = SimpleNamespace(name="limited", work=Work), Load()
        self._limit, self._generator, self._unlucky = limit, generator, unlucky
        self.tried = []

    def pace(self, mpps):
        self.tried.append(mpps)

    def send(self, seconds, linger):
        due = round(self.tried[-1] * 1e6 * seconds)
        kept = min(due, round(self._generator * 1e6 * seconds))
        lost = max(kept - round(self._limit * 1e6 * seconds), 0)
        lost += len(self.tried) in self._unlucky
        missed = lost // 2  # at one ring, the rest at the other
        return Totals(
            sent=kept - missed, received=kept - lost, missed=missed, late=due - kept
        )


@pytest.mark.parametrize("limit", [0.15, 3.0, 6.4, 9.99])
def test_the_rate_without_loss_is_found_to_a_step(limit):
    it = Limited(limit)
    found = paced.search(it, MOST, 1.0)
    assert limit / STEP < found.mpps <= limit
    assert found.lossy_mpps == pytest.approx(found.mpps * STEP)
    assert not found.at_least
    assert it.tried[0] == FIRST


def test_one_trial_that_loses_is_not_believed():
    assert paced.search(Limited(6.5, unlucky={1, 2}), MOST, 1.0).mpps > FIRST
    assert paced.search(Limited(6.5, unlucky={1, 2, 3}), MOST, 1.0).mpps < FIRST


def test_a_generator_that_is_too_slow_says_nothing_against_the_system():
    found = paced.search(Limited(9.0, generator=5.0), MOST, 1.0)
    assert 5.0 / STEP < found.mpps <= 5.0 * 1.03
    assert found.at_least


def test_where_all_rates_lose_the_rate_is_none():
    found = paced.search(Limited(0.0), MOST, 1.0)
    assert found.mpps == 0.0
    assert found.lossy_mpps == pytest.approx(MOST / paced._SPAN * STEP)


def test_rates_without_loss_are_judged_as_rates_are():
    verdict = compare_rates(searches([8, 9, 8]), searches([4, 4, 4]))
    assert (verdict.ratio, verdict.text) == (Spread(2.0, 2.0, 2.125), "higher")


@pytest.mark.parametrize(
    ("ours", "text"),
    [
        ([4, 4, 4], "below"),
        ([16, 17, 16], "above"),
        ([8, 8, 8], "no difference"),
        ([1, 4, 7], TOO_NOISY),
        ([1, 2, 4, 7, 7], "below"),  # that many do not agree by chance
        ([1, 2, 4, 9, 9], TOO_NOISY),
    ],
)
def test_times_are_judged_at_half_the_rate(ours, text):
    count = len(ours)
    found = searches([1] * count, ours)
    assert compare_times(found, searches([1] * count, [8] * count)).text == text


def test_searches_that_waited_for_a_processor_do_not_count():
    disturbed = searches([9, 9, 9], [1, 1, 1], waited=0.5)
    assert compare_times(disturbed, searches([9, 9, 9], [8, 8, 8])).text == TOO_NOISY


@pytest.mark.filterwarnings("ignore:subprocess .* is still running")
def test_a_search_and_a_mix_of_lengths_for_real(tmp_path):
    main(
        [
            *("--only", "imix,64-no-loss", "--systems", "vswitch"),
            *("--rounds", "1", "--seconds", "0.1", "--out", str(tmp_path)),
        ]
    )
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["failed"] == {}
    assert result["cases"][0]["slices"]["vswitch"][0]["mpps"] > 0
    (one,) = result["no_loss"][0]["found"]["vswitch"]
    assert one["mpps"] >= 0
    assert list(one["times_us"]) == list(paced.PARTS)
    for median, p99, most in one["times_us"].values():
        assert 0 < median <= p99 <= most
    assert "| 64 bytes without loss, at 50 % |" in (tmp_path / "report.md").read_text()
