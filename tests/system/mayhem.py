"""Acts at random moments under a checked stream; a seed repeats the choice.

What there is to choose from, and what it may cost, is in `acts`.
"""

import os
import random
import signal
import time
from collections import Counter
from typing import NamedTuple

from tests.switch import dropped
from tests.system import acts
from tests.system.net import ALL_CPUS, BURST, RECEIVER, SENDER, Stream

RINGS = 2  # on a frame's way
LATEST_S = 0.05  # after frames were seen to flow
ENOUGH = 2000  # frames of each flow between two acts
LENGTHS = (64, 1500)
EACH = 32  # frames of a sender at a time: so two cannot overflow the receiver
SETTLED_S = 20.0
# Counted whenever a worker that has the receiver's ring gets no CPU, or dies.
BUSY = {"tx_drop_lock_busy"}


class Seen(NamedTuple):
    """How things stand between two acts."""

    deaths: int  # of workers that forwarded
    active: set[int]
    sessions: dict[str, float]  # since when, of ports that are up
    off: int  # frames that are missing or came twice
    drops: Counter[str]  # what is counted of them, on their way in or out
    unbalanced: dict[str, int]  # frames that a port counts under no name, or under two


class Mayhem:
    """A switch, two senders and a receiver, and one guest beside them; acts against all.

    With a namespace, the switch has to be inside: then there is a tap, too.
    """

    def __init__(self, net, seed, *, packed, namespace=None):
        self.net, self.switch = net, net.switch
        self.packed, self.namespace = packed, namespace
        self.random = random.Random(seed)
        self.deaths = 0
        # By act: how often, frames missing or twice, and frames counted.
        self.acts, self.off, self.counted = Counter(), Counter(), Counter()
        self.receiver = net.guest("r", packed=packed, **RECEIVER)
        self.senders = [net.guest(name, packed=packed, **SENDER) for name in "ab"]
        self.witness = net.guest("w")
        net.pin(*net.guests)
        self.names = [net.name_of(guest) for guest in net.guests]
        self._menu = acts.ACTS | ({} if packed else acts.SPLIT_ACTS)
        if namespace:
            acts.add_tap(self)
            self._menu |= acts.TAP_ACTS

    @property
    def kinds(self):
        """How many acts there are to choose from."""
        return len(self._menu)

    def run(self, count, deadline=None):
        """Act so often, or until the deadline; totals of the stream when it is over.

        Each act comes once before any comes again.
        """
        flows = [(sender, self.receiver) for sender in self.senders]
        options = {"verify": True, "length": LENGTHS, "burst": EACH}
        with Stream(*flows, raw=False, **options) as self._stream:
            self.wait_for_more()
            for name in self._choices(count):
                if deadline is not None and time.monotonic() > deadline:
                    break
                self._act(name)
            totals = self._stream.stop()
        self._check(totals)
        return totals

    def _choices(self, count):
        names = list(self._menu)
        weights = [act.weight for act in self._menu.values()]
        more = self.random.choices(names, weights, k=max(0, count - len(names)))
        self.random.shuffle(names)
        return (names + more)[:count]

    def _act(self, name):
        act = self._menu[name]
        self.switch.wait_for(
            lambda: self.switch.workers("spare"), lambda: self.switch.log
        )
        before = self._look()
        # The moment is what is random here.
        time.sleep(self.random.uniform(0, LATEST_S))
        self.acts[name] += 1
        renewed = act.do(self) or ()
        self.wait_for_more()
        self.switch.wait_for(
            lambda: not self._wrong(act, before, renewed),
            lambda: f"{name}: {self._wrong(act, before, renewed)}",
            SETTLED_S,
        )
        after = self._look()
        counted = (after.drops - before.drops).total()
        self.counted[name] += counted
        self.off[name] += after.off - before.off - counted

    def report(self):
        """A line for each act: how often, and what it cost."""
        return [
            f"{name}: {count} times, {self.off[name]} frames missing or twice,"
            f" {self.counted[name]} dropped and counted"
            for name, count in self.acts.items()
        ]

    # --- for acts ---

    def end(self, workers, number=signal.SIGKILL):
        """Send workers a signal that ends them, and wait until the manager knows."""
        pids = {worker["pid"] for worker in workers}
        self.deaths += sum(worker["role"] == "active" for worker in workers)
        for pid in pids.intersection(self.switch.worker_pids()):
            os.kill(pid, number)
        self.switch.wait_for(
            lambda: not pids.intersection(self.switch.worker_pids()), f"{pids} to end"
        )

    def one(self, role):
        return self.random.choice(self.switch.workers(role))

    def active(self):
        return {worker["pid"] for worker in self.switch.workers("active")}

    def wait_for_more(self):
        self._stream.wait_for_more(self.switch, ENOUGH)

    # --- what has to hold ---

    @property
    def bound(self):
        """Frames that the dead may have taken with them, or moved twice."""
        return self.deaths * RINGS * BURST

    def _look(self):
        ports = self.switch.ask("show")["ports"]
        counters = self.switch.ask("stats")["ports"]
        flows = [sink.flows for sink in self._stream.sinks]
        return Seen(
            self.deaths,
            self.active(),
            {p["name"]: p["since"] for p in ports if p["state"] == "up"},
            sum(int(f["lost"].sum() + f["duplicates"].sum()) for f in flows),
            self._drops(counters),
            {name: _unbalanced(counters[name]) for name in self.names},
        )

    def _drops(self, counters):
        """By name; those of the senders' ports coming in, of the receiver's going out."""
        drops = Counter()
        for guest in (*self.senders, self.receiver):
            way = "tx_drop" if guest is self.receiver else "rx_drop"
            found = counters[self.net.name_of(guest)]
            drops.update({n: v for n, v in found.items() if n.startswith(way)})
        return drops

    def _wrong(self, act, before, renewed):
        """What an act has cost that it may not cost; empty where nothing."""
        now = self._look()
        deaths = now.deaths - before.deaths
        rose = now.drops - before.drops
        gone = before.active - now.active
        same = set(self.names).difference(renewed)
        found = {
            "damaged": self._damaged(),
            "deaths": deaths and not act.deadly,
            "workers that nobody killed": gone if not deaths else None,
            "ports that are not up": set(self.names) - set(now.sessions),
            "sessions": {n for n in same if now.sessions.get(n) != before.sessions[n]},
            "dropped": set(rose) - act.drops - BUSY,
            "missing or twice": max(
                0, now.off - before.off - rose.total() - deaths * RINGS * BURST
            ),
            "ledger": {
                name: off
                for name, off in now.unbalanced.items()
                if abs(off - before.unbalanced[name]) > deaths * BURST
            },
        }
        return {name: value for name, value in found.items() if value}

    def _damaged(self):
        return sum(
            int(sink.flows[name].sum())
            for sink in self._stream.sinks
            for name in ("corrupt", "reordered")
        )

    def _check(self, totals):
        """The same of all acts together, now that all frames have arrived."""
        assert totals.foreign == totals.corrupt == totals.reordered == 0, totals
        counted = self._drops(self.switch.ask("stats")["ports"]).total()
        missing = totals.sent - totals.received - counted
        assert totals.duplicates + missing <= self.bound, (totals, counted)


def _unbalanced(counters):
    """Frames that came in and were not counted, or counted twice where negative."""
    seen = counters["rx_forwarded"] + counters["rx_flooded"]
    return counters["rx_frames"] - seen - dropped(counters, "rx")


def options(workers, spares):
    return "--workers", workers, "--spares", spares, "--cpus", ALL_CPUS
