"""What is said of pairs of slices, and when nothing is."""

import pytest

from bench.judge import TOO_NOISY, Spread, compare, spread, worth_showing
from bench.turns import take_turns
from tests.bench.made_up import slices


def test_a_spread_is_the_median_and_the_quartiles():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_ratio_is_the_median_of_those_of_the_rounds():
    verdict = compare(slices([10, 40, 30]), slices([10, 10, 15]))
    assert verdict.ratio == Spread(2.0, 1.5, 3.0)  # not 30 to 10


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        ([20, 21, 20], [10, 10, 10], "faster"),
        ([10, 10, 10], [20, 21, 20], "slower"),
        ([10, 11, 10, 9], [10, 10, 10, 10], "no difference"),
        ([10, 20, 30, 5], [10, 10, 10, 10], TOO_NOISY),
    ],
)
def test_a_winner_is_named_only_where_the_quartiles_agree(ours, theirs, text):
    assert compare(slices(ours), slices(theirs)).text == text


def test_slices_that_waited_for_a_processor_do_not_count():
    ours = slices([20, 20, 20]) + slices([1], waited=0.5)
    verdict = compare(ours, slices([10, 10, 10, 10]))
    assert (verdict.ratio.median, verdict.pairs) == (2.0, 3)


def test_pairs_in_different_states_do_not_count():
    ours = slices([20, 20]) + slices([5], trip=400) + slices([20])
    verdict = compare(ours, slices([10, 10, 10, 10]))
    assert (verdict.ratio.median, verdict.pairs, verdict.state) == (2.0, 3, "fast")


def test_the_slow_state_is_judged_where_there_was_no_other():
    verdict = compare(slices([9] * 4, trip=400), slices([3] * 4, trip=500))
    assert (verdict.ratio.median, verdict.state) == (3.0, "slow")


def test_too_few_pairs_are_not_judged():
    disturbed = slices([20, 20]) + slices([20, 20], waited=0.2)
    verdict = compare(disturbed, slices([10, 10, 10, 10]))
    assert (verdict.text, verdict.ratio) == (TOO_NOISY, None)


def test_the_best_of_what_there_is_is_shown():
    fast, slow = slices([3]), slices([2], trip=400)
    disturbed = slices([1], waited=0.5)
    assert worth_showing(disturbed + slow + fast) == fast
    assert worth_showing(disturbed + slow) == slow
    assert worth_showing(disturbed) == disturbed


def test_parties_take_turns_and_nobody_always_follows_the_same():
    asked = []

    def measure(party):
        asked.append(party)
        return len(asked)

    assert take_turns(2, ["a", "b", "c"], measure) == [[1, 6], [2, 5], [3, 4]]
    assert asked == ["a", "b", "c", "c", "b", "a"]
