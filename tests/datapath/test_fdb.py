"""The forwarding database against a dict, and its limits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.datapath.conftest import Plane, make_shared
from vswitch.datapath import fdb, loop
from vswitch.records import FDB_BUCKETS

AGEING_S = 300


def learn(plane, key, port, now_s=0):
    return fdb.learn(plane.ctx, key, port, 0, now_s, plane.tally(port))


def lookup(plane, key, now_s=0):
    seed = int(plane.shared.header[0]["hash_seed"])
    bucket = fdb.bucket_of(int(plane.ctx["fdb"]), seed, key)
    return fdb.lookup(bucket, key, now_s, AGEING_S)


def addresses(plane, port):
    return int(plane.shared.ports[port]["addresses"])


def test_a_learned_address_is_found_until_it_ages(plane):
    learn(plane, 0xAA, 3, now_s=10)
    assert lookup(plane, 0xAA, 10 + AGEING_S - 1) == 3
    assert lookup(plane, 0xAA, 10 + AGEING_S) == fdb.NOT_FOUND
    assert addresses(plane, 3) == 1


def test_seeing_an_address_again_keeps_it_young(plane):
    learn(plane, 0xAA, 3, now_s=10)
    learn(plane, 0xAA, 3, now_s=200)
    assert lookup(plane, 0xAA, 400) == 3
    assert plane.tally(3)["fdb_learned"] == 1


def test_a_move_is_followed_and_counted(plane):
    learn(plane, 0xAA, 3)
    learn(plane, 0xAA, 4)
    assert lookup(plane, 0xAA) == 4
    assert plane.tally(4)["fdb_moved"] == 1
    assert (addresses(plane, 3), addresses(plane, 4)) == (0, 1)


def test_it_says_whether_an_address_was_news(plane):
    assert learn(plane, 0xAA, 3) == 1
    assert learn(plane, 0xAA, 3) == 0
    assert learn(plane, 0xAA, 4) == 1
    assert learn(plane, 0xAA, 4, now_s=200) == 1
    fdb.set_static(plane.ctx, 0xBB, 5)
    assert [learn(plane, 0xBB, port) for port in (3, 5)] == [0, 0]


def test_a_static_entry_neither_moves_nor_ages(plane):
    assert fdb.set_static(plane.ctx, 0xAA, 5) == 1
    learn(plane, 0xAA, 3)
    assert lookup(plane, 0xAA, 10 * AGEING_S) == 5
    assert addresses(plane, 5) == addresses(plane, 3) == 0
    assert fdb.remove(plane.ctx, 0xAA) == 1
    assert lookup(plane, 0xAA) == fdb.NOT_FOUND


def test_flushing_a_port_leaves_the_others(plane):
    for key in range(1, 101):
        learn(plane, key, key % 2)
    fdb.set_static(plane.ctx, 1000, 1)
    assert fdb.flush(plane.ctx, 1, 1, 0, FDB_BUCKETS) == 51
    assert [lookup(plane, key) for key in (1, 1000, 2)] == [-1, -1, 0]
    assert addresses(plane, 1) == 0
    assert fdb.flush(plane.ctx, -1, 0, 0, FDB_BUCKETS) == 50
    assert addresses(plane, 0) == 0


def test_a_port_at_its_limit_learns_no_more_than_that(plane):
    plane.shared.ports[2]["max_addresses"] = 100
    for key in range(1, 1001):
        learn(plane, key << 1, 2)
    assert addresses(plane, 2) == 100
    assert plane.tally(2)["fdb_refused"] > 0


def test_a_guest_that_invents_addresses_cannot_push_out_others(plane):
    victims = [0x10_0000 + 2 * i for i in range(500)]
    for key in victims:
        learn(plane, key, 1)
    for port in range(2, 8):
        plane.shared.ports[port]["max_addresses"] = 1 << 17
        for key in range(port << 32, (port << 32) + 40000, 2):
            learn(plane, key, port)
    assert [lookup(plane, key) for key in victims] == [1] * 500


def test_in_a_full_bucket_a_port_pushes_out_its_own_address_first(plane):
    # It pushed out whoever's stood first, where nobody owned more than one.
    plane.shared.header[0]["hash_seed"] = 1  # one bucket for all
    keys = range(1, 8)
    for key in keys[:5]:
        learn(plane, key, port=key)
    learn(plane, 6, port=5)
    assert [lookup(plane, key) for key in keys] == [1, 2, 3, 4, -1, 5, -1]
    learn(plane, 5, port=4)
    assert [lookup(plane, key) for key in keys] == [1, 2, 3, -1, 4, 5, -1]


def test_in_a_full_bucket_a_newcomer_takes_from_who_owns_most(plane):
    plane.shared.header[0]["hash_seed"] = 1
    for now_s, (key, port) in enumerate([(1, 1), (2, 2), (3, 2), (4, 3), (5, 4)]):
        learn(plane, key, port, now_s)
    learn(plane, 6, 5, now_s=10)
    assert [lookup(plane, key, 10) for key in range(1, 7)] == [1, -1, 2, 3, 4, 5]


def test_key_zero_is_never_found(plane):
    learn(plane, 2, 1)
    fdb.warm_up(plane.ctx)  # leaves the value of an entry behind in an empty way
    assert lookup(plane, 0) == fdb.NOT_FOUND


def test_64_ki_addresses_are_remembered(plane):
    plane.shared.ports[1]["max_addresses"] = 1 << 16
    keys = (np.arange(1 << 16, dtype=np.int64) << 1) | 0x5400 << 32
    for key in keys:
        learn(plane, int(key), 1)
    found = sum(lookup(plane, int(key)) == 1 for key in keys)
    # A bucket has five ways: a handful of addresses per 64 Ki share one of six.
    assert found >= len(keys) - 32


def test_expiry_returns_what_a_port_used_of_its_limit(plane):
    for key in range(1, 51):
        learn(plane, key, 1, now_s=0)
    begin = 0
    for _ in range(16):
        begin = fdb.expire(plane.ctx, begin, 1 << 13, 0, AGEING_S + 5)
    assert begin == 0
    assert addresses(plane, 1) == 0
    assert plane.tally(1)["fdb_expired"] == 50


def test_the_stamp_survives_its_wrap(plane):
    wrap = 1 << 21
    learn(plane, 0xAA, 3, now_s=wrap - 5)
    assert lookup(plane, 0xAA, wrap + 5) == 3
    assert lookup(plane, 0xAA, wrap - 5 + AGEING_S) == fdb.NOT_FOUND


def test_the_locks_of_a_dead_worker_are_freed(plane):
    plane.shared.fdb[7]["lock"] = 4
    plane.shared.fdb[9]["lock"] = 2
    assert fdb.free_locks(plane.ctx, 3) == 1
    assert plane.shared.fdb[7]["lock"] == 0
    assert plane.shared.fdb[9]["lock"] == 2


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("learn"), st.integers(1, 40), st.integers(0, 3)),
        st.tuples(st.just("static"), st.integers(1, 40), st.integers(0, 3)),
        st.tuples(st.just("remove"), st.integers(1, 40), st.just(0)),
        st.tuples(st.just("flush"), st.just(0), st.integers(0, 3)),
        st.tuples(st.just("wait"), st.integers(1, 200), st.just(0)),
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def reused():
    shared = make_shared()
    ctx, keep = loop.make_context(shared, 0)
    return Plane(shared, ctx, keep)


@given(operations=OPERATIONS)
def test_it_behaves_like_a_dict(reused, operations):
    reused.shared.fdb[:] = 0
    reused.shared.ports["addresses"] = 0
    model = {}
    now_s = 0
    for operation, number, port in operations:
        if operation == "learn":
            learn(reused, number, port, now_s)
            if not (number in model and model[number][1]):
                model[number] = (port, False, now_s)
        elif operation == "static":
            fdb.set_static(reused.ctx, number, port)
            model[number] = (port, True, now_s)
        elif operation == "remove":
            fdb.remove(reused.ctx, number)
            model.pop(number, None)
        elif operation == "flush":
            fdb.flush(reused.ctx, port, 1, 0, FDB_BUCKETS)
            model = {k: v for k, v in model.items() if v[0] != port}
        else:
            now_s += number
    for key in range(1, 41):
        port, static, stamp = model.get(key, (fdb.NOT_FOUND, False, now_s))
        if not static and now_s - stamp >= AGEING_S:
            port = fdb.NOT_FOUND
        assert lookup(reused, key, now_s) == port
