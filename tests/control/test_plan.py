"""Addresses and numbers that every worker uses alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswitch.plan import FIRST_NUMBER, AddressPlan, NumberPlan

TIB, HUGE = 1 << 40, 1 << 21
FIRST, END = 16 * TIB, 80 * TIB
# A reservation (length, alignment), or which of the present ones is given back.
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.one_of(st.integers(1, 1 << 30), st.sampled_from([HUGE, TIB, 30 * TIB])),
            st.sampled_from([1, 4096, HUGE, 1 << 30]),
        ),
        st.integers(0, 20),
    ),
    max_size=30,
)


@given(STEPS)
def test_reservations_are_aligned_in_range_and_apart(steps):
    plan, taken = AddressPlan(), {}
    for step in steps:
        if isinstance(step, int):
            if taken:
                addr = sorted(taken)[step % len(taken)]
                plan.give_back(addr)
                del taken[addr]
            continue
        length, alignment = step
        try:
            addr = plan.take(length, alignment)
        except MemoryError:
            assert sum(taken.values()) + length > TIB
            continue
        assert addr % max(alignment, HUGE) == 0
        assert addr >= FIRST
        assert addr + length <= END
        for other, size in taken.items():
            assert addr + length <= other or other + size <= addr
        taken[addr] = length


def test_the_first_gap_that_suffices_is_used_again():
    plan = AddressPlan()
    first, second, third = (plan.take(3 * HUGE) for _ in range(3))
    plan.take(HUGE)
    plan.give_back(first)
    plan.give_back(third)
    assert plan.take(4 * HUGE) > third
    assert plan.take(2 * HUGE) == first
    assert plan.take(HUGE) == first + 2 * HUGE
    assert plan.take(3 * HUGE) == third
    assert second == first + 3 * HUGE


def test_neighbours_do_not_share_a_huge_page():
    plan = AddressPlan()
    assert plan.take(1) + HUGE == plan.take(4096)


def test_the_whole_range_can_be_taken_and_no_more():
    plan = AddressPlan()
    assert plan.take(END - FIRST) == FIRST
    with pytest.raises(MemoryError, match="remove a port"):
        plan.take(1)
    plan.give_back(FIRST)
    assert plan.take(1) == FIRST


def test_only_a_reservations_begin_gives_it_back():
    plan = AddressPlan()
    addr = plan.take(2 * HUGE)
    for wrong in (addr + HUGE, addr - HUGE, addr + 2 * HUGE):
        with pytest.raises(ValueError, match="is not reserved"):
            plan.give_back(wrong)
    plan.give_back(addr)
    with pytest.raises(ValueError, match="is not reserved"):
        plan.give_back(addr)


@given(st.lists(st.one_of(st.none(), st.integers(0, 30)), max_size=60))
def test_the_lowest_free_number_is_taken(steps):
    limit = FIRST_NUMBER + 12
    plan, taken = NumberPlan(limit), set()
    for step in steps:
        if step is not None:
            if taken:
                number = sorted(taken)[step % len(taken)]
                plan.give_back(number)
                taken.remove(number)
            continue
        free = sorted(set(range(FIRST_NUMBER, limit)) - taken)
        if free:
            assert plan.take() == free[0]
            taken.add(free[0])
        else:
            with pytest.raises(OSError, match="ulimit -n"):
                plan.take()
