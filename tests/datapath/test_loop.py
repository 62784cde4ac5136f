"""A worker's turn: fair, accounted for, and able to take over from a dead worker."""

import itertools
import struct

import numpy as np
import pytest

from ports import dispatch
from ports.base import (
    KIND_TAP,
    KIND_VHOST_USER,
    RING_BROKEN,
    RING_RUNNING,
    RING_STARTING,
    RING_STOPPED,
    RINGS_PER_PORT,
)
from tests.datapath.bench import A, B, C
from tests.datapath.rings import START, frame_to
from vswitch.datapath import loop

POSITIONS = ("next_avail", "next_used")


def position(side):
    return tuple(int(side.record[name]) for name in POSITIONS)


# --- a turn ---


def test_a_round_takes_one_burst_of_each_ring(bench):
    a, b, c = bench.guest(A, size=256), bench.guest(B), bench.guest(C)
    c.post(1)
    for i in range(200):
        a.send(frame_to(9, A), index=i)
    b.send(frame_to(9, B))
    assert bench.round() == 64 + 1
    assert (len(a.tx.reap()), len(b.tx.reap())) == (64, 1)
    assert bench.round() == 64


def test_a_ring_that_brought_nothing_is_looked_at_in_its_lane(bench, pair):
    _, b = pair
    bench.round()
    polled = loop.polled_rings(bench.plane.shared, 0)

    def look(number, lanes=8):
        return loop._round(bench.plane.ctx, 0, polled, 0, number, lanes)

    b.send(frame_to(A, B))
    assert [look(number) for number in range(8)] == [0] * 7 + [1]
    # It has brought something, so it is looked at until it brings nothing.
    b.send(frame_to(A, B), index=1)
    assert look(0) == 1
    assert look(0) == 0
    b.send(frame_to(A, B), index=2)
    assert look(0) == 0
    assert look(0, lanes=1) == 1


@pytest.mark.parametrize("idle", [8, 20])
def test_where_many_rings_are_idle_a_turn_still_finds_every_frame(bench, idle):
    a, b = bench.guest(A, size=256), bench.guest(B)
    bench.guest(C)
    bench.round()
    first, second, third = loop.polled_rings(bench.plane.shared, 0)
    polled = np.array([first, *[third] * idle, second])
    for i in range(200):
        a.send(frame_to(9, A), index=i)
    b.send(frame_to(9, B))
    assert loop.poll_turn(bench.plane.ctx, 0, polled, 0, 500_000_000) == 201


@pytest.fixture
def timed_turn(bench, monkeypatch):
    """Make turns by a clock that moves on by one cycle a look."""

    def turn(budget):
        clock = itertools.count()
        monkeypatch.setattr(loop, "rdtsc", lambda: next(clock))
        bench.turn(budget=-1)  # to start rings
        polls = int(bench.plane.shared.workers[0]["polls"])
        polled = loop.polled_rings(bench.plane.shared, 0)
        poll_turn = getattr(loop.poll_turn, "py_func", loop.poll_turn)
        poll_turn(bench.plane.ctx, 0, polled, 0, budget)
        return int(bench.plane.shared.workers[0]["polls"]) - polls

    return turn


def test_a_turn_goes_on_until_its_budget_is_spent(bench, timed_turn):
    a = bench.guest(A, size=256)
    for i in range(200):
        a.send(frame_to(9, A), index=i)
    assert timed_turn(16) == 16
    assert len(a.tx.reap()) == 200


def test_an_idle_turn_ends_after_an_eighth_of_its_budget(bench, timed_turn):
    bench.guest(A)
    assert timed_turn(16) == 2


@pytest.mark.parametrize(
    ("moves", "ring_at", "turns"),
    [([5] * 200, None, 100), ([5, 5, 0, 5], None, 3), ([5] * 9, 4, 4), ([0], 1, 1)],
    ids=["a hundred at most", "until nothing moves", "until somebody rings", "at once"],
)
def test_turns_follow_each_other(bench, monkeypatch, moves, ring_at, turns):
    record = bench.plane.shared.workers[3]
    taken = []

    def poll_turn(_ctx, _worker, _polled, _now_s, _budget):
        taken.append(moves[len(taken)])
        if len(taken) == ring_at:
            record["bell"] += 1
        return taken[-1]

    monkeypatch.setattr(loop, "poll_turn", poll_turn)
    poll_turns = getattr(loop.poll_turns, "py_func", loop.poll_turns)
    polled = np.zeros(0, np.int64)
    assert poll_turns(bench.plane.ctx, 3, polled, 1, record["bell"]) == sum(taken)
    assert len(taken) == turns


