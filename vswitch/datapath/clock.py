"""What a worker does by the clock: the fdb ages, and what makes a turn wait is ended.

It is jitted, and done between turns without going back to the interpreter, whose memory
is cold when it was not used for some milliseconds: what it does in 7 us then takes 100.
"""

from typing import Final

import numpy as np

from ports.native import (
    Record,
    jit,
    monotonic_ns,
    records_at,
    set_alarm,
)
from vswitch.datapath import fdb
from vswitch.datapath.views import header_at

CLOCK: Final = np.dtype(
    [
        ("timespec", "<i8", (2,)),  # where the kernel writes the time
        ("no_alarm", "<i8", (4,)),  # a struct itimerval: interval, then value
        ("alarm", "<i8", (4,)),  # another one
        ("aged_ns", "<i8"),  # when the fdb was looked through
        ("next_bucket", "<i8"),  # and as far as this
    ]
)
_NO_ALARM: Final = CLOCK.fields["no_alarm"][1] if CLOCK.fields else 0
_ALARM: Final = CLOCK.fields["alarm"][1] if CLOCK.fields else 0
_EXPIRE_A_S: Final = 1 << 14  # buckets of the fdb, so all of them in eight seconds
_EXPIRE_LEAST: Final = 16  # at once
_NS: Final = 10**9

clock_at: Final = records_at(CLOCK)


def make_clock() -> "np.ndarray[tuple[int], np.dtype[np.void]]":
    """A CLOCK without an alarm."""
    clock = np.zeros(1, CLOCK)
    clock[0]["aged_ns"] = monotonic_ns(clock.ctypes.data)
    return clock


def let_alarm_come(ctx: Record, after_us: int) -> None:
    """From now on `start_alarm` has SIGALRM come after so long.

    And again and again: one may come just before the call that it is to end.
    """
    clock_at(int(ctx["clock"]), 0)["alarm"] = (0, after_us, 0, after_us)


@jit
def start_alarm(ctx: Record) -> None:
    """Have SIGALRM end whatever will make us wait; begins anew each time.

    It is to be started again before it comes: on a virtual machine a timer that comes
    costs tens of microseconds.
    """
    set_alarm(int(ctx["clock"]) + _ALARM)


@jit
def stop_alarm(ctx: Record) -> None:
    """Have no SIGALRM from now on."""
    set_alarm(int(ctx["clock"]) + _NO_ALARM)


@jit
def elapsed_s(ctx: Record) -> int:
    """As `shared.elapsed_s`: seconds since the switch started."""
    since = int(header_at(int(ctx["header"]), 0)["started_ns"])
    return (monotonic_ns(int(ctx["clock"])) - since) // _NS


@jit
def age(ctx: Record, worker: int, now_s: int) -> None:
    """Clear what is too old in as much of the fdb as is due; one worker is enough."""
    if worker != 0:
        return
    clock = clock_at(int(ctx["clock"]), 0)
    now = monotonic_ns(int(ctx["clock"]))
    due = min(now - int(clock["aged_ns"]), _NS) * _EXPIRE_A_S // _NS
    if due < _EXPIRE_LEAST:
        return
    clock["aged_ns"] = now
    clock["next_bucket"] = fdb.expire(
        ctx, int(clock["next_bucket"]), due, worker, now_s
    )
