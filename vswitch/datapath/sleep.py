"""A worker's sleep, and its first look around after it.

All of it is one jitted call, as the frame that wakes a worker has to wait for whatever lies
between: so soon after a sleep the interpreter's own memory is cold, and a step of it takes
many times as long as usual.
"""

from typing import Final

import numpy as np

from ports.native import Record, Records, jit, monotonic_ns, set_alarm, wait_epoll
from vswitch.datapath import loop
from vswitch.datapath.views import header_at, worker_at
from vswitch.records import WORKER_POLLING, WORKER_SLEEPING

_EVENTS: Final = 16  # at a time; nobody reads which ones
_EVENT: Final = 12  # bytes of struct epoll_event on x86-64
_TIMER: Final = np.dtype([("interval", "<i8", (2,)), ("value", "<i8", (2,))])
BED: Final = np.dtype(
    [
        ("epoll_fd", "<i8"),
        ("longest_ms", "<i8"),
        ("events", "<i8"),  # addresses: where the kernel writes them
        ("timespec", "<i8"),  # and the time
        ("no_alarm", "<i8"),  # a struct itimerval
        ("alarm", "<i8"),  # another one
    ]
)


def make_bed(epoll_fd: int, alarm_us: int) -> tuple[Record, object]:
    """A BED, and what has to stay alive as long as it is used."""
    events = np.zeros(_EVENTS * _EVENT, np.uint8)
    timespec = np.zeros(2, np.int64)
    timers = np.zeros(2, _TIMER)
    timers[1]["interval"] = timers[1]["value"] = (0, alarm_us)
    bed = np.zeros(1, BED)
    bed[0]["epoll_fd"] = epoll_fd
    bed[0]["events"] = events.ctypes.data
    bed[0]["timespec"] = timespec.ctypes.data
    bed[0]["no_alarm"] = timers.ctypes.data
    bed[0]["alarm"] = timers.ctypes.data + _TIMER.itemsize
    return bed[0], (bed, events, timespec, timers)


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
    set_alarm(int(bed["no_alarm"]))
    wait_epoll(
        int(bed["epoll_fd"]), int(bed["events"]), _EVENTS, int(bed["longest_ms"])
    )
    set_alarm(int(bed["alarm"]))
    record["state"] = WORKER_POLLING
    record["wakeups"] += 1
    loop.stop_kicks(ctx, worker, polled)
    # As `shared.elapsed_s`: a sleep may take as long as an entry of the fdb has left.
    since = int(header_at(int(ctx["header"]), 0)["started_ns"])
    now_s = (monotonic_ns(int(bed["timespec"])) - since) // 10**9
    loop.poll_turn(ctx, worker, polled, now_s, budget)


def warm_up(ctx: Record, worker: int) -> None:
    """Compile it, without any sleep."""
    nowhere, _keep = make_bed(-1, 0)
    sleep(ctx, worker, np.zeros(0, np.int64), nowhere, 0)
