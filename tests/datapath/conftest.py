"""A switch's shared records in private memory, and a worker's context on them."""

from dataclasses import dataclass

import numpy as np
import pytest

from ports.base import (
    MAX_PORTS,
    PORT,
    REDO,
    REDO_ROWS,
    REGION,
    RING,
    RINGS_PER_PORT,
    TABLE_ROWS,
)
from ports.counters import COUNTERS
from ports.native import Record
from tests.datapath.bench import Bench
from vswitch.datapath import loop
from vswitch.records import (
    FDB,
    FDB_BUCKETS,
    HEADER,
    MAX_WORKERS,
    WORKER,
    Shared,
)


@dataclass
class Plane:
    shared: Shared
    ctx: Record
    keep: object

    def tally(self, port, worker=0):
        return self.shared.counters[worker, port]


def make_shared():
    shared = Shared(
        header=np.zeros(1, HEADER),
        ports=np.zeros(MAX_PORTS, PORT),
        rings=np.zeros(MAX_PORTS * RINGS_PER_PORT, RING),
        redo=np.zeros((MAX_PORTS * RINGS_PER_PORT, REDO_ROWS), REDO),
        regions=np.zeros(MAX_PORTS * 2 * TABLE_ROWS, REGION),
        fdb=np.zeros(FDB_BUCKETS, FDB),
        counters=np.zeros((MAX_WORKERS, MAX_PORTS), COUNTERS),
        workers=np.zeros(MAX_WORKERS, WORKER),
    )
    header = shared.header[0]
    header["ageing_s"] = 300
    header["forward_reserved"] = 1
    header["n_workers"] = 1
    header["hash_seed"] = 0x1E3779B97F4A7C15
    header["port_slots"] = 8
    for slot in range(8):
        port = shared.ports[slot]
        port["max_addresses"] = 16384
        port["max_frame"] = 65553
    return shared


def make_plane():
    shared = make_shared()
    ctx, keep = loop.make_context(shared, 0)
    return Plane(shared, ctx, keep)


@pytest.fixture
def plane():
    return make_plane()


@pytest.fixture
def bench(plane):
    bench = Bench(plane)
    yield bench
    bench.check_ledger()
    bench.close()


@pytest.fixture
def pair(bench):
    return bench.pair()
