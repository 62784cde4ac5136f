"""What users see, from records that a test wrote."""

import pytest

from ports.counters import NAMES
from tests.datapath.conftest import make_shared
from vswitch import snapshot
from vswitch.control.mac import parse_key
from vswitch.records import (
    FDB_STAMP_MASK,
    FDB_STAMP_SHIFT,
    FDB_STATIC,
    ROLE_ACTIVE,
    ROLE_SPARE,
    WORKER_POLLING,
    WORKER_SLEEPING,
    WORKER_STARTING,
)

NOW_S = 1000


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.setattr(snapshot, "elapsed_s", lambda _: NOW_S)
    return make_shared()


def remember(shared, bucket, way, key, port, *, stamp=NOW_S, static=False):
    value = port | (stamp & FDB_STAMP_MASK) << FDB_STAMP_SHIFT
    shared.fdb[bucket]["keys"][way] = key
    shared.fdb[bucket]["values"][way] = value | FDB_STATIC * static


# --- the forwarding database ---


def test_an_entry_says_where_how_and_how_long_ago(shared):
    remember(shared, 3, 4, parse_key("52:54:00:00:00:01", 0), 2, stamp=990)
    assert snapshot.fdb_entries(shared, {2: "web"}) == [
        {
            "mac": "52:54:00:00:00:01",
            "ifname": "web",
            "vlan": 0,
            "state": "learned",
            "age_s": 10,
        }
    ]


def test_entries_are_sorted_by_vlan_and_address(shared):
    texts = [
        ("52:54:00:00:00:01", 7),
        ("52:00:00:00:00:09", 7),
        ("fe:00:00:00:00:01", 0),
    ]
    for bucket, (text, vlan) in enumerate(texts):
        remember(shared, bucket, 0, parse_key(text, vlan), 1)
    found = snapshot.fdb_entries(shared, {1: "a"})
    assert [(e["mac"], e["vlan"]) for e in found] == [texts[2], texts[1], texts[0]]


@pytest.mark.parametrize(("age_s", "shown"), [(0, 1), (299, 1), (300, 0), (100_000, 0)])
def test_what_has_aged_is_left_out(shared, age_s, shown):
    remember(shared, 0, 0, 0x52, 1, stamp=NOW_S - age_s)
    assert len(snapshot.fdb_entries(shared, {1: "a"})) == shown


def test_a_static_entry_has_no_age(shared):
    remember(shared, 0, 0, 0x52, 1, stamp=0, static=True)
    (entry,) = snapshot.fdb_entries(shared, {1: "a"})
    assert (entry["state"], entry["age_s"]) == ("static", 0)


def test_a_clock_that_is_a_second_ahead_makes_no_old_entry(shared):
    remember(shared, 0, 0, 0x52, 1, stamp=NOW_S + 1)
    (entry,) = snapshot.fdb_entries(shared, {1: "a"})
    assert entry["age_s"] == 0


def test_a_port_that_is_gone_has_no_entries(shared):
    remember(shared, 0, 0, 0x52, 1)
    remember(shared, 0, 1, 0x54, 2)
    found = snapshot.fdb_entries(shared, {2: "b"})
    assert [entry["ifname"] for entry in found] == ["b"]


def test_an_empty_place_is_no_entry(shared):
    remember(shared, 0, 0, 0, 1)
    assert snapshot.fdb_entries(shared, {1: "a"}) == []


# --- counters ---


def test_counters_are_summed_over_the_workers(shared):
    for worker, count in ((0, 1), (3, 20), (15, 300)):
        shared.counters[worker, 5]["rx_frames"] = count
    shared.counters[0, 6]["rx_frames"] = 9999
    ports = snapshot.stats(shared, {"web": 5, "db": 6})["ports"]
    nothing = dict.fromkeys(NAMES, 0) | {"rx_missed": 0}
    assert ports["web"] == nothing | {"rx_frames": 321}
    assert ports["db"]["rx_frames"] == 9999


def test_workers_that_do_not_live_are_left_out(shared):
    shared.workers[2]["state"] = WORKER_POLLING
    shared.workers[2]["frames"], shared.workers[2]["busy_cycles"] = 4, 130
    shared.workers[5]["frames"] = 4
    workers = snapshot.stats(shared, {})["workers"]
    assert list(workers) == ["2"]
    assert workers["2"]["cycles_per_frame"] == 32.5


def test_no_frames_cost_nothing_each(shared):
    shared.workers[0]["state"] = WORKER_SLEEPING
    shared.workers[0]["busy_cycles"] = 5
    assert snapshot.stats(shared, {})["workers"]["0"]["cycles_per_frame"] == 0.0


# --- workers ---


def test_a_worker_is_shown_with_its_role_and_state(shared):
    for number, role, state in (
        (0, ROLE_ACTIVE, WORKER_SLEEPING),
        (1, ROLE_SPARE, WORKER_STARTING),
    ):
        record = shared.workers[number]
        record["pid"], record["cpu"] = 100 + number, number
        record["role"], record["state"] = role, state
    shown = snapshot.Usage(shared).workers()
    assert [(w["id"], w["pid"], w["cpu"], w["role"], w["state"]) for w in shown] == [
        (0, 100, 0, "active", "sleeping"),
        (1, 101, 1, "spare", "starting"),
    ]


def test_usage_is_between_the_last_two_samples(shared, monkeypatch):
    clock = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr(snapshot.time, "monotonic", lambda: next(clock))
    record = shared.workers[0]
    record["state"], record["cycles_per_s"] = WORKER_POLLING, 1000
    usage = snapshot.Usage(shared)
    assert usage.workers()[0]["busy_percent"] == 0.0
    record["busy_cycles"] = 500
    usage.sample()
    assert usage.workers()[0]["busy_percent"] == 25.0
    usage.sample()
    assert usage.workers()[0]["busy_percent"] == 0.0


def test_a_worker_that_was_replaced_is_not_less_than_idle(shared, monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(snapshot.time, "monotonic", lambda: next(clock))
    record = shared.workers[0]
    record["state"], record["cycles_per_s"] = WORKER_POLLING, 1000
    record["busy_cycles"] = 500
    usage = snapshot.Usage(shared)
    record["busy_cycles"] = 0
    usage.sample()
    assert usage.workers()[0]["busy_percent"] == 0.0
