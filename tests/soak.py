"""Try what can go wrong at random, for a long time; say what was tried.

    python -m tests.soak [--minutes M] [--seed N]

Each round is a switch of its own, so a failure is repeated by its round's seed alone.
"""

import argparse
import itertools
import random
import sys
import time

from tests.switch import Switch, remove_directory, short_directory
from tests.system.mayhem import Mayhem, options
from tests.system.net import Net

ACTS = 40  # a round
SPARES = 2
KINDS = tuple(itertools.product((False, True), (1, 2)))  # packed, workers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
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


def one_round(seed, packed, workers, deadline):
    """A switch, a stream, and acts against its workers; what happened."""
    directory = short_directory()
    try:
        with Switch(directory, *options(workers, SPARES)) as switch:
            net = Net(switch)
            try:
                mayhem = Mayhem(net, seed, packed=packed)
                totals = mayhem.run(ACTS, deadline)
            except BaseException:
                print(switch.log, file=sys.stderr)
                raise
            finally:
                net.close()
    finally:
        remove_directory(directory)
    acts = ", ".join(f"{name}: {count}" for name, count in mayhem.acts.items())
    return (
        f"{acts}; {totals.sent} frames sent, {totals.sent - totals.received} missing,"
        f" {totals.duplicates} twice, at most {mayhem.bound} of the dead"
    )


if __name__ == "__main__":
    main()
