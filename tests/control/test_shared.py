"""The segment: one layout for whoever attaches, refused to everybody else."""

import itertools
import os

import numpy as np
import posix_ipc
import pytest

from ports.base import MAX_PORTS
from vswitch import shared as segment
from vswitch.errors import VswitchError
from vswitch.records import FDB, MAX_WORKERS


@pytest.fixture
def run_dir(tmp_path):
    yield tmp_path
    segment.remove(tmp_path)


def test_what_one_process_writes_the_other_reads(run_dir):
    ours = segment.create(run_dir, 3)
    theirs = segment.attach(run_dir)
    ours.ports[MAX_PORTS - 1]["addresses"] = 77
    ours.workers[MAX_WORKERS - 1]["wakeups"] = 78
    ours.counters[MAX_WORKERS - 1, MAX_PORTS - 1]["calls"] = 79
    assert theirs.ports[MAX_PORTS - 1]["addresses"] == 77
    assert theirs.workers[MAX_WORKERS - 1]["wakeups"] == 78
    assert theirs.counters[MAX_WORKERS - 1, MAX_PORTS - 1]["calls"] == 79
    assert theirs.header[0]["n_workers"] == 3
    assert theirs.header[0]["manager_pid"] == os.getpid()


def test_tables_do_not_overlap(run_dir):
    shared = segment.create(run_dir, 1)
    spans = [(t.ctypes.data, t.ctypes.data + t.nbytes) for t in shared]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(begin % 4096 == spans[0][0] % 4096 for begin, _ in spans)


def test_a_reader_cannot_write(run_dir):
    segment.create(run_dir, 1)
    with pytest.raises(ValueError, match="read-only"):
        segment.attach(run_dir).ports[0]["up"] = 1
    segment.attach(run_dir, writable=True).ports[0]["up"] = 1
    assert segment.attach(run_dir).ports[0]["up"] == 1


def test_a_new_segment_replaces_what_was_there(run_dir):
    old = segment.create(run_dir, 1)
    old.ports[0]["up"] = 1
    new = segment.create(run_dir, 2)
    assert new.ports[0]["up"] == 0
    assert segment.attach(run_dir).header[0]["n_workers"] == 2
    # Who still has the old one is not disturbed.
    assert old.ports[0]["up"] == 1


def test_the_hashs_secret_is_odd_and_another_each_time(run_dir):
    seeds = {int(segment.create(run_dir, 1).header[0]["hash_seed"]) for _ in range(4)}
    assert len(seeds) == 4
    assert all(seed & 1 and 0 < seed < 1 << 62 for seed in seeds)


def test_a_directory_has_one_name_however_it_is_written(tmp_path, monkeypatch):
    name = segment.segment_name(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert segment.segment_name(tmp_path / ".." / tmp_path.name) == name
    assert segment.segment_name(type(tmp_path)(tmp_path.name)) == name
    assert segment.segment_name(tmp_path / "other") != name
    assert name.startswith("/vswitch.")


def test_where_no_switch_runs_the_message_says_so(run_dir):
    with pytest.raises(VswitchError, match="vswitch up"):
        segment.attach(run_dir)
    assert not segment.remove(run_dir)


def test_a_segment_that_is_too_small_is_refused(run_dir):
    memory = posix_ipc.SharedMemory(
        segment.segment_name(run_dir), posix_ipc.O_CREX, 0o600, 4096
    )
    memory.close_fd()
    with pytest.raises(VswitchError, match="too small"):
        segment.attach(run_dir)


def test_a_segment_of_other_sources_is_refused(run_dir, monkeypatch):
    segment.create(run_dir, 1)
    other = np.dtype([*FDB.descr[:-1], ("latch", "<u4")])  # a name is enough
    tables = [(n, other if n == "fdb" else t, s) for n, t, s in segment._TABLES]
    monkeypatch.setattr(segment, "_TABLES", tuple(tables))
    with pytest.raises(VswitchError, match="another layout"):
        segment.attach(run_dir)


def test_a_segment_that_is_not_finished_is_refused(run_dir):
    segment.create(run_dir, 1).header[0]["magic"] = 0
    with pytest.raises(VswitchError, match="another layout"):
        segment.attach(run_dir)


def test_the_digest_tells_fields_types_and_shapes(monkeypatch):
    digests = {segment.layout_digest()}
    name, table, shape = segment._TABLES[0]
    renamed = np.dtype([("changed", table.descr[0][1]), *table.descr[1:]])
    retyped = np.dtype([(table.descr[0][0], "<u8"), *table.descr[1:]])
    variants = [(name, renamed, shape), (name, retyped, shape), (name, table, (2,))]
    for variant in [*variants, ("other", table, shape)]:
        monkeypatch.setattr(segment, "_TABLES", (variant, *segment._TABLES[1:]))
        digests.add(segment.layout_digest())
    assert len(digests) == 5


def test_the_clock_counts_seconds_since_the_start(run_dir):
    shared = segment.create(run_dir, 1)
    assert segment.elapsed_s(shared) == 0
    shared.header[0]["started_ns"] -= 5 * 10**9
    assert segment.elapsed_s(shared) == 5
