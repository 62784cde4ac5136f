"""DPDK's generator: its virtio-user drivers at a system's ports, and testpmd behind them.

It is there so that nobody has to believe the built-in driver. One thread does it all, as
there: `net_null` makes frames without touching them, mode `mac` writes their addresses, one
virtio-user driver sends them, another receives, and a second `net_null` throws them away.

Mode `flowgen` would do it alone, but has only one source and one destination, the same at
both ports: a switch that learns would see a guest that jumps from one port to the other.
"""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, NamedTuple

from bench import machine, testpmd
from bench.daemon import START_S
from bench.machine import Place
from bench.peers import System, Work
from bench.traffic import Load, Slice, expect_frames_by, first_agreeing
from vswitch.guest.traffic import Totals

NAME: Final = "DPDK's generator"
_WARM_S: Final = 0.1
_QUIET_S: Final = 0.1  # after so long nothing more comes
_MB: Final = 256
_BUFFERS: Final = 2048  # beside those in rings
# With testpmd's 32 the generator ends at 15 million frames a second, whoever forwards.
_BURST: Final = 16
_TO_ALL: Final = "ff:ff:ff:ff:ff:ff"
# Neighbours forward to each other, so the order of devices says who is behind whom.
_SENDER, _RECEIVER = 1, 2
_MACS: Final = {_SENDER: "02:00:00:00:01:00", _RECEIVER: "02:00:00:00:02:00"}
_COUNTS: Final = re.compile(
    r"statistics for port (\d+) .*?RX-packets: (\d+).*?TX-packets: (\d+)", re.DOTALL
)


class Counts(NamedTuple):
    """What both drivers have counted."""

    at: float  # a time, in seconds
    sent: int
    received: int

    def since(self, before: "Counts") -> "Counts":
        """What came since then, and how long it was."""
        return Counts(
            self.at - before.at,
            self.sent - before.sent,
            self.received - before.received,
        )


class Pair:
    """A load of DPDK's between the first two ports of a system, until `close`."""

    def __init__(
        self, system: System, load: Load, queue_size: int, place: Place
    ) -> None:
        """Attach it, halted, and let the switch learn who is where.

        Raises:
            DaemonError: testpmd does not start.
            CountsError: Nothing comes through.
        """
        self._system, self._place = system, place
        with ExitStack() as owned:
            with system.attaching():
                options = _options(system, load, queue_size, place)
                self._pmd = testpmd.Testpmd("generator", *options)
                owned.callback(self._detach)
            with system.forwarding():
                self._introduce()
            self._owned = owned.pop_all()

    def close(self) -> None:
        """Leave the ports."""
        self._owned.close()

    def measure(self, seconds: float) -> Slice:
        """One slice.

        Raises:
            CountsError: The figures would be worth nothing.
        """
        system, place = self._system, self._place
        near = machine.round_trip_ns(place.other, place.cpu)
        with system.forwarding():
            first, first_work = self._counts(), system.work()
            with self._running():
                time.sleep(_WARM_S)
                waited, work = self._waited(), system.work()
                slice_ = self._moved(seconds)
                work = system.work().since(work)
                waited = self._waited() - waited
            counts = self._counts_since(first, first_work)
            totals, _ = first_agreeing(system.name, counts)
        near = max(near, machine.round_trip_ns(place.other, place.cpu))
        return Slice(
            slice_.received / slice_.at / 1e6,
            totals.lost / max(totals.sent, 1),
            None,
            None if work.cycles is None else work.cycles / max(slice_.sent, 1),
            near,
            waited / slice_.at,
        )

    def _moved(self, seconds: float) -> Counts:
        """What comes in so long; longer, if nobody who is to move it has a processor."""
        before, deadline = self._counts(), time.monotonic() + START_S
        time.sleep(seconds)
        while not (moved := self._counts().since(before)).received:
            expect_frames_by(deadline, self._system.name)
        return moved

    def _counts_since(
        self, first: Counts, first_work: Work
    ) -> Iterator[tuple[Totals, Work]]:
        """What was sent since then and came of it, by both sides' counts, ever anew."""
        while True:
            self._settle()
            whole = self._counts().since(first)
            lost = whole.sent - whole.received
            totals = Totals(whole.sent, whole.received, lost=lost)
            yield totals, self._system.work().since(first_work)

    def _introduce(self) -> None:
        """Let both say who they are until both have heard each other."""
        ask = self._pmd.ask
        self._address(dict.fromkeys(_MACS, _TO_ALL))
        ask("set fwd rxonly")
        deadline = time.monotonic() + START_S
        while not self._both_have_heard():
            expect_frames_by(deadline, self._system.name)
            ask("start tx_first 1")  # a burst of each
            ask("stop")
        self._settle()
        self._address({_SENDER: _MACS[_RECEIVER], _RECEIVER: _MACS[_SENDER]})
        ask("set fwd mac")

    def _address(self, peers: dict[int, str]) -> None:
        """Say whom each driver sends to."""
        for port, mac in peers.items():
            self._pmd.ask(f"set eth-peer {port} {mac}")

    def _both_have_heard(self) -> bool:
        return all(received for _, received in self._by_port().values())

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._pmd.start()
        try:
            yield
        finally:
            self._pmd.stop()

    def _settle(self) -> None:
        """Send nothing, and receive what is on its way."""
        self._pmd.ask("set fwd rxonly")
        with self._running():
            now = last = self._counts()
            while now.at - last.at < _QUIET_S:
                now = self._counts()
                last = now if now.received != last.received else last
        self._pmd.ask("set fwd mac")

    def _by_port(self) -> dict[int, tuple[int, int]]:
        """What each driver sent and received."""
        found = _COUNTS.findall(self._pmd.ask("show port stats all"))
        by_port = {int(port): (int(tx), int(rx)) for port, rx, tx in found}
        return {port: by_port[port] for port in _MACS}

    def _counts(self) -> Counts:
        asked = time.monotonic()
        sent, received = map(sum, zip(*self._by_port().values(), strict=True))
        return Counts((asked + time.monotonic()) / 2, sent, received)

    def _waited(self) -> float:
        own = machine.waited_s(self._pmd.pid, self._place.other)
        return own + machine.waited_s(self._system.group, self._place.cpu)

    def _detach(self) -> None:
        with self._system.attaching():
            self._pmd.close()


def _options(
    system: System, load: Load, queue_size: int, place: Place
) -> tuple[list[str], list[str]]:
    """DPDK's options, and testpmd's."""
    room = max(testpmd.ROOM, load.length) + testpmd.HEADROOM
    ring = f"queue_size={queue_size},packed_vq={load.packed:d}"
    ring += f",server={system.guests_listen:d}"
    drivers = [
        f"net_virtio_user{port},path={path},mac={mac},{ring}"
        for (port, mac), path in zip(_MACS.items(), system.paths[:2], strict=True)
    ]
    source = f"net_null0,size={load.length}"
    drain = f"net_null1,size={load.length},no-rx={not load.both_ways:d}"
    eal = [
        *("--no-huge", "-m", str(_MB), f"--lcores=0@{place.other},1@{place.other}"),
        *(f"--vdev={device}" for device in (source, *drivers, drain)),
    ]
    application = [
        *("--forward-mode=mac", "--no-flush-rx", f"--burst={_BURST}"),
        *(f"--mbuf-size={room}", f"--total-num-mbufs={4 * queue_size + _BUFFERS}"),
    ]
    return eal, application
