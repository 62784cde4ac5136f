"""Try what can go wrong at random, for a long time; say what was tried.

    python -m tests.soak [--minutes M] [--seed N] [--part NAME]

Each part has its share of the time and a switch of its own; acts and rings come round
after round, each round from a seed of its own. A failure says how to have it again.
"""

import argparse
import contextlib
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from tests.fuzz.control import ControlFuzz
from tests.fuzz.rings import RingFuzz
from tests.netns.uplink import quiet_namespace
from tests.system import load
from tests.system.mayhem import Mayhem, options
from tests.system.net import on_a_switch

ACTS = 60  # a round
ROUNDS = 200  # of rings, on one switch
SPARES = 2
CYCLES = 40  # of front-ends, a second
KINDS = tuple(itertools.product((False, True), (1, 2)))  # packed, workers


class Part(NamedTuple):
    """What is tried, with which share of the time."""

    share: float
    run: Callable  # seed, seconds -> lines that say what happened
    rounds: bool = False  # again and again, with other seeds


def ports(_seed, seconds):
    """Ports come and go."""
    with on_a_switch() as net:
        rounds, totals = load.come_and_go(net, seconds)
    return [f"{rounds} ports beside {totals.sent} frames, none missing"]


def front_ends(_seed, seconds):
    """Front-ends come and go."""
    cycles = round(CYCLES * seconds)
    with on_a_switch() as net:
        load.connect_and_hang_up(net, cycles)
    return [f"{cycles} front-ends, nothing of them left"]


def acts(seed, seconds):
    """Workers, managers, guests and taps meet with accidents."""
    packed, workers = KINDS[seed % len(KINDS)]
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as owned:
        inside = owned.enter_context(quiet_namespace()) if os.geteuid() == 0 else None
        net = owned.enter_context(on_a_switch(*options(workers, SPARES), inside=inside))
        mayhem = Mayhem(net, seed, packed=packed, namespace=inside)
        totals = mayhem.run(ACTS, deadline)
    scene = f"{form(packed)} rings, {workers} workers, {'a' if inside else 'no'} tap"
    return [f"{scene}: {totals.sent} frames sent", *mayhem.report()]


def rings(seed, seconds):
    """A guest scribbles over its rings."""
    packed = bool(seed % 2)
    with on_a_switch() as net:
        net.switch.wait_for_workers(1, 1)
        deadline = time.monotonic() + seconds
        fuzz = RingFuzz(net, seed, packed=packed)
        fuzz.run(ROUNDS, lambda: time.monotonic() < deadline)
        tried = counts(fuzz.tried)
    done = f"{form(packed)} rings, {fuzz.rounds} rounds beside {fuzz.frames} frames"
    return [done, tried, counts(fuzz.counts)]


def control(seed, seconds):
    """Anything is said at the control socket."""
    with on_a_switch() as net:
        net.switch.wait_for_workers(1, 1)
        deadline = time.monotonic() + seconds
        fuzz = ControlFuzz(net.switch, seed)
        fuzz.run(sys.maxsize, lambda: time.monotonic() < deadline)
    return [counts(fuzz.counts)]


def guided(target):
    """A part that Atheris guides, in a process of its own."""

    def run(seed, seconds):
        command = [sys.executable, "-m", "tests.fuzz.guided", target]
        given = ["--seconds", str(max(1, round(seconds))), "--seed", str(seed)]
        done = subprocess.run(
            [*command, *given], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    return run


PARTS = {
    "ports": Part(0.10, ports),
    "front-ends": Part(0.15, front_ends),
    "acts": Part(0.42, acts, rounds=True),
    "rings": Part(0.15, rings, rounds=True),
    "control": Part(0.06, control),
    "payloads": Part(0.02, guided("payloads")),
    "session": Part(0.06, guided("session")),
    "config": Part(0.04, guided("config")),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument("--part", choices=PARTS, help="this alone, for all of the time")
    given = parser.parse_args()
    chosen = {given.part: PARTS[given.part]} if given.part else PARTS
    for name, part in chosen.items():
        share = 1.0 if given.part else part.share
        tried(name, part, given.seed, 60 * given.minutes * share)


def tried(name, part, seed, seconds):
    """Run a part for so long, from that seed on; print what it says."""
    deadline = time.monotonic() + seconds
    for number in itertools.count(seed):
        print(f"{name}, seed {number}", flush=True)
        try:
            for line in part.run(number, deadline - time.monotonic()):
                print(f"  {line}", flush=True)
        except BaseException:
            print(f"failed (again: make soak PART={name} SEED={number})", flush=True)
            raise
        if not part.rounds or time.monotonic() > deadline:
            return


def form(packed):
    return "packed" if packed else "split"


def counts(counter):
    return ", ".join(f"{name}: {count}" for name, count in counter.items())


if __name__ == "__main__":
    main()
