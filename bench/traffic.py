"""Numbered frames through any switch: guests at its ports, and slices of traffic.

The generator is the built-in driver's. Raw, it fills its buffers once and then writes a
number into each frame and moves indexes; the sink checks every number. What it counted has
to be what the switch counted, or there is no figure.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple, Self

import numpy as np

from bench import machine
from bench.daemon import START_S
from bench.machine import Place
from bench.peers import System, Work
from vswitch.guest import Guest
from vswitch.guest.traffic import (
    ETHERTYPE,
    Generator,
    Sink,
    Totals,
    hammer,
    run,
    spread,
)

# Who sends to whom.
PAIRS: Final = "pairs"  # every first port to every second one
RING: Final = "ring"  # each to the next
TO_ALL: Final = "to all"  # the first to all others, by broadcast

_HEADER_LEN: Final = 12
_ROOM: Final = 2048
_WARM_S: Final = 0.1
_TRIAL_S: Final = 0.02
_LOOK_S: Final = 0.0005
_LINGER_S: Final = 0.05
_PATIENCE_S: Final = 5.0
# Counts that change when nothing is sent.
_LATE: Final = ("received", "foreign", "lost", "reordered", "duplicates", "corrupt")
_SINGLES: Final = 5000
WAKES: Final = 50
SILENCE_US: Final = 20_000.0
_LAPS: Final = 3  # some switches take the slow way for an address more than once
_BROADCAST: Final = b"\xff" * 6
_SHORTEST: Final = 60


class CountsError(Exception):
    """What two sides counted does not agree."""


class Load(NamedTuple):
    """What is sent, and from where to where."""

    length: int = 64
    pairs: int = 1
    both_ways: bool = False
    packed: bool = False
    addresses: int = 1  # destinations a sender
    raw: bool = True
    dpdk: bool = False  # DPDK's generator instead of ours; it has one pair
    shape: str = PAIRS
    mix: tuple[int, ...] = ()  # lengths that take turns, `length` being the longest
    timed: bool = False  # frames say when they were due

    @property
    def copies(self) -> int:
        """How many times each frame arrives."""
        return 2 * self.pairs - 1 if self.shape == TO_ALL else 1


class Slice(NamedTuple):
    """One stretch of traffic."""

    mpps: float  # received; of broadcasts, all copies
    lost: float  # of what was to arrive, from 0 to 1
    reordered: float | None  # of those received, where they are numbered
    cycles: float | None  # busy ones a copy to arrive, by the system's own account
    round_trip_ns: float  # the longer one of before and after
    waited: float  # for a processor, of the time: the generator's and the forwarder's


class Idle(NamedTuple):
    """A system with next to no traffic; of times, the median and what 99 % do not exceed."""

    single_us: tuple[float, float]  # of a frame when the one before has arrived
    wake_us: tuple[float, float]  # of a frame after a silence
    cpu_percent: float
    memory_mib: float  # its share of what its processes have in memory
    round_cycles: float | None  # of a round over empty rings


class Streams:
    """A load between guests of a system."""

    def __init__(self, system: System, load: Load, guests: list[Guest]) -> None:
        """Lay out who sends to whom, and let the switch learn that."""
        self.system, self.load = system, load
        self._senders, self._receivers = _ends(load, guests)
        to_all = load.shape == TO_ALL
        targets = [_BROADCAST] if to_all else [one.mac for one in self._receivers]
        self.generators = [
            Generator(
                *(sender, to, load.length),
                addresses=load.addresses,
                raw=load.raw,
                mix=load.mix,
                timed=load.timed,
            )
            for sender, to in zip(self._senders, targets, strict=True)
        ]
        self.sinks = [
            Sink(receiver, raw=load.raw, timed=load.timed)
            for receiver in self._receivers
        ]
        with system.forwarding():
            self._introduce()

    def send(self, seconds: float, linger: float = _LINGER_S) -> Totals:
        """Send for so long, at the pace that was set or as much as goes."""
        return run(self.generators, self.sinks, seconds, linger)

    def pace(self, mpps: float) -> None:
        """Send so many million frames a second in all from now on; 0: as many as go."""
        for generator in self.generators:
            generator.pace(mpps * 1e6 / len(self.generators))

    def times_us(self, *percents: float) -> list[float]:
        """How long frames took to the first sink, as its `times_us` tells."""
        return self.sinks[0].times_us(*percents)

    def _introduce(self) -> None:
        """Let the switch learn every address, and wait until all streams arrive."""
        for guest in self._senders:
            _announce(guest, [guest.mac])
        for guest in self._receivers:
            _announce(guest, spread(guest.mac, self.load.addresses))
        deadline = time.monotonic() + START_S
        while not self._is_known():
            expect_frames_by(deadline, self.system.name)
            self.send(_TRIAL_S)
            # Other threads of the system share this processor, and have to learn, too.
            time.sleep(_TRIAL_S)

    def _is_known(self) -> bool:
        """Whether every stream has come through, and all its addresses several times."""
        enough = _LAPS * self.load.addresses
        return all(one.sent >= enough for one in self.generators) and all(
            int(sink.flows["received"][0]) > 0 for sink in self.sinks
        )


def _ends(load: Load, guests: list[Guest]) -> tuple[list[Guest], list[Guest]]:
    """Who sends, and who receives; the first sends to the first, and so on."""
    if load.shape == TO_ALL:
        return guests[:1], guests[1:]
    if load.shape == RING:
        return guests, guests[1:] + guests[:1]
    senders, receivers = guests[::2], guests[1::2]
    if load.both_ways:
        return senders + receivers, receivers + senders
    return senders, receivers


class Wiring(NamedTuple):
    """What guests are for; loads of the same one can share them."""

    guests: int
    packed: bool
    room: int  # bytes of a buffer

    @classmethod
    def of(cls, load: Load) -> Self:
        """What a load needs."""
        room = max(_ROOM, load.length + _HEADER_LEN)
        return cls(2 * load.pairs, load.packed, room)


@contextmanager
def attached(system: System, wiring: Wiring, queue_size: int) -> Iterator[list[Guest]]:
    """Guests at a system's ports; at the end they are gone."""
    guests: list[Guest] = []
    try:
        with system.attaching():
            for number, path in enumerate(system.paths[: wiring.guests]):
                guest = Guest(
                    path,
                    mode="server" if system.guests_listen else "client",
                    # The last two bytes are for many addresses.
                    mac=bytes([2, 0, 0, number + 1, 0, 0]),
                    rx_buffer_len=wiring.room,
                    tx_buffer_len=wiring.room,
                    packed=wiring.packed,
                    queue_size=queue_size,
                    timeout=START_S,
                )
                guests.append(guest)
                guest.open()
                # VPP starts a ring only at its first kick, and asks for none before.
                for kick in guest.rings["kick_fd"]:
                    os.eventfd_write(int(kick), 1)
        yield guests
    finally:
        with system.attaching():
            for guest in guests:
                guest.close()


