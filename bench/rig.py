"""A switch of our own in a temporary directory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import daemon
from vswitch import start
from vswitch.control import rundir
from vswitch.control.client import Client


@contextmanager
def switch(*options: str) -> Iterator[tuple[Client, Path]]:
    """A switch, and the directory that it has for itself."""
    with daemon.run_directory() as directory:
        run_dir = directory / "run"
        arguments = [f"--run-dir={run_dir}", "--spares=0", *options]
        start.start(arguments, run_dir, _on_progress)
        with Client(run_dir) as manager:
            try:
                yield manager, directory
            finally:
                _take_down(manager, run_dir)


def _take_down(manager: Client, run_dir: Path) -> None:
    """End it, and wait until it has: its directory goes next."""
    pid = rundir.holder(run_dir)
    if pid is None:
        return  # it is gone
    with start.until_ended(pid):
        manager.ask("down")


def _on_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rcompiling {done} of {total} ", end="", file=sys.stderr)
