"""What is due by a worker's clock, and the alarm that ends what waits."""

import signal
import time

import pytest

from vswitch.datapath import clock, fdb

A = 1
AGEING_S = 300
DUE_S = 8  # until all of the fdb was looked through


@pytest.fixture
def learned(plane):
    for key in range(1, 51):
        fdb.learn(plane.ctx, key << 1, A, 0, 0, plane.tally(A))
    return plane


def let_pass(plane, seconds):
    """As if the fdb had been looked through so long ago."""
    clock.clock_at(int(plane.ctx["clock"]), 0)["aged_ns"] = (
        time.monotonic_ns() - seconds * 10**9
    )


def test_as_much_of_the_fdb_ages_as_is_due(learned):
    cleared = []
    for _ in range(DUE_S):
        let_pass(learned, 1)
        clock.age(learned.ctx, 0, AGEING_S + 5)
        cleared.append(int(learned.tally(A)["fdb_expired"]))
    assert cleared == sorted(cleared)
    assert 0 < cleared[0] < cleared[3] < cleared[-1] == 50


def test_time_that_was_slept_through_is_a_second_of_work_at_most(learned):
    let_pass(learned, 10**6)
    clock.age(learned.ctx, 0, AGEING_S + 5)
    assert 0 < learned.tally(A)["fdb_expired"] < 25


def test_nothing_ages_twice_at_once_nor_by_another_worker(learned):
    let_pass(learned, 0)
    clock.age(learned.ctx, 0, AGEING_S + 5)
    let_pass(learned, 1)
    clock.age(learned.ctx, 1, AGEING_S + 5)
    assert learned.tally(A)["fdb_expired"] == 0


def test_seconds_are_those_since_the_switch_started(plane):
    plane.shared.header["started_ns"] = time.monotonic_ns() - 7 * 10**9
    assert clock.elapsed_s(plane.ctx) == 7


def test_the_alarm_comes_again_and_again_until_it_is_stopped(plane):
    before = signal.getitimer(signal.ITIMER_REAL)  # this test's own deadline
    try:
        clock.let_alarm_come(plane.ctx, 900_000)
        clock.start_alarm(plane.ctx)
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < left <= 0.9005
        assert interval == 0.9
        clock.stop_alarm(plane.ctx)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
