"""Workers that die at random moments under a checked stream; a seed repeats the choice."""

import os
import random
import signal
import time
from collections import Counter

from tests.switch import dropped
from tests.system.net import ALL_CPUS, BURST, RECEIVER, SENDER, Stream

RINGS = 2  # on a frame's way
LATEST_S = 0.05  # after frames were seen to flow
ENOUGH = 2000  # frames of each flow between two acts
LENGTHS = (64, 1500)


class Mayhem:
    """A switch, two senders and a receiver; acts against its workers.

    A stopped worker hangs: it is the manager that kills it.
    """

    def __init__(self, net, seed, *, packed):
        self.net = net
        self.acts = Counter()
        self._random = random.Random(seed)
        self._deaths = 0  # of workers that forwarded
        self.receiver = net.guest("r", packed=packed, **RECEIVER)
        self.senders = [net.guest(name, packed=packed, **SENDER) for name in "ab"]
        net.pin(self.receiver, *self.senders)
        self._names = [net.name_of(guest) for guest in net.guests]
        self._since = self._sessions()
        self._menu = {
            "kill": self._kill_one,
            "kill the heir too": self._kill_heir,
            "kill all": self._kill_all,
            "kill a spare": self._kill_spare,
            "stop": self._stop,
        }
        self._weights = (12, 2, 1, 2, 2)

    def run(self, acts, deadline=None):
        """Act so often, or until the deadline; totals of the stream when it is over."""
        flows = [(sender, self.receiver) for sender in self.senders]
        stream = Stream(*flows, raw=False, verify=True, length=LENGTHS)
        with stream:
            while sum(self.acts.values()) < acts:
                if deadline is not None and time.monotonic() > deadline:
                    break
                self._act()
                stream.wait_for_more(self.net.switch, ENOUGH)
                self._check_stream(stream)
            totals = stream.stop()
        self.check(totals)
        return totals

    def _act(self):
        (name,) = self._random.choices(list(self._menu), self._weights)
        self.net.switch.wait_for(
            lambda: self.net.switch.workers("spare"), lambda: self.net.switch.log
        )
        # The moment is what is random here.
        time.sleep(self._random.uniform(0, LATEST_S))
        self.acts[name] += 1
        self._menu[name]()

    # --- acts ---

    def _end(self, workers, number=signal.SIGKILL):
        """Send workers a signal that ends them, and wait until the manager knows."""
        pids = {worker["pid"] for worker in workers}
        self._deaths += sum(worker["role"] == "active" for worker in workers)
        for pid in pids:
            os.kill(pid, number)
        switch = self.net.switch
        switch.wait_for(
            lambda: not pids.intersection(switch.worker_pids()), f"{pids} to end"
        )

    def _one(self, role):
        return self._random.choice(self.net.switch.workers(role))

    def _kill_one(self):
        self._end([self._one("active")])

    def _kill_heir(self):
        before = {worker["pid"] for worker in self.net.switch.workers("active")}
        self._end([self._one("active")])
        heirs = [
            worker
            for worker in self.net.switch.workers("active")
            if worker["pid"] not in before
        ]
        self._end(heirs)

    def _kill_all(self):
        self._end(self.net.switch.workers())

    def _kill_spare(self):
        self._end([self._one("spare")])

    def _stop(self):
        self._end([self._one("active")], signal.SIGSTOP)

    # --- what has to hold ---

    @property
    def bound(self):
        """Frames that the dead may have taken with them, or moved twice."""
        return self._deaths * RINGS * BURST

    def _sessions(self):
        ports = {port["name"]: port for port in self.net.switch.ask("show")["ports"]}
        return [(ports[name]["since"], ports[name]["state"]) for name in self._names]

    def _check_stream(self, stream):
        for sink in stream.sinks:
            damaged = int(sink.flows["corrupt"].sum())
            assert damaged == 0, f"{damaged} frames are damaged"

    def check(self, totals):
        """No session was touched, no byte is wrong, and what is missing is bounded."""
        assert self._sessions() == self._since
        assert totals.foreign == totals.corrupt == totals.reordered == 0, totals
        counted = dropped(self.net.switch.counters("r"), "tx")
        missing = totals.sent - totals.received - counted
        assert totals.duplicates + missing <= self.bound, (totals, counted)
        for name in self._names:
            counters = self.net.switch.counters(name)
            seen = counters["rx_forwarded"] + counters["rx_flooded"]
            off = counters["rx_frames"] - seen - dropped(counters, "rx")
            assert abs(off) <= self._deaths * BURST, (name, off)


def options(workers, spares):
    return "--workers", workers, "--spares", spares, "--cpus", ALL_CPUS
