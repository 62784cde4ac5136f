"""A switch of our own with one busy worker, and built-in guests on it."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.rig import switch
from vswitch.control.client import Client
from vswitch.guest import Guest


class Local(NamedTuple):
    """What a measurement needs."""

    manager: Client
    directory: Path

    def guest(self, name: str, **options: Any) -> Guest:  # noqa: ANN401 (Guest's own)
        """Add a port and attach a guest to it; the switch knows where it is."""
        path = self.directory / f"{name}.sock"
        self.manager.ask("add_port", name=name, endpoint=f"vhost:{path}", mode="server")
        guest = Guest.connect(path, **options)
        self.manager.ask("fdb_add", mac=guest.mac_text, ifname=name)
        return guest


@contextmanager
def running(*options: str) -> Iterator[Local]:
    """A switch whose worker has a processor; this process moves to another one."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        sys.exit("this needs two processors: one for the worker, one for the generator")
    with ExitStack() as owned:
        manager, directory = owned.enter_context(
            switch(f"--cpus={cpus[1]}", "--poll=busy", *options)
        )
        os.sched_setaffinity(0, {cpus[0]})
        owned.callback(os.sched_setaffinity, 0, set(cpus))
        yield Local(manager, directory)