def test_a_turn_is_accounted_for(bench, pair):
    a, _ = pair
    a.send(frame_to(B, A))
    bench.round()
    record = bench.plane.shared.workers[0]
    assert (record["turns"], record["polls"], record["frames"]) == (1, 1, 1)
    assert record["busy_cycles"] > 0
    assert record["idle_cycles"] == 0
    busy = int(record["busy_cycles"])
    bench.round()
    assert (record["turns"], record["polls"], record["frames"]) == (2, 2, 1)
    assert record["busy_cycles"] == busy
    assert record["idle_cycles"] > 0


@pytest.mark.parametrize("state", [RING_STOPPED, RING_STARTING, RING_BROKEN])
def test_a_ring_that_does_not_run_is_passed_over(bench, pair, state):
    a, _ = pair
    bench.round()
    polled = loop.polled_rings(bench.plane.shared, 0)
    a.tx.record["state"] = state
    a.send(frame_to(B, A))
    assert loop.poll_turn(bench.plane.ctx, 0, polled, 0, 0) == 0
    assert a.tx.reap() == []


def test_a_kind_without_a_data_path_moves_nothing(bench, pair):
    a, _b = pair
    bench.plane.shared.ports[A]["kind"] = KIND_VHOST_USER + 100
    a.send(frame_to(B, A))
    assert bench.turn() == 0


def test_a_worker_polls_its_own_running_receive_rings_in_order(bench):
    for slot in (B, A):
        bench.guest(slot)
    bench.guest(C).tx.record["owner"] = 1
    bench.round()
    assert list(loop.polled_rings(bench.plane.shared, 0)) == [
        A * RINGS_PER_PORT + 1,
        B * RINGS_PER_PORT + 1,
    ]


# --- start ---


def test_a_ring_starts_where_its_used_index_says(bench):
    a = bench.guest(A)
    for name in POSITIONS:
        a.tx.record[name] = 77
    a.write(a.tx.used, bytes(2))
    assert loop.start_rings(bench.plane.ctx, 0) == 2
    assert a.tx.record["state"] == RING_RUNNING
    assert position(a.tx) == (START, START)
    assert a.read(a.tx.used, 2) == b"\x01\x00"  # no kicks, please


def test_only_the_owner_starts_a_ring_and_only_once(bench):
    a, b = bench.guest(A), bench.guest(B)
    b.tx.record["owner"] = b.rx.record["owner"] = 1
    a.rx.record["state"] = RING_STOPPED
    assert loop.start_rings(bench.plane.ctx, 0) == 1
    assert loop.start_rings(bench.plane.ctx, 0) == 0
    states = [int(side.record["state"]) for side in (a.rx, a.tx, b.rx, b.tx)]
    assert states == [RING_STOPPED, RING_RUNNING, RING_STARTING, RING_STARTING]


def test_a_ring_without_memory_starts_too(bench):
    ring = bench.plane.shared.rings[A * RINGS_PER_PORT + 1]
    bench.plane.shared.ports[A]["kind"] = KIND_TAP
    ring["state"], ring["port"] = RING_STARTING, A
    assert loop.start_rings(bench.plane.ctx, 0) == 1
    assert ring["state"] == RING_RUNNING


# --- sleep ---


def test_only_waiting_rings_of_this_worker_keep_it_awake(bench, pair):
    a, b = pair
    bench.round()
    polled = loop.polled_rings(bench.plane.shared, 0)
    for guest in pair:
        guest.send(frame_to(9, 8))
    ctx = bench.plane.ctx
    assert loop.ask_for_kicks(ctx, 0, polled) == 2
    a.tx.record["owner"] = 1
    assert loop.ask_for_kicks(ctx, 0, polled) == 1
    b.tx.record["state"] = RING_STOPPED
    assert loop.ask_for_kicks(ctx, 0, polled) == 0


def test_kicks_are_asked_for_and_stopped_on_every_ring(bench, pair):
    bench.round()
    polled = loop.polled_rings(bench.plane.shared, 0)
    pair[1].tx.record["owner"] = 1
    for ask, flags in ((loop.ask_for_kicks, 0), (loop.stop_kicks, 1)):
        ask(bench.plane.ctx, 0, polled)
        words = [guest.read(guest.tx.used, 2) for guest in pair]
        assert words == [struct.pack("<H", flags), b"\x01\x00"]


# --- repair ---


def test_frames_that_died_with_a_worker_are_taken_again(bench, pair):
    a, b = pair
    a.send(frame_to(B, A))
    bench.turn()
    shared = bench.plane.shared
    # The worker died after it took a frame and before it gave it back.
    a.send(frame_to(B, A), index=1, offset=0x21000)
    a.tx.record["next_avail"] = (int(a.tx.record["next_avail"]) + 1) & 0xFFFF
    a.tx.record["next_used"] = a.tx.record["next_avail"]
    b.rx.record["lock"] = 1
    for side in (a.rx, a.tx, b.rx, b.tx):
        side.record["owner"] = 3
    assert loop.repair_rings(bench.plane.ctx, 0, 3) == 4
    assert b.rx.record["lock"] == 0
    loop.poll_turn(bench.plane.ctx, 3, loop.polled_rings(shared, 3), 0, 50_000)
    assert a.tx.reap() == [(0, 0), (1, 0)]
    assert len(b.rx.reap()) == 2


