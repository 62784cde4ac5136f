"""What is a hang and what is not, by what was seen of a worker."""

import pytest

from vswitch.watch import LONGEST_S, PERIOD_S, Account, Seen, Thread

LOOKS = int(LONGEST_S / PERIOD_S)


def looks(account, count, *, state, cpu=0.0, turns=0, asleep=False, held_up=False):
    """Look so often at a worker that gets `cpu` of each period; whether it hangs."""
    hangs = False
    for _ in range(count):
        last = account._last
        now_s = last.now_s + PERIOD_S if last else 100.0
        cpu_s = last.thread.cpu_s + cpu * PERIOD_S if last else 7.0
        seen = Seen(now_s, asleep, Thread(state, cpu_s), held_up)
        account.turned(account._turns + turns)
        hangs = account.note(seen)
    return hangs


def begin(state="R"):
    account = Account()
    assert account.turned(5)
    assert not looks(account, 1, state=state)
    return account


@pytest.mark.parametrize(
    ("state", "cpu"), [("R", 1.0), ("S", 0.0), ("D", 0.0), ("T", 0.0), ("t", 0.0)]
)
def test_whoever_had_half_a_second_and_made_no_turn_hangs(state, cpu):
    account = begin(state)
    assert not looks(account, LOOKS - 1, state=state, cpu=cpu)
    assert looks(account, 2, state=state, cpu=cpu)


def test_whoever_makes_turns_does_not():
    for state in "RSDT":
        assert not looks(begin(), 20 * LOOKS, state=state, cpu=1.0, turns=1)


def test_whoever_waits_for_a_cpu_does_not():
    assert not looks(begin(), 1000 * LOOKS, state="R")


def test_a_cpu_that_is_shared_with_many_is_counted_for_what_it_gave():
    account = begin()
    assert not looks(account, 4 * LOOKS - 1, state="R", cpu=0.25)
    assert looks(account, 2, state="R", cpu=0.25)


def test_whoever_sleeps_does_not_unless_it_was_stopped():
    assert not looks(begin(), 1000 * LOOKS, state="S", asleep=True)
    account = begin("T")
    assert looks(account, LOOKS + 1, state="T", asleep=True)
    assert account.is_stopped
    assert looks(begin(), LOOKS + 1, state="R", cpu=1.0, asleep=True)


def test_whoever_may_wait_for_a_thread_without_a_cpu_does_not():
    for state in "SD":
        assert not looks(begin(state), 1000 * LOOKS, state=state, held_up=True)


def test_work_and_waiting_add_up_and_a_turn_clears_both():
    account = begin()
    assert not looks(account, LOOKS // 2, state="R", cpu=1.0)
    assert not looks(account, LOOKS // 2 - 1, state="D")
    assert not looks(account, 1, state="R", turns=1)
    assert not looks(account, LOOKS - 1, state="R", cpu=1.0)
    assert looks(account, 2, state="R", cpu=1.0)
    assert f"on a CPU for {LONGEST_S:.1f}" in str(account)
    assert "state R (running)" in str(account)


def test_what_passes_while_nobody_looks_is_held_against_nobody():
    for state, cpu_s in (("R", 60.0), ("T", 0.0)):
        account = begin(state)
        last = account._last
        late = last._replace(
            now_s=last.now_s + 60, thread=Thread(state, last.thread.cpu_s + cpu_s)
        )
        assert not account.note(late)
        assert not looks(account, LOOKS - 3, state=state, cpu=0.9)


def test_whoever_has_turned_is_not_even_looked_at():
    account = begin()  # it has turned, says this
    assert not looks(account, LOOKS // 2, state="R", cpu=1.0)
    assert not account.turned(5)
    assert account.turned(6)
    assert not looks(account, LOOKS, state="R", cpu=1.0)
    assert looks(account, 2, state="R", cpu=1.0)


def test_whoever_sleeps_is_looked_at_twice_a_second():
    account = begin()
    assert not account.rests(asleep=True)  # by its own account alone
    assert not looks(account, 1, state="S", asleep=True)
    periods = int(0.5 / PERIOD_S)
    rested = [account.rests(asleep=True) for _ in range(periods)]
    assert rested == [True] * (periods - 1) + [False]


def test_whoever_is_awake_or_was_stopped_does_not_rest():
    account = begin()
    for asleep, state in ((False, "S"), (True, "T")):
        assert not looks(account, 1, state="S", asleep=True)
        assert not looks(account, 1, state=state, asleep=asleep)
        assert not account.rests(asleep=True)
    assert not looks(account, 1, state="S", asleep=True)
    assert not account.rests(asleep=False)
    assert not account.rests(asleep=True)
