"""Starts, one for real and others that are none."""

import os
from pathlib import Path

import pytest

from bench import machine, starts
from bench.daemon import DaemonError
from bench.measure import Plan
from bench.peers import KINDS, Kind
from bench.starts import First

PLAN = Plan(2, 0.1)
KEEPS = Kind(None, cache="WHAT_IT_KEEPS")


@pytest.fixture
def result():
    return {"failed": {}, "versions": {}}


@pytest.fixture
def started(monkeypatch):
    """Who was started, each time with what it finds of what it kept."""
    asked = []

    def first_frame(name, kind, queue_size, place):
        found = os.environ.get("WHAT_IT_KEEPS")
        if name == "lame":
            message = "it fell over"
            raise DaemonError(message)
        asked.append((name, found and list(Path(found).iterdir())))
        return First("1.0", float(len(asked)))

    monkeypatch.setattr(starts, "first_frame", first_frame)
    return asked


def add_to(result, **kinds):
    told = []
    starts.add_to(result, kinds, PLAN, machine.Place(1, 0), told.append)
    return told


def test_the_first_start_of_each_does_not_count(result, started):
    add_to(result, a=Kind(None), b=Kind(None))
    assert [name for name, _ in started] == ["a", "b", "b", "a", "a", "b"]
    assert result["first_frames"] == {"warm": {"a": [4, 5], "b": [3, 6]}, "cold": {}}
    assert result["versions"] == {"a": "1.0", "b": "1.0"}


def test_cold_is_with_nothing_kept(result, started, monkeypatch, tmp_path):
    (tmp_path / "kept").touch()
    for before, finds in ((None, None), (str(tmp_path), [tmp_path / "kept"])):
        if before:
            monkeypatch.setenv("WHAT_IT_KEEPS", before)
        started.clear()
        add_to(result, keeps=KEEPS)
        assert started == [("keeps", finds)] * 3 + [("keeps", [])]
        assert result["first_frames"]["cold"] == {"keeps": [4]}
        assert os.environ.get("WHAT_IT_KEEPS") == before


def test_one_that_does_not_start_is_named_once(result, started):
    add_to(result, lame=KEEPS, other=Kind(None))
    assert result["failed"] == {"lame, start": "it fell over"}
    assert list(result["first_frames"]["warm"]) == ["other"]
    assert result["first_frames"]["cold"] == {}


def test_one_that_is_missing_is_not_started(result, started):
    add_to(result, absent=Kind(None, lambda: "it is not installed"))
    assert started == []


@pytest.mark.filterwarnings("ignore:subprocess .* is still running")
def test_a_frame_comes_through_this_switch():
    first = starts.first_frame("vswitch", KINDS["vswitch"], 256, machine.place())
    assert first.seconds > 0
    assert first.version
