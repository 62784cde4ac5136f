"""Whether a worker hangs: it had its time and made no turn of it.

A worker that makes no turn may sleep, may wait for a CPU on a loaded machine, or may hang.
Only a hang is worth a death, so time counts only where nobody else can be the reason:

- time that its thread was on a CPU, by the kernel's account;
- time between two looks that both found it stopped, or waiting for something that is not
  a CPU. Not while another thread of it wants to run: that one may hold what is waited
  for, and be the one that gets no CPU.

A turn clears the account, and so does sleep that the worker has announced. Two periods at
most count a look: what passes while nobody looks, as when all of the machine stood still,
is held against nobody.
"""

import os
import time
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from vswitch.records import WORKER_SLEEPING

PERIOD_S: Final = 0.05
# Where Numba is told not to compile, a burst alone takes longer than that; and in a guest
# on a loaded machine, whose kernel counts what it did not get, more than ten seconds.
_INTERPRETED: Final = os.environ.get("NUMBA_DISABLE_JIT", "0") not in {"", "0"}
LONGEST_S: Final = 60.0 if _INTERPRETED else 0.5
_MOST_S: Final = 2 * PERIOD_S  # of a look
_REST: Final = 10  # periods from one look at a sleeper to the next

_STATES: Final = {
    "R": "running",
    "S": "sleeping",
    "D": "in the kernel",
    "T": "stopped",
    "t": "stopped by a debugger",
}
_ASLEEP: Final = "S"
_STOPPED: Final = "Tt"
_WAITING: Final = "SDTt"
_TICKS: Final = os.sysconf("SC_CLK_TCK")
# proc_pid_stat(5), counted from the field behind the name: state, utime, stime.
_STATE, _UTIME, _STIME = 0, 11, 12


class Thread(NamedTuple):
    """What the kernel says of a thread."""

    state: str  # a letter
    cpu_s: float


class Seen(NamedTuple):
    """A worker at one look."""

    now_s: float
    asleep: bool  # by its own account
    thread: Thread
    held_up: bool  # another thread of it wants to run


class Account:
    """The time that a worker has had since its last turn."""

    def __init__(self) -> None:
        self.on_cpu_s = 0.0
        self.blocked_s = 0.0
        self._last: Seen | None = None
        self._turns = -1
        self._rest = 0

    def turned(self, turns: int) -> bool:
        """Whether there was a turn since this was asked last, so nothing is to be noted.

        Looks at a worker at work take more time than this, several times a second.
        """
        before, self._turns = self._turns, turns
        if turns == before:
            return False
        self._last = None  # the next look begins a new account
        return True

    def rests(self, *, asleep: bool) -> bool:
        """Whether it sleeps by its own account, as a look has found not long ago."""
        self._rest = self._rest - 1 if asleep and self._rest else 0
        return self._rest > 0

    def note(self, seen: Seen) -> bool:
        """Note a look at a worker that has not `turned` nor `rests`; whether it hangs."""
        last, self._last = self._last, seen
        sleeps = seen.asleep and seen.thread.state == _ASLEEP
        self._rest = _REST if sleeps else 0
        if last is None or sleeps:
            self.on_cpu_s = self.blocked_s = 0.0
            return False
        on_cpu_s = seen.thread.cpu_s - last.thread.cpu_s
        self.on_cpu_s += min(on_cpu_s, _MOST_S)
        states = last.thread.state, seen.thread.state
        if all(state in _WAITING for state in states) and not seen.held_up:
            passed_s = min(seen.now_s - last.now_s, _MOST_S)
            self.blocked_s += max(0.0, passed_s - on_cpu_s)
        return self.on_cpu_s + self.blocked_s >= LONGEST_S

    @property
    def is_stopped(self) -> bool:
        """Whether somebody outside stopped it."""
        return self._last is not None and self._last.thread.state in _STOPPED

    def __str__(self) -> str:
        state = self._last.thread.state if self._last else "?"
        return (
            f"no turn while it was on a CPU for {self.on_cpu_s:.2f} s and waited for"
            f" {self.blocked_s:.2f} s, state {state} ({_STATES.get(state, 'unknown')})"
        )


def is_asleep(record: np.void) -> bool:
    """Whether a worker sleeps, by its WORKER record."""
    return int(record["state"]) == WORKER_SLEEPING


def look_at(pid: int, record: np.void) -> Seen | None:
    """Look at a worker by its pid and WORKER record; None if it is gone."""
    asleep = is_asleep(record)
    threads = Path(f"/proc/{pid}/task")
    try:
        thread = _read(threads / str(pid))
        held_up = thread.state in _WAITING and not asleep and _others_run(threads, pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Seen(time.monotonic(), asleep, thread, held_up)


def _others_run(threads: Path, pid: int) -> bool:
    others = [path for path in threads.iterdir() if path.name != str(pid)]
    return any(_read(path).state == "R" for path in others)


def _read(thread: Path) -> Thread:
    fields = (thread / "stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[_UTIME]) + int(fields[_STIME])
    return Thread(fields[_STATE], ticks / _TICKS)
