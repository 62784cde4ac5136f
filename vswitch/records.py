"""Records shared by the manager and its workers, beside those of the ports.

Numba-free. `shared.py` lays them out in one segment; a digest of these declarations in
its header refuses a process that was built from other sources.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_WORKERS: Final = 16  # spares included

# Forwarding database: buckets of one cache line, five ways each.
FDB_WAYS: Final = 5
FDB_BUCKETS: Final = 1 << 17
FDB: Final = np.dtype(
    [
        # vlan << 48 | address, first byte of the address lowest; 0 is empty.
        ("keys", "<i8", (FDB_WAYS,)),
        ("values", "<u4", (FDB_WAYS,)),  # port, FDB_STATIC, stamp
        ("lock", "<u4"),  # 0 free, else worker number + 1
    ]
)
FDB_PORT_MASK: Final = (1 << 10) - 1
FDB_STATIC: Final = 1 << 10
FDB_STAMP_SHIFT: Final = 11
FDB_STAMP_MASK: Final = (1 << 21) - 1  # seconds since the start, modulo 24 days

HEADER: Final = np.dtype(
    [
        ("magic", "<i8"),
        ("digest", "S16"),  # of the layout
        ("manager_pid", "<i8"),
        ("n_workers", "<i8"),  # active ones
        ("started_ns", "<i8"),  # CLOCK_MONOTONIC; second 0 of the fdb's stamps
        ("port_slots", "<i8"),  # slots ever used: no port at or above
        ("ageing_s", "<i8"),
        ("forward_reserved", "<i8"),  # 1: link protocols pass like any multicast
        ("hash_seed", "<i8"),  # odd, secret
        ("pad", "<i8", (6,)),
    ]
)

# WORKER.role and WORKER.state
ROLE_ACTIVE: Final = 1
ROLE_SPARE: Final = 2
WORKER_NONE: Final = 0
WORKER_STARTING: Final = 1
WORKER_POLLING: Final = 2
WORKER_SLEEPING: Final = 3

WORKER: Final = np.dtype(
    [
        # Written by the manager, state also by the worker.
        ("pid", "<i8"),
        ("cpu", "<i8"),
        ("role", "<i8"),
        ("state", "<i8"),
        ("bell", "<i8"),  # how many messages it was sent
        ("control_pad", "<i8", (3,)),
        # Written by the worker.
        ("turns", "<i8"),
        ("polls", "<i8"),  # rounds over all rings
        ("frames", "<i8"),
        ("busy_cycles", "<i8"),  # of rounds that moved a frame
        ("idle_cycles", "<i8"),
        ("wakeups", "<i8"),
        ("cycles_per_s", "<i8"),  # of the cycle counter
        # Number of the ring that it is at, plus 1, 0 between turns: if it dies, it is
        # known where. In place of a port's transmit ring, the first of that port.
        ("serving", "<i8"),
        # A pthread_mutex_t (40 bytes) that it holds while it lives: see lifeline.py.
        ("life", "<i8", (8,)),
    ]
)


class Shared(NamedTuple):
    """The arrays of one run, as every process sees them."""

    header: NDArray[np.void]  # HEADER[1]
    ports: NDArray[np.void]  # PORT[MAX_PORTS]
    rings: NDArray[np.void]  # RING[MAX_PORTS * RINGS_PER_PORT]
    redo: NDArray[np.void]  # REDO[MAX_PORTS * RINGS_PER_PORT, REDO_ROWS]
    regions: NDArray[np.void]  # REGION[MAX_PORTS * 2 * TABLE_ROWS]
    fdb: NDArray[np.void]  # FDB[FDB_BUCKETS]
    counters: NDArray[np.void]  # COUNTERS[MAX_WORKERS, MAX_PORTS]
    workers: NDArray[np.void]  # WORKER[MAX_WORKERS]
