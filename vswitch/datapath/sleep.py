"""A worker's sleep, and its first look around after it.

All of it is one jitted call, as the frame that wakes a worker has to wait for whatever lies
between: so soon after a sleep the interpreter's own memory is cold, and a step of it takes
many times as long as usual.
"""

from typing import Final

import numpy as np

from ports.native import Record, Records, jit, wait_epoll
from vswitch.datapath import clock, loop
from vswitch.datapath.views import worker_at
from vswitch.records import WORKER_POLLING, WORKER_SLEEPING

_EVENTS: Final = 16  # at a time; nobody reads which ones
_EVENT: Final = 12  # bytes of struct epoll_event on x86-64
BED: Final = np.dtype(
    [
        ("epoll_fd", "<i8"),
        ("longest_ms", "<i8"),
        ("events", "<i8"),  # address: where the kernel writes them
    ]
)


def make_bed(epoll_fd: int, longest_ms: int) -> tuple[Record, object]:
    """A BED, and what has to stay alive as long as it is used."""
    events = np.zeros(_EVENTS * _EVENT, np.uint8)
    bed = np.zeros(1, BED)
    bed[0]["epoll_fd"] = epoll_fd
    bed[0]["longest_ms"] = longest_ms
    bed[0]["events"] = events.ctypes.data
    return bed[0], (bed, events)


@jit
def sleep(ctx: Record, worker: int, polled: Records, bed: Record, budget: int) -> None:
    """Ask for kicks, sleep until an event or for the longest time, then poll for a turn.

    While frames wait there is no sleep, and while it sleeps no SIGALRM, which would end it.
    """
    if int(bed["epoll_fd"]) < 0:
        return  # to be compiled
    if loop.ask_for_kicks(ctx, worker, polled) > 0:
        loop.stop_kicks(ctx, worker, polled)
        return
    record = worker_at(int(ctx["workers"]), worker)
    record["state"] = WORKER_SLEEPING
    clock.stop_alarm(ctx)
    wait_epoll(
        int(bed["epoll_fd"]), int(bed["events"]), _EVENTS, int(bed["longest_ms"])
    )
    clock.start_alarm(ctx)
    record["state"] = WORKER_POLLING
    record["wakeups"] += 1
    loop.stop_kicks(ctx, worker, polled)
    loop.poll_turn(ctx, worker, polled, clock.elapsed_s(ctx), budget)


def warm_up(ctx: Record, worker: int) -> None:
    """Compile it, without any sleep."""
    nowhere, _keep = make_bed(-1, 0)
    sleep(ctx, worker, np.zeros(0, np.int64), nowhere, 0)
