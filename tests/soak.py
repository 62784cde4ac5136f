"""Try what can go wrong at random, for a long time; say what was tried.

    python -m tests.soak [--minutes M] [--seed N]

First ports and front-ends come and go, for a part of the time: 60 s and 10 000 times in ten
minutes. Then workers die, round after round. Each round is a switch of its own, so a
failure is repeated by its round's seed alone.
"""

import argparse
import contextlib
import itertools
import random
import sys
import time

from tests.switch import Switch, remove_directory, short_directory
from tests.system import load
from tests.system.mayhem import Mayhem, options
from tests.system.net import Net

ACTS = 40  # a round
SPARES = 2
# A minute
PORTS_S = 6.0  # for ports that come and go
CYCLES = 1000  # of front-ends
KINDS = tuple(itertools.product((False, True), (1, 2)))  # packed, workers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    print(f"load\n  {come_and_go(given.minutes)}", flush=True)
    for seed in itertools.count(given.seed):
        packed, workers = KINDS[seed % len(KINDS)]
        if time.monotonic() > deadline:
            break
        form = "packed" if packed else "split"
        print(f"seed {seed}: {form} rings, {workers} workers", flush=True)
        try:
            print(f"  {one_round(seed, packed, workers, deadline)}", flush=True)
        except BaseException:
            print(f"  failed (again: --seed {seed})", file=sys.stderr)
            raise


def come_and_go(minutes):
    """Ports, then front-ends, that come and go; what happened."""
    cycles = round(CYCLES * minutes)
    with on_a_switch() as net:
        rounds, totals = load.come_and_go(net, PORTS_S * minutes)
    with on_a_switch() as net:
        load.connect_and_hang_up(net, cycles)
    return (
        f"{rounds} ports beside {totals.sent} frames, none missing;"
        f" {cycles} front-ends, nothing of them left"
    )


def one_round(seed, packed, workers, deadline):
    """A switch, a stream, and acts against its workers; what happened."""
    with on_a_switch(*options(workers, SPARES)) as net:
        mayhem = Mayhem(net, seed, packed=packed)
        totals = mayhem.run(ACTS, deadline)
    acts = ", ".join(f"{name}: {count}" for name, count in mayhem.acts.items())
    return (
        f"{acts}; {totals.sent} frames sent, {totals.sent - totals.received} missing,"
        f" {totals.duplicates} twice, at most {mayhem.bound} of the dead"
    )


@contextlib.contextmanager
def on_a_switch(*options):
    """Ports and guests on a switch of its own; its log where something goes wrong."""
    directory = short_directory()
    try:
        with Switch(directory, *options) as switch:
            net = Net(switch)
            try:
                yield net
            except BaseException:
                print(switch.log, file=sys.stderr)
                raise
            finally:
                net.close()
    finally:
        remove_directory(directory)


if __name__ == "__main__":
    main()
