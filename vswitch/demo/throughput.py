"""How fast the switch is here: a generator and a sink beside one worker.

Two figures a length, because they answer different questions. *Ordinary* guests write and
read every frame, on one core for both, and are often the slow side. *Raw* ones write each
frame once and then only its number, which leaves the switch as the slow side; but nobody
touches the payload any more, so it stays in the worker's cache and large frames look
better than guests that use their data would see.

Frames are numbered, and what the sink counted must be what the switch counted; so there
must be no other ports, whose broadcasts would be flooded to the sink.

The state of the machine matters more than the switch (a cache line may take 55 or 310 ns
between two virtual cores, and that flips): this shows what is here now, `bench/` compares.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Final, NamedTuple

from vswitch.demo.screen import Screen
from vswitch.demo.switch import Switch
from vswitch.guest import Guest
from vswitch.guest.traffic import Generator, Sink, Totals, run

_LENGTHS: Final = (64, 1500)
_SLICES: Final = 3
_SLICE_S: Final = 0.4
_WARM_S: Final = 0.05
_WAYS: Final = (("ordinary", False), ("raw", True))


class _Work(NamedTuple):
    """What the switch has done so far."""

    delivered: int  # frames given to the receiver
    dropped: int  # frames that its ring had no room for
    frames: int
    busy_cycles: int


def measure(switch: Switch, screen: Screen) -> None:
    """Add two ports, run frames from one to the other, and show the rates."""
    for name in ("gen1", "gen2"):
        switch.do("add-port", f"{name}.sock")
    folder = switch.directory
    with (
        _beside_the_workers(switch),
        Guest.connect(folder / "gen1.sock") as sender,
        Guest.connect(folder / "gen2.sock") as receiver,
    ):
        receiver.send_all(_announcement(receiver))
        with screen.waiting("compiling the traffic generator"):
            _run(sender, receiver, _LENGTHS[0], _WARM_S, raw=True)
        screen.note("ordinary: guests write and read each frame; raw: only its number,")
        screen.note("so the payload stays in cache. Median of slices, least to most.")
        screen.note("On a virtual machine the host's placing of our two cores changes")
        screen.note("all of this two to four times, from one minute to the next.")
        for length in _LENGTHS:
            for name, raw in _WAYS:
                with screen.waiting(f"{length}-byte frames, {name}"):
                    text, ok = _measure(switch, sender, receiver, length, raw=raw)
                screen.check(f"{length:4} bytes, {name:8}  {text}", ok=ok)


def _measure(
    switch: Switch, sender: Guest, receiver: Guest, length: int, *, raw: bool
) -> tuple[str, bool]:
    """The line to show, and whether both sides counted the same frames."""
    before = _work(switch)
    slices = [_run(sender, receiver, length, _SLICE_S, raw=raw) for _ in range(_SLICES)]
    work = _Work(*(b - a for a, b in zip(before, _work(switch), strict=True)))
    rates = [totals.mpps for totals in slices]
    rate = median(rates)
    cycles = work.busy_cycles / max(work.frames, 1)
    text = (
        f"{rate:5.1f} Mpps ({min(rates):.1f} to {max(rates):.1f}) "
        f"{rate * length * 8 / 1e3:6.1f} Gb/s {cycles:4.0f} cycles a frame"
    )
    received = sum(totals.received for totals in slices)
    lost = sum(totals.sent - totals.received for totals in slices)
    harmed = sum(t.reordered + t.duplicates + t.corrupt + t.foreign for t in slices)
    ok = 0 < received == work.delivered and lost == work.dropped and harmed == 0
    return text, ok


def _run(
    sender: Guest, receiver: Guest, length: int, seconds: float, *, raw: bool
) -> Totals:
    generator = Generator(sender, receiver.mac, length=length, raw=raw)
    return run([generator], [Sink(receiver, raw=raw)], seconds)


def _announcement(guest: Guest) -> list[bytes]:
    """A broadcast frame, from which the switch learns where the guest is."""
    return [(b"\xff" * 6 + guest.mac + b"\x88\xb5").ljust(60, b"\0")]


def _work(switch: Switch) -> _Work:
    stats = switch.ask("stats")
    receiver = stats["ports"]["gen2"]
    workers = stats["workers"].values()
    return _Work(
        receiver["tx_frames"],
        receiver["tx_drop_ring_full"],
        sum(worker["frames"] for worker in workers),
        sum(worker["busy_cycles"] for worker in workers),
    )


@contextmanager
def _beside_the_workers(switch: Switch) -> Iterator[None]:
    """Keep the generator away from the processors of active workers."""
    ours = os.sched_getaffinity(0)
    workers = switch.ask("show")["workers"]
    theirs = {worker["cpu"] for worker in workers if worker["role"] == "active"}
    os.sched_setaffinity(0, ours - theirs or ours)
    try:
        yield
    finally:
        os.sched_setaffinity(0, ours)
