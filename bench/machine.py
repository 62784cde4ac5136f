"""What the machine is like now: its processor, and how far apart two cores are.

On a virtual machine the host decides where our processors run. A cache line that goes
from one to the other and back takes some 100 ns, or several times that, and this flips
every few seconds to minutes. No figure of a switch means anything without it, so every
slice of a measurement is labelled with the round trip before and after it.
"""

import os
import threading
from pathlib import Path
from typing import Final

import numpy as np

from ports.native import jit, load_acquire_u64, pause, rdtsc, store_release_u64
from vswitch.guest.traffic import tsc_hz

FAST_NS: Final = 200.0  # a round trip below it: the cores share a cache
_TRIPS: Final = 20_000


def round_trip_ns(cpu: int, other: int) -> float:
    """Nanoseconds for a cache line from one processor to the other and back."""
    words = np.zeros(32, np.int64)  # two lines, however they are aligned
    ping, pong = int(words.ctypes.data), int(words.ctypes.data) + 128
    echo = threading.Thread(target=_echo_on, args=(other, ping, pong))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        echo.start()
        cycles = _bounce(ping, pong, _TRIPS)
        echo.join()
    finally:
        os.sched_setaffinity(0, before)
    return cycles / _TRIPS / tsc_hz() * 1e9


def processor() -> str:
    """Its model, as the kernel calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "an unknown processor"


def _echo_on(cpu: int, ping: int, pong: int) -> None:
    os.sched_setaffinity(0, {cpu})
    _echo(ping, pong, _TRIPS)


@jit
def _bounce(ping: int, pong: int, trips: int) -> int:
    begin = 0
    for trip in range(trips):
        if trip == 1:
            begin = rdtsc()  # the first waits for the other thread to start
        store_release_u64(ping, trip + 1)
        while load_acquire_u64(pong) != trip + 1:
            pause()
    return rdtsc() - begin


@jit
def _echo(ping: int, pong: int, trips: int) -> None:
    for trip in range(trips):
        while load_acquire_u64(ping) != trip + 1:
            pause()
        store_release_u64(pong, trip + 1)