def measure(it: Streams, place: Place, seconds: float) -> Slice:
    """One slice of its load.

    Raises:
        CountsError: The figures would be worth nothing.
    """
    system = it.system
    near = machine.round_trip_ns(place.other, place.cpu)
    with system.forwarding():
        before = system.work()
        agreed(it, it.send(_WARM_S), before)
        before = system.work()
        waited = waited_s(system, place)
        totals = it.send(seconds)
        waited = waited_s(system, place) - waited
        totals, work = agreed(it, totals, before)
    near = max(near, machine.round_trip_ns(place.other, place.cpu))
    due = max(totals.sent * it.load.copies, 1)
    return Slice(
        totals.mpps,
        1 - totals.received / due,
        totals.reordered / max(totals.received, 1),
        None if work.cycles is None else work.cycles / due,
        near,
        waited / totals.seconds,
    )


def idle(system: System, seconds: float, queue_size: int) -> Idle:
    """What a system takes with two guests that send nothing."""
    load = Load(raw=False)
    with attached(system, Wiring.of(load), queue_size) as guests:
        Streams(system, load, guests)
        with system.forwarding():
            single, wake = _times(guests[0], guests[1])
        return Idle(single, wake, *_idle(system, seconds))


def _times(sender: Guest, receiver: Guest) -> list[tuple[float, float]]:
    """Of single frames, and of those after a silence."""
    found = []
    for rounds, gap_us in (
        (_SINGLES // 10, 0.0),
        (_SINGLES, 0.0),
        (WAKES, SILENCE_US),
    ):
        one = hammer(sender, receiver, rounds, (gap_us, gap_us))
        if one.arrived < rounds:
            message = f"a frame of {rounds} was lost while nothing else was sent"
            raise CountsError(message)
        found.append((one.percentile(50), one.percentile(99)))
    return found[1:]  # the first ones may have taken a slow way


def _idle(system: System, seconds: float) -> tuple[float, float, float | None]:
    """Its CPU, memory and cycles a round meanwhile, as in `Idle`."""
    with system.forwarding():
        before = system.work()
        began, begin = machine.cpu_seconds(system.group), time.monotonic()
        time.sleep(seconds)
        took = machine.cpu_seconds(system.group) - began
        percent = 100 * took / (time.monotonic() - begin)
        work = system.work().since(before)
    memory = machine.memory_mib(system.group)
    if not work.idle_cycles or not work.idle_rounds:
        return percent, memory, None
    return percent, memory, work.idle_cycles / work.idle_rounds


def _announce(guest: Guest, addresses: list[bytes]) -> None:
    ethertype = ETHERTYPE.to_bytes(2, "big")
    frames = [_BROADCAST + address + ethertype for address in addresses]
    rows = np.zeros((len(frames), _SHORTEST), np.uint8)
    rows[:, : len(frames[0])] = np.frombuffer(b"".join(frames), np.uint8).reshape(
        len(frames), -1
    )
    # Looks at the ring instead of waiting for a call: VPP's main thread takes some away.
    deadline = time.monotonic() + START_S
    sent = guest.send(rows)
    while sent < len(rows) or guest.outstanding():
        if time.monotonic() > deadline:
            message = f"the switch took {sent} of {len(rows)} frames in {START_S:.0f} s"
            raise CountsError(message)
        time.sleep(_LOOK_S)
        sent += guest.send(rows[sent:])


def waited_s(system: System, place: Place) -> float:
    """How long this thread and the system's forwarding one had no processor so far."""
    return machine.own_wait_s() + machine.waited_s(system.group, place.cpu)


def agreed(it: Streams, totals: Totals, before: Work) -> tuple[Totals, Work]:
    """What came of the frames of `totals` by both sides' counts, the system's since then.

    Raises:
        CountsError: They do not come to agree.
    """

    def counts() -> Iterator[tuple[Totals, Work]]:
        while True:
            yield totals, it.system.work().since(before)
            late = it.send(0.0)
            for name in _LATE:
                setattr(totals, name, getattr(totals, name) + getattr(late, name))

    return first_agreeing(it.system.name, counts(), it.load.copies)


def first_agreeing(
    name: str, counts: Iterator[tuple[Totals, Work]], copies: int = 1
) -> tuple[Totals, Work]:
    """The first of these counts of two sides, taken one after the other, that agree.

    A system that has taken frames may have had no processor to pass them on yet.

    Raises:
        CountsError: None do in some seconds.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        totals, work = next(counts)
        try:
            check(name, totals, work, copies)
        except CountsError:
            if time.monotonic() > deadline:
                raise
        else:
            return totals, work


def expect_frames_by(deadline: float, name: str) -> None:
    """Stop when it is later than that, and the system forwards nothing still."""
    if time.monotonic() > deadline:
        message = f"{name} forwards nothing within {START_S:.0f} s"
        raise CountsError(message)


def check(name: str, totals: Totals, work: Work, copies: int = 1) -> None:
    """Stop where the figures would be worth nothing."""
    harmed = totals.duplicates + totals.corrupt + totals.foreign
    lost = copies * totals.sent - totals.received
    counted = {
        "taken": (work.frames, totals.sent),
        "delivered": (work.delivered, totals.received),
        "dropped": (work.dropped, lost),
    }
    wrong = {
        what: f"{theirs}, not {ours}"
        for what, (theirs, ours) in counted.items()
        if theirs not in {None, ours}
    }
    if harmed or wrong:
        message = f"{name}: the counts do not agree: {wrong or ''} {totals}"
        raise CountsError(message)