@pytest.fixture
def left(bench, pair):
    """Guest B's rings with positions that are wrong; nobody here owns them."""
    _, b = pair
    bench.round()
    for side in (b.rx, b.tx):
        side.record["owner"], side.record["shared"] = 7, 1
        side.record["next_avail"] = side.record["next_used"] = 5
    return b


def test_a_ring_whose_lock_the_dead_held_is_repaired_by_the_heir(bench, left):
    left.rx.record["lock"] = 4 + 1
    assert loop.repair_rings(bench.plane.ctx, 4, 2) == 1
    assert left.rx.record["lock"] == 0
    assert position(left.rx) == (START, START)
    assert position(left.tx) == (5, 5)


def test_a_ring_in_a_live_workers_hands_is_left_alone(bench, left):
    left.rx.record["lock"] = 6
    assert loop.repair_rings(bench.plane.ctx, 4, 2) == 0
    assert left.rx.record["lock"] == 6
    assert position(left.rx) == (5, 5)


def test_a_shared_transmit_ring_is_not_the_heirs_to_repair(bench, left):
    left.rx.record["owner"] = left.tx.record["owner"] = 2
    assert loop.repair_rings(bench.plane.ctx, 4, 2) == 1
    assert position(left.rx) == (5, 5)
    assert position(left.tx) == (START, START)


def test_a_transmit_ring_of_its_own_is(bench, left):
    left.rx.record["owner"], left.rx.record["shared"] = 2, 0
    assert loop.repair_rings(bench.plane.ctx, 4, 2) == 1
    assert position(left.rx) == (START, START)


@pytest.mark.parametrize("state", [RING_STOPPED, RING_STARTING, RING_BROKEN])
def test_a_ring_that_does_not_run_needs_no_repair(bench, left, state):
    left.rx.record["lock"], left.rx.record["state"] = 4 + 1, state
    assert loop.repair_rings(bench.plane.ctx, 4, 2) == 0
    assert position(left.rx) == (5, 5)


def test_a_repaired_ring_calls_first(bench, pair):
    # The dead may have shown frames and not told.
    _, b = pair
    bench.round()
    b.rx.record["signalled_used"] = START
    loop.repair_rings(bench.plane.ctx, 1, 0)
    assert b.rx.record["signalled_used"] == -1


def test_a_taps_rings_hold_nothing_to_repair(bench, pair):
    bench.round()
    bench.plane.shared.ports[A]["kind"] = KIND_TAP
    pair[0].tx.record["used"] = 0  # no memory there
    assert loop.repair_rings(bench.plane.ctx, 1, 0) == 2


def test_the_dead_workers_locks_in_the_fdb_are_freed(bench):
    bench.plane.shared.fdb[5]["lock"] = 4 + 1
    loop.repair_rings(bench.plane.ctx, 4, 2)
    assert bench.plane.shared.fdb[5]["lock"] == 0


def test_warming_up_touches_no_ring(bench, pair):
    a, _ = pair
    bench.round()
    a.send(frame_to(B, A))
    before = bench.plane.shared.rings.copy()
    loop.warm_up(bench.plane.ctx, 0)
    assert bytes(before) == bytes(bench.plane.shared.rings)
    assert a.tx.reap() == []


# --- what a worker is at ---


def test_between_turns_a_worker_says_that_it_is_at_no_ring(bench, pair):
    a, _ = pair
    record = bench.plane.shared.workers[0]
    polled = loop.polled_rings(bench.plane.shared, 0)
    a.send(frame_to(B, A))
    for function in (loop.ask_for_kicks, loop.stop_kicks):
        record["serving"] = 5
        function(bench.plane.ctx, 0, polled)
        assert record["serving"] == 0
    for function in (bench.round, bench.turn):
        record["serving"] = 5
        function()
        assert record["serving"] == 0


def test_a_ring_is_marked_in_the_record_of_the_worker_that_is_at_it(bench):
    dispatch.mark_ring(bench.plane.ctx, 7)
    assert list(bench.plane.shared.workers["serving"][:2]) == [8, 0]
    ctx, _keep = loop.make_context(bench.plane.shared, 1)
    dispatch.mark_ring(ctx, 9)
    assert list(bench.plane.shared.workers["serving"][:2]) == [8, 10]
