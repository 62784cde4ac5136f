"""How long frames stop when a worker is killed, and how many it takes with it.

    python -m bench.takeover [--kills N] [--format F] [-j]

A stream of numbered frames runs from one built-in guest to another. Each kill waits for a
spare, lets the stream run undisturbed for a while, and then kills the worker that forwards.
The gap is from the last frame of the one to the first of its heir; the longest gap of the
undisturbed while before says what the machine adds by itself.

A gap has two parts: until the rings have another owner (the kernel takes the process
apart, the manager notices), and from there to the first frame (the heir wakes, looks at
the rings and moves them).
"""

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np

from bench import machine
from bench.local import Local, running
from ports.base import RX
from ports.burst import BURST_SIZE
from ports.native import (
    jit,
    load_acquire_u64,
    load_u64,
    pause,
    rdtsc,
    sched_yield,
    store_u64,
)
from vswitch import shared
from vswitch.guest.stream import collect, generate, generator_at, sink_at
from vswitch.guest.traffic import Generator, Sink, tsc_hz

FORMATS: Final = ("split", "packed")
_LENGTH: Final = 512
_RINGS: Final = 2  # on a frame's way
_QUIET_S: Final = 0.2
_DUE_S: Final = 30.0
# Words that the stream's thread and ours share.
_STOP, _LONGEST, _OWNED, _RESUMED, _GAP, _WORDS = range(6)


class Kill(NamedTuple):
    """What one kill did."""

    form: str
    gap_ms: float
    owner_ms: float  # from the kill until the rings had another owner
    frame_ms: float  # from there to the first frame
    quiet_ms: float  # longest gap of the time before
    lost: int  # not counted as dropped, so it went with the worker
    twice: int
    dropped: int  # for want of buffers


class Live:
    """A stream on a thread of its own, and what is seen of it while it runs."""

    def __init__(self, generator: Generator, sink: Sink, owner: int) -> None:
        self._words = np.zeros(_WORDS, np.int64)
        self._sink, self._owner = sink, owner
        sink.prepare()
        generator.prepare()
        self._generator = generator
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        _stream(
            int(self._generator.table.ctypes.data),
            int(self._sink.table.ctypes.data),
            int(self._words.ctypes.data),
            self._owner,
            *np.zeros((2, 1024), np.int64),
        )

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._words[_STOP] = 1
        self._thread.join()
        self._generator.finish(time.monotonic() + _DUE_S)

    def watch(self) -> None:
        """Begin to look for the longest gap, and for another owner."""
        self._words[[_LONGEST, _OWNED, _RESUMED, _GAP]] = 0

    @property
    def longest_ms(self) -> float:
        """The longest gap since then."""
        return float(self._words[_LONGEST] / tsc_hz() * 1e3)

    @property
    def owned(self) -> int:
        """When another owner was seen, in cycles, or 0."""
        return int(self._words[_OWNED])

    @property
    def resumed(self) -> int:
        """When the first frame came after that, in cycles, or 0."""
        return int(self._words[_RESUMED])

    @property
    def gap_ms(self) -> float:
        """From the last frame before that to this one."""
        return float(self._words[_GAP] / tsc_hz() * 1e3)

    def harm(self) -> tuple[int, int]:
        """Frames lost, and frames that came twice."""
        flow = self._sink.flows[0]
        return int(flow["lost"]), int(flow["duplicates"])


@jit
def _stream(
    generator: int,
    sink: int,
    words: int,
    owner: int,
    offsets: np.ndarray,
    lengths: np.ndarray,
) -> None:
    """Send and receive until told to stop; note gaps and the owner's change."""
    last = rdtsc()
    before = load_acquire_u64(owner)
    while load_acquire_u64(words + 8 * _STOP) == 0:
        generate(generator_at(generator, 0))
        count = collect(sink_at(sink, 0), offsets, lengths)
        now = rdtsc()
        if load_acquire_u64(owner) != before:
            before = load_acquire_u64(owner)
            store_u64(words + 8 * _OWNED, now)
        if count > 0:
            longest = max(load_u64(words + 8 * _LONGEST), now - last)
            store_u64(words + 8 * _LONGEST, longest)
            owned = load_u64(words + 8 * _OWNED) != 0
            if owned and load_u64(words + 8 * _RESUMED) == 0:
                store_u64(words + 8 * _GAP, now - last)
                store_u64(words + 8 * _RESUMED, now)
            last = now
        else:
            pause()
            sched_yield()


@jit
def _now() -> int:
    return rdtsc()


