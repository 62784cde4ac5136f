"""A switch of our own in a temporary directory, and a pair of guests on it."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vswitch import start
from vswitch.control.client import Client
from vswitch.guest import Guest

_HEADER_LEN = 12


class Rig(NamedTuple):
    """What a measurement needs."""

    manager: Client
    directory: Path
    cpu: int  # of the worker
    generator_cpu: int

    def guest(self, name: str, **options: Any) -> Guest:  # noqa: ANN401 (Guest's own)
        """Add a port and attach a guest to it."""
        path = self.directory / f"{name}.sock"
        self.manager.ask("add_port", name=name, endpoint=f"vhost:{path}", mode="server")
        return Guest.connect(path, **options)

    def stats(self) -> dict[str, Any]:
        """The switch's counters."""
        return dict(self.manager.ask("stats"))


@contextmanager
def running(*options: str) -> Iterator[Rig]:
    """A switch with one busy worker; this process moves to another processor."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        sys.exit("this needs two processors: one for the worker, one for the generator")
    with ExitStack() as owned:
        manager, directory = owned.enter_context(
            switch(f"--cpus={cpus[1]}", "--poll=busy", *options)
        )
        os.sched_setaffinity(0, {cpus[0]})
        owned.callback(os.sched_setaffinity, 0, set(cpus))
        yield Rig(manager, directory, cpus[1], cpus[0])


@contextmanager
def switch(*options: str) -> Iterator[tuple[Client, Path]]:
    """A switch, and the directory that it has for itself."""
    directory = Path(tempfile.mkdtemp(prefix="vswitch-bench-"))
    run_dir = directory / "run"
    arguments = [f"--run-dir={run_dir}", "--spares=0", *options]
    try:
        start.start(arguments, run_dir, _on_progress)
        with Client(run_dir) as manager:
            try:
                yield manager, directory
            finally:
                manager.ask("down")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _on_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rcompiling {done} of {total} ", end="", file=sys.stderr)


@contextmanager
def pair(
    rig: Rig, length: int, *, packed: bool = False
) -> Iterator[tuple[Guest, Guest]]:
    """Two guests whose buffers hold frames of `length` bytes; both are learned."""
    room = max(2048, length + _HEADER_LEN)
    names = (f"a{length}", f"b{length}")
    with ExitStack() as owned:
        guests = []
        for name in names:
            guest = rig.guest(
                name, rx_buffer_len=room, tx_buffer_len=room, packed=packed
            )
            owned.callback(rig.manager.ask, "del_port", name=name)
            guests.append(owned.enter_context(guest))
        for guest in guests:
            guest.send_all((b"\xff" * 6 + guest.mac + b"\x88\xb5").ljust(60, b"\0"))
            guest.wait_sent()
        yield guests[0], guests[1]
