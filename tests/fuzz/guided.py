"""Fuzz what takes bytes, guided by what they reach: Atheris, that is libFuzzer.

    python -m tests.fuzz.guided TARGET [--runs N] [--seconds S] [--seed K] [FILE...]

It prints what was tried. An input that fails is written to a file, whose name is printed;
with that file as an argument it is tried again, alone.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ports", "vswitch"]):
    from tests.fuzz.config import Files
    from tests.fuzz.vhost import Conversations, Payloads

TARGETS = {"payloads": Payloads, "session": Conversations, "config": Files}
LONGEST = 1024  # bytes of an input


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=-1)
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("files", nargs="*", type=Path)
    given = parser.parse_args()
    target = TARGETS[given.target]()
    for file in given.files:
        target.one(file.read_bytes())
    if not given.files:
        fuzz(target, given)
    target.close()


def fuzz(target, given):
    """Try until there were enough; never returns, as libFuzzer ends the process."""
    corpus = tempfile.TemporaryDirectory(prefix="vsw-fuzz-")
    for number, seed in enumerate(target.SEEDS):
        Path(corpus.name, f"{number}").write_bytes(seed)
    deadline = time.monotonic() + given.seconds
    tried = 0

    def one(data):
        nonlocal tried
        if tried == given.runs or (given.seconds and time.monotonic() > deadline):
            end()
        tried += 1
        target.one(data)

    def end():
        # libFuzzer's own end would leave no time for these.
        kinds = ", ".join(f"{name}: {n}" for name, n in sorted(target.counts.items()))
        print(f"{given.target}: {tried} inputs; {kinds}", flush=True)
        corpus.cleanup()
        target.close()
        os._exit(0)

    options = [f"-seed={given.seed}", f"-max_len={LONGEST}", "-verbosity=0"]
    options += [f"-artifact_prefix={tempfile.gettempdir()}/vsw-fuzz-{given.target}-"]
    atheris.Setup([sys.argv[0], *options, corpus.name], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