@contextmanager
def streaming(rig: Local, form: str) -> Iterator[Live]:
    """A stream between two guests, until the end."""
    names = (f"a-{form}", f"b-{form}")
    with ExitStack() as owned:
        guests = []
        for name in names:
            guest = rig.guest(name, packed=form == "packed")
            owned.callback(rig.manager.ask, "del_port", name=name)
            guests.append(owned.enter_context(guest))
        sender, receiver = guests
        records = shared.attach(rig.directory / "run")
        # The first port of a switch has slot 0.
        owners = records.rings["owner"]
        owner = owners.ctypes.data + RX * owners.strides[0]
        live = Live(Generator(sender, receiver, _LENGTH), Sink(receiver), owner)
        live.start()
        try:
            yield live
        finally:
            live.stop()


def measure(rig: Local, live: Live, form: str) -> Kill:
    """Kill the worker that forwards, once."""
    _until(lambda: bool(_workers(rig, "spare")), "a spare")
    live.watch()
    time.sleep(_QUIET_S)
    quiet_ms = live.longest_ms
    (active,) = _workers(rig, "active")
    lost, twice = live.harm()
    dropped = _dropped(rig)
    live.watch()
    begin = _now()
    os.kill(active["pid"], signal.SIGKILL)
    _until(lambda: live.resumed > 0, "frames to flow again")
    time.sleep(_QUIET_S)  # what comes late, or never, is known by then
    now_lost, now_twice = live.harm()
    now_dropped = _dropped(rig)
    per_ms = tsc_hz() / 1e3
    return Kill(
        form,
        live.gap_ms,
        (live.owned - begin) / per_ms,
        (live.resumed - live.owned) / per_ms,
        quiet_ms,
        now_lost - lost - (now_dropped - dropped),
        now_twice - twice,
        now_dropped - dropped,
    )


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _DUE_S
    while not condition():
        if time.monotonic() > deadline:
            message = f"waited {_DUE_S:.0f} s in vain for {what}"
            raise TimeoutError(message)
        time.sleep(0.005)


def _workers(rig: Local, role: str) -> list[dict[str, Any]]:
    workers = rig.manager.ask("show")["workers"]
    return [w for w in workers if w["role"] == role and w["state"] != "starting"]


def _dropped(rig: Local) -> int:
    """Frames that were counted as dropped on their way out."""
    return sum(
        int(count)
        for port in rig.manager.ask("stats")["ports"].values()
        for name, count in port.items()
        if name.startswith("tx_drop_")
    )


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each format")
    parser.add_argument("--format", choices=[*FORMATS, "both"], default="both")
    parser.add_argument("-j", "--json", action="store_true")
    options = parser.parse_args()
    forms = FORMATS if options.format == "both" else (options.format,)
    kills = []
    with running("--spares=1") as rig:
        for form in forms:
            with streaming(rig, form) as live:
                kills += [measure(rig, live, form) for _ in range(options.kills)]
    if options.json:
        for kill in kills:
            print(json.dumps(kill._asdict()))
        return
    print(f"{machine.processor()}, one worker, {_LENGTH} bytes, milliseconds")
    print(
        "rings   kills  gap: median  (least to most)  to owner  to frame  undisturbed"
    )
    for form in forms:
        print(_row(form, [kill for kill in kills if kill.form == form]))
    print(
        f"frames a kill, of at most {_RINGS * BURST_SIZE} and what is counted as full:"
    )
    for form in forms:
        print(_harm(form, [kill for kill in kills if kill.form == form]))


def _row(form: str, kills: Sequence[Kill]) -> str:
    gaps = [kill.gap_ms for kill in kills]
    spread = f"({min(gaps):.1f} to {max(gaps):.1f})"
    owner, frame, quiet = (
        median(getattr(kill, name) for kill in kills)
        for name in ("owner_ms", "frame_ms", "quiet_ms")
    )
    return (
        f"{form:6}  {len(kills):5}  {median(gaps):11.1f}  {spread:15}  {owner:8.1f}"
        f"  {frame:8.1f}  {quiet:11.1f}"
    )


def _harm(form: str, kills: Sequence[Kill]) -> str:
    lost, twice, dropped = (
        max(getattr(kill, name) for kill in kills)
        for name in ("lost", "twice", "dropped")
    )
    both = max(kill.lost + kill.twice for kill in kills)
    return (
        f"{form:6}  most: {lost} lost, {twice} twice, {both} together; full {dropped}"
    )


if __name__ == "__main__":
    main()
