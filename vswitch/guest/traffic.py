"""Numbered traffic between guests: rates, losses, order, content, wake-up times.

    totals = run([Generator(a, dst=b)], [Sink(b)], seconds=1.0)
    print(totals.mpps, totals.lost)

One call drives all its rings in turn on the calling thread, without the GIL: for full
speed put it on a core of its own. Generators and sinks keep their numbers from call to
call. See `stream` for what raw and built mean.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Final

import numpy as np

from ports.native import jit, rdtsc, store_any_u16
from vswitch.guest import histogram, stream
from vswitch.guest import ring as driver
from vswitch.guest.errors import GuestError
from vswitch.guest.guest import Guest, mac_bytes
from vswitch.guest.layout import Layout

ETHERTYPE: Final = 0x88B5  # for local experiments, IEEE 802
_NO_LIMIT: Final = 1 << 39
_ROOM: Final = 1 << 20
_FINISH_S: Final = 10.0
_MOST_ADDRESSES: Final = 1 << 16
_SWEEP_S: Final = 0.001
_COUNTED: Final = ("lost", "reordered", "duplicates", "corrupt", "received")


@dataclass
class Totals:
    """What one `run` did; the counts are of this run alone."""

    sent: int = 0
    received: int = 0
    bytes: int = 0  # of frames received
    foreign: int = 0
    lost: int = 0
    longest_gap: int = 0  # of all runs
    reordered: int = 0
    duplicates: int = 0
    corrupt: int = 0
    missed: int = 0  # not sent by a paced generator, as the ring was full
    late: int = 0  # not sent by one, as it had no processor; nobody's loss
    cycles: int = 0
    seconds: float = 0.0  # of the part in which frames were sent

    @property
    def mpps(self) -> float:
        """Million frames received a second."""
        return self.received / self.seconds / 1e6 if self.seconds else 0.0

    @property
    def gbps(self) -> float:
        """Gigabits of frames received a second."""
        return self.bytes * 8 / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def clean(self) -> bool:
        """Whether nothing was lost, doubled, out of order or damaged."""
        bad = self.lost + self.reordered + self.duplicates + self.corrupt
        return bad == 0 and self.sent == self.received


@dataclass
class Latencies:
    """Times from sending a frame to having it, in microseconds."""

    rounds: int
    us: "np.ndarray[Any, np.dtype[np.floating[Any]]]"  # of those that arrived

    @property
    def arrived(self) -> int:
        """How many came before the time was up; fewer than `rounds`: one was late."""
        return int(self.us.size)

    @property
    def max_us(self) -> float:
        """The slowest."""
        return float(self.us.max(initial=0.0))

    def percentile(self, percent: float) -> float:
        """What `percent` of the frames did not exceed."""
        return float(np.percentile(self.us, percent)) if self.us.size else 0.0


class Generator:
    """Sends numbered frames from one ring of a guest."""

    def __init__(
        self,
        guest: Guest,
        dst: Guest | str | bytes,
        length: int | tuple[int, int] = 64,
        *,
        addresses: int = 1,
        flow: int = 0,
        queue: int = 0,
        raw: bool = True,
        verify: bool = False,
        burst: int = 64,
        frames: int = _NO_LIMIT,
        pace: float = 0.0,
        timed: bool = False,
        mix: Sequence[int] = (),
    ) -> None:
        """Set up a stream.

        Args:
            guest: Who sends.
            dst: To whom.
            length: Bytes of a frame, or a range of lengths; raw takes only one.
            addresses: How many destinations take turns: `spread(dst, addresses)`.
            flow: A number that tells streams to one sink apart, below its `flows`.
            queue: The queue pair to send on.
            raw: Write frames once, then only number them.
            verify: Fill each payload anew for the sink to check; not raw.
            burst: Frames at a time.
            frames: How many to send in all.
            pace: Frames a second; 0: as many as go.
            timed: Say in frames when they were due, for `Sink(timed=True)`; raw only.
            mix: Lengths in place of `length`, which the slots of the ring have in turn;
                raw in a split ring only.
        """
        least, most = (length, length) if isinstance(length, int) else length
        layout = guest.layouts[2 * queue + 1]
        if mix:
            self._check_mix(layout, raw=raw)
            least, most = min(mix), max(mix)
        self._check(layout, least, most, raw=raw and not mix, verify=verify)
        if timed and (not raw or least < stream.MIN_TIMED):
            raise GuestError(
                f"cannot time frames of {least} bytes, raw={raw}: it takes raw=True and "
                f"{stream.MIN_TIMED} bytes"
            )
        self.layout = layout
        lengths = tuple(mix) or (most,)
        self._lengths = [
            lengths[slot % len(lengths)] for slot in range(layout.plan.size)
        ]
        mac = dst.mac if isinstance(dst, Guest) else mac_bytes(dst)
        _check_addresses(addresses)
        start = mac + guest.mac + ETHERTYPE.to_bytes(2, "big")
        start += least.to_bytes(2, "little") if least == most else bytes(2)
        self._template = np.zeros(stream.WORD_OFFSET, np.uint8)
        self._template[: len(start)] = np.frombuffer(start, np.uint8)
        self.table = np.zeros(1, stream.GENERATOR)
        self.record = self.table[0]
        _assign(
            self.record,
            ring=_address(guest.rings, 2 * queue + 1),
            raw=raw,
            fill=verify,
            burst=burst,
            flow=flow,
            limit=frames,
            min_len=least,
            max_len=most,
            template=self._template.ctypes.data,
            address_mask=addresses - 1,
            timed=timed,
        )
        self.pace(pace)

    @staticmethod
    def _check(
        layout: Layout, least: int, most: int, *, raw: bool, verify: bool
    ) -> None:
        room = int(layout.ring["buffer_len"] - layout.ring["header_len"])
        if not stream.MIN_LENGTH <= least <= most <= room:
            raise GuestError(
                f"cannot send frames of {least} to {most} bytes: a numbered frame has "
                f"{stream.MIN_LENGTH} to {room} (the guest's tx_buffer_len)"
            )
        if raw and (least != most or verify or layout.plan.chain != 1):
            raise GuestError(
                "cannot send raw: it takes one length, no verify and one descriptor "
                "a frame (use raw=False)"
            )

    @staticmethod
    def _check_mix(layout: Layout, *, raw: bool) -> None:
        if not raw or int(layout.ring["packed"]) or layout.plan.chain != 1:
            raise GuestError(
                "cannot mix lengths: it takes raw=True, a split ring and one descriptor "
                "a frame (use a range of lengths and raw=False)"
            )

    def pace(self, frames_per_s: float) -> None:
        """Send so many a second from now on; 0: as many as go.

        One that is due while the ring is full is missed, which is counted.
        """
        if frames_per_s < 0:
            raise GuestError(f"cannot send {frames_per_s:g} frames a second")
        cycles = tsc_hz() / frames_per_s if frames_per_s else 0.0
        self.record["pace"] = round(cycles * (1 << stream.PACE_SHIFT))

    @property
    def sent(self) -> int:
        """Frames so far."""
        return int(self.record["next"])

    @property
    def length(self) -> float:
        """Bytes of a frame, the mean of a mix, the most of a range."""
        return sum(self._lengths) / len(self._lengths)

    def prepare(self) -> None:
        """Write what stays the same in all frames; raw only."""
        self.record["begin"] = 0  # of its pace
        if not self.record["raw"]:
            return
        layout, ring = self.layout, self.layout.ring
        driver.reap(ring)
        if layout.outstanding:
            raise GuestError("cannot send raw: earlier frames are still in the ring")
        header = int(ring["header_len"])
        layout.buffers[:, :header] = 0
        layout.buffers[:, header : header + stream.WORD_OFFSET] = self._template
        driver.raw_prepare(ring, header + self._lengths[0])
        if self.record["min_len"] == self.record["max_len"]:
            return
        for slot, length in enumerate(self._lengths):  # a mix
            driver.describe(ring, slot, header + length)
            at = int(ring["buffers"]) + slot * int(ring["stride"]) + header
            store_any_u16(at + stream.LENGTH_OFFSET, length)

    def finish(self, deadline: float) -> None:
        """Wait until every frame came back: what was to arrive has arrived."""
        while not self._is_idle():
            if time.monotonic() > deadline:
                raise GuestError("the switch keeps frames that were sent")
            time.sleep(0)
        if self.record["raw"]:
            self.layout.all_free()

    def _is_idle(self) -> bool:
        layout, size = self.layout, self.layout.plan.size
        if self.record["raw"]:
            return driver.raw_room(layout.ring, size) == size
        driver.reap(layout.ring)
        return layout.outstanding == 0


def spread(mac: str | bytes, count: int) -> list[bytes]:
    """The addresses that a generator with so many of them sends to.

    Their first four bytes are those of `mac`; with one address it is `mac` itself.
    """
    _check_addresses(count)
    raw = mac_bytes(mac)
    if count == 1:
        return [raw]
    return [raw[:4] + number.to_bytes(2, "little") for number in range(count)]


def _check_addresses(count: int) -> None:
    if not 0 < count <= _MOST_ADDRESSES or count & (count - 1):
        raise GuestError(
            f"cannot send to {count} addresses: it takes a power of two up to "
            f"{_MOST_ADDRESSES}"
        )


class Sink:
    """Counts numbered frames at one ring of a guest."""

    def __init__(
        self,
        guest: Guest,
        flows: int = 1,
        *,
        queue: int = 0,
        raw: bool = True,
        verify: bool = False,
        burst: int = 64,
        timed: bool = False,
    ) -> None:
        """Set up the receiver of streams 0 to `flows` - 1.

        Args:
            guest: Who receives.
            flows: How many streams it tells apart.
            queue: The queue pair to receive from.
            raw: Look at numbers alone, where they are.
            verify: Compare the payload; not raw.
            burst: Frames at a time.
            timed: Note how late frames come; of streams that are all timed, raw only.
        """
        if not 0 < flows <= stream.MAX_FLOWS:
            raise GuestError(f"cannot tell {flows} flows apart: 1 to 256 are possible")
        if timed and not raw:
            raise GuestError("cannot time frames: it takes raw=True")
        self.layout = guest.layouts[2 * queue]
        self._times = histogram.new()
        self.flows = np.zeros(flows, stream.FLOW)
        self._scratch = np.zeros(0 if raw else _ROOM, np.uint8)
        self.table = np.zeros(1, stream.SINK)
        self.record = self.table[0]
        _assign(
            self.record,
            ring=_address(guest.rings, 2 * queue),
            raw=raw,
            check=verify,
            burst=burst,
            flows=self.flows.ctypes.data,
            n_flows=flows,
            scratch=self._scratch.ctypes.data,
            room=self._scratch.size,
            times=self._times.ctypes.data if timed else 0,
        )

    def times_us(self, *percents: float) -> list[float]:
        """What so many per cent of the times since the last call did not exceed.

        From when a frame was due to when it was found, in microseconds, to 1/64.
        """
        found = [histogram.percentile(self._times, percent) for percent in percents]
        self._times[:] = 0
        return [cycles * 1e6 / tsc_hz() for cycles in found]

    def prepare(self) -> None:
        """Drop what arrived before; make sure that raw will do."""
        ring = self.layout.ring
        length = np.zeros(1, np.int64)
        drop = np.zeros(_ROOM, np.uint8)
        while driver.receive_frames(
            ring, int(drop.ctypes.data), drop.size, length, length, 0
        ):
            pass
        if self.record["raw"] and not driver.raw_fits(ring):
            raise GuestError(
                "cannot receive raw: it takes one descriptor a buffer, all of them "
                "offered, in order (use raw=False)"
            )


def run(
    generators: Sequence[Generator],
    sinks: Sequence[Sink],
    seconds: float = 1.0,
    linger: float = 0.05,
    enough: int = _NO_LIMIT,
) -> Totals:
    """Send for `seconds` or up to the limits, then receive until nothing comes any more.

    Args:
        generators: Who sends, in turn.
        sinks: Who receives, in turn with them.
        seconds: How long to send.
        linger: How long nothing has to come before it is over.
        enough: How many frames, over all sinks, end it at once.

    Raises:
        GuestError: A ring cannot be used in this way, or the switch kept frames.
    """
    for sink in sinks:
        sink.prepare()
    for generator in generators:
        generator.prepare()
    before = _count(generators, sinks)
    hz = tsc_hz()
    offsets, lengths = np.zeros((2, 1024), np.int64)
    sending = np.array([g.record for g in generators], stream.GENERATOR)
    receiving = np.array([s.record for s in sinks], stream.SINK)

    def exchange(generating: int, seconds: float, linger: float) -> int:
        return stream.exchange(
            int(sending.ctypes.data),
            generating,
            int(receiving.ctypes.data),
            len(receiving),
            int(seconds * hz),
            int(linger * hz),
            enough,
            offsets,
            lengths,
        )

    cycles = exchange(len(sending), seconds, linger)
    for generator, row in zip(generators, sending, strict=True):
        generator.table[0] = row
        generator.finish(time.monotonic() + _FINISH_S)
    # A switch that had no processor for a while may have been silent for longer than
    # we linger; by now it has delivered everything.
    exchange(0, 0.0, _SWEEP_S)
    for sink, row in zip(sinks, receiving, strict=True):
        sink.table[0] = row
    after = _count(generators, sinks)
    totals = Totals(
        **{
            field.name: getattr(after, field.name) - getattr(before, field.name)
            for field in fields(Totals)
        }
    )
    totals.longest_gap = after.longest_gap
    totals.cycles, totals.seconds = cycles, cycles / hz
    return totals


def hammer(
    tx: Guest,
    rx: Guest,
    rounds: int,
    gap_us: tuple[float, float] = (0.0, 100.0),
    timeout: float = 1.0,
) -> Latencies:
    """Send one frame at a time, a varying gap after the one before arrived.

    With gaps around the time after which a worker goes to sleep, this finds lost kicks:
    it ends at the first frame that is not there after `timeout` seconds.
    """
    generator = Generator(tx, rx, raw=False, burst=1)
    sink = Sink(rx, raw=False, burst=64)
    sink.prepare()
    hz = tsc_hz()
    offsets, lengths = np.zeros((2, 64), np.int64)
    times = np.zeros(rounds, np.int64)
    arrived = stream.hammer(
        generator.record,
        sink.record,
        int(gap_us[0] * hz / 1e6),
        int(gap_us[1] * hz / 1e6),
        int(timeout * hz),
        offsets,
        lengths,
        times,
    )
    return Latencies(rounds, times[:arrived] * (1e6 / hz))


def latency(tx: Guest, rx: Guest, rounds: int) -> Latencies:
    """The time of single frames with no gap between them."""
    return hammer(tx, rx, rounds, (0.0, 0.0))


@cache
def tsc_hz() -> float:
    """Cycles a second of the counter that `rdtsc` reads."""
    _cycles()
    began_ns, began = time.perf_counter_ns(), _cycles()
    while time.perf_counter_ns() - began_ns < 20_000_000:
        pass
    took_ns, took = time.perf_counter_ns() - began_ns, _cycles() - began
    return took / took_ns * 1e9


@jit
def _cycles() -> int:
    return rdtsc()


def _count(generators: Sequence[Generator], sinks: Sequence[Sink]) -> Totals:
    totals = Totals(sent=sum(generator.sent for generator in generators))
    for generator in generators:
        totals.missed += int(generator.record["missed"])
        totals.late += int(generator.record["late"])
    sent = {
        int(generator.record["flow"]): generator.length
        for generator in generators
        if generator.record["raw"]
    }
    for sink in sinks:
        totals.foreign += int(sink.record["foreign"])
        for name in _COUNTED:
            value = getattr(totals, name) + int(sink.flows[name].sum())
            setattr(totals, name, value)
        longest = int(sink.flows["longest_gap"].max())
        totals.longest_gap = max(totals.longest_gap, longest)
        totals.bytes += int(sink.record["bytes"])
        if sink.record["raw"]:
            # Lengths are not looked at; those of the stream tell.
            for flow, length in sent.items():
                if flow < len(sink.flows):
                    received = int(sink.flows[flow]["received"])
                    totals.bytes += round(received * length)
    return totals


def _assign(record: Any, **values: int) -> None:  # noqa: ANN401 a structured scalar
    for name, value in values.items():
        record[name] = int(value)


def _address(records: "np.ndarray[Any, np.dtype[Any]]", row: int) -> int:
    return int(records.ctypes.data) + row * records.dtype.itemsize
