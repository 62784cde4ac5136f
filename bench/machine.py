"""What the machine is like now: its processors, how far apart they are, who had them.

On a virtual machine the host decides where our processors run. A cache line that goes
from one to the other and back takes some 100 ns, or several times that, and this flips
every few seconds to minutes. No figure of a switch means anything without it, so every
slice of a measurement is labelled with the round trip before and after it. Where others
work as well, a thread of ours waits for its processor now and then: the kernel says how
long, and such a slice is worth nothing either.
"""

import os
import platform
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from ports.native import (
    eventfd_signal,
    jit,
    load_acquire_u64,
    pause,
    rdtsc,
    store_release_u64,
    wait_epoll,
)
from vswitch.guest.traffic import tsc_hz

FAST_NS: Final = 200.0  # a round trip below it: the cores share a cache
HUGE_PAGE_KB: Final = 2048
_TRIPS: Final = 20_000
_LINES: Final = 1 << 14  # of the reference loop's memory: 1 MiB
_LOOPS: Final = 1 << 20
_TRIES: Final = 5


def round_trip_ns(cpu: int, other: int) -> float:
    """Nanoseconds for a cache line from one processor to the other and back."""
    words = np.zeros(32, np.int64)  # two lines, however they are aligned
    ping, pong = int(words.ctypes.data), int(words.ctypes.data) + 128
    echo = threading.Thread(target=_echo_on, args=(other, ping, pong))
    with only_on(cpu):
        echo.start()
        cycles = _bounce(ping, pong, _TRIPS)
        echo.join()
    return cycles / _TRIPS / tsc_hz() * 1e9


class Place(NamedTuple):
    """Where things run."""

    cpu: int  # a switch's forwarding thread, alone
    other: int  # everything else, and the generator


def wake_us(place: Place, silence_us: float, rounds: int) -> tuple[float, float]:
    """Microseconds until a bare sleeper has been woken: the median, and what 99 % take.

    It sleeps on the forwarding processor in epoll on an eventfd, and does nothing else.
    """
    word, times = np.zeros(8, np.int64), np.zeros(rounds, np.int64)
    event = np.zeros(2, np.int64)
    fd = os.eventfd(0)
    with select.epoll() as epoll, only_on(place.other):
        epoll.register(fd, select.EPOLLIN | select.EPOLLET)
        told = int(word.ctypes.data)
        sleeper = threading.Thread(
            target=_sleep_on,
            args=(place.cpu, epoll.fileno(), int(event.ctypes.data), told, rounds),
        )
        sleeper.start()
        _wake(fd, told, int(silence_us * tsc_hz() / 1e6), times)
        sleeper.join()
    os.close(fd)
    median, most = np.percentile(times / tsc_hz() * 1e6, (50, 99))
    return float(median), float(most)


def place(given: str = "") -> Place:
    """Two processors: as in `given`, two numbers with a comma, or the first that we have.

    Raises:
        ValueError: They cannot be had.
    """
    usable = sorted(os.sched_getaffinity(0))
    cpu, other = map(int, given.split(",")) if given else (*usable[1::-1], -1)[:2]
    if len({cpu, other} & set(usable)) < 2:
        message = (
            "two processors are needed, one to forward on and one for the generator; "
            f"usable: {', '.join(map(str, usable))}"
        )
        raise ValueError(message)
    return Place(cpu, other)


@contextmanager
def only_on(cpu: int) -> Iterator[None]:
    """This thread runs on one processor meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def processor() -> str:
    """Its model, as the kernel calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "an unknown processor"


def statement() -> dict[str, str]:
    """What figures of now and here have to be read with."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} usable",
        "kernel": f"{platform.system()} {platform.release()}",
        "governor": _governor(),
        "huge pages": f"{huge_pages()} free",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "Python": platform.python_version(),
    }


def huge_pages() -> int:
    """How many there are to be had, of the usual size."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("HugePages_Free:"):
            return int(line.split()[1])
    return 0


def _governor() -> str:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.exists() else "not known"


# --- who had the processors ---------------------------------------------------------


def cpu_seconds(group: int) -> float:
    """CPU time of all threads that a process group has now."""
    return sum(_schedstat(thread)[0] for thread in _threads(group)) / 1e9


def memory_mib(group: int) -> float:
    """What a process group has in memory; of a page that others have, too, its share.

    Huge pages are counted whole: the kernel does not share them out (proc_pid_smaps(5)).
    """
    kib = 0
    for process in _processes(group):
        for line in (process / "smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss:", "Shared_Hugetlb:", "Private_Hugetlb:")):
                kib += int(line.split()[1])
    return kib / 1024


def waited_s(group: int, cpu: int) -> float:
    """How long the group's threads that have just this processor had to wait for it."""
    mine = (t for t in _threads(group) if os.sched_getaffinity(int(t.name)) == {cpu})
    return sum(_schedstat(thread)[1] for thread in mine) / 1e9


def own_wait_s() -> float:
    """How long this thread had to wait for its processor."""
    return _schedstat(Path("/proc/thread-self"))[1] / 1e9


def is_halted(group: int) -> bool:
    """Whether every thread that a process group still has is stopped."""
    return all(_state(thread) in "TZX" for thread in _threads(group))


def _threads(group: int) -> Iterator[Path]:
    for process in _processes(group):
        with suppress(OSError):  # it has ended
            yield from (process / "task").iterdir()


def _processes(group: int) -> Iterator[Path]:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if os.getpgid(int(process.name)) == group:
                yield process


def _state(thread: Path) -> str:
    """The letter for what a thread does: proc_pid_stat(5)."""
    try:
        return (thread / "stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "X"  # it has ended


def _schedstat(thread: Path) -> tuple[int, int]:
    """Nanoseconds that a thread ran, and that it was ready and did not."""
    ran, waited, _ = (thread / "schedstat").read_text().split()
    return int(ran), int(waited)


# --- how fast it is -----------------------------------------------------------------


def reference() -> float:
    """Million steps a second of a loop that no change of ours ever makes faster.

    It writes all over a mebibyte by numbers that it makes up, on one processor: what
    another machine makes of it tells what other figures would be there, roughly. The
    best of several: others can only slow it down.
    """
    lines = np.zeros((_LINES, 8), np.int64)
    _steps(lines, _LINES)
    took = []
    for _ in range(_TRIES):
        begin = time.perf_counter()
        _steps(lines, _LOOPS)
        took.append(time.perf_counter() - begin)
    return _LOOPS / min(took) / 1e6


@jit
def _steps(lines: np.ndarray, count: int) -> None:
    state = 1
    for _ in range(count):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        line = lines[(state >> 8) & (_LINES - 1)]
        line[0] += state
        line[7] += line[0]


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


def _sleep_on(cpu: int, epoll: int, event: int, told: int, rounds: int) -> None:
    os.sched_setaffinity(0, {cpu})
    _sleep(epoll, event, told, rounds)


@jit
def _sleep(epoll: int, event: int, told: int, rounds: int) -> None:
    for number in range(rounds):
        while wait_epoll(epoll, event, 1, -1) < 1:
            pause()
        store_release_u64(told, number + 1)


@jit
def _wake(fd: int, told: int, silence: int, times: np.ndarray) -> None:
    for number in range(times.size):
        begin = rdtsc()
        while rdtsc() - begin < silence:
            pause()
        begin = rdtsc()
        eventfd_signal(fd)
        while load_acquire_u64(told) != number + 1:
            pause()
        times[number] = rdtsc() - begin
