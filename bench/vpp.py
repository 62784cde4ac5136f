"""FD.io's VPP with a configuration and sockets of its own: vhost-user ports and a bridge."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench import daemon, machine
from bench.machine import Place

COMMAND: Final = "vpp"
_DOMAIN: Final = 1
_BUFFERS: Final = 16384
_BUFFERS_MB: Final = 64
# One worker, and nothing that it would find on this machine by itself (DPDK's devices).
# The main thread sleeps between looks: otherwise it spins before each of its timers, and
# takes 3 to 5 % of the generator's processor.
_CONFIGURATION: Final = """
unix {{ nodaemon nosyslog runtime-dir {directory} cli-listen {directory}/cli.sock
  poll-sleep-usec 5000 }}
cpu {{ main-core {place.other} corelist-workers {place.cpu} }}
buffers {{ buffers-per-numa {buffers} page-size {page_size} }}
memory {{ main-heap-size 512M }}
socksvr {{ socket-name {directory}/api.sock }}
statseg {{ socket-name {directory}/stats.sock }}
api-segment {{ prefix {directory.name} }}
plugins {{ plugin default {{ disable }} plugin vhost_plugin.so {{ enable }} }}
"""
_COUNTER: Final = re.compile(r" (rx packets|tx packets|drops) +(\d+)")
# Of a node: calls, vectors, suspends, clocks of a vector, vectors of a call.
_NODE: Final = re.compile(
    r"^\S+ .* \d+ +(\d+) +\d+ +(\d\.\d+e[-+]?\d+) +\d*\.\d+\s*$", re.MULTILINE
)


class Vpp:
    """One that runs."""

    def __init__(self, directory: Path, command: str, pid: int) -> None:
        self.pid = pid
        self._directory = directory
        self._command = _control(command)

    def ask(self, command: str) -> str:
        """What it says to a command of its CLI."""
        socket = f"{self._directory}/cli.sock"
        words = [self._command, "-s", socket, *command.split()]
        return daemon.ask(words, f"vppctl {command}").strip()

    def tell(self, command: str) -> None:
        """Give it a command that has nothing to say, if it is understood.

        Raises:
            DaemonError: It is not.
        """
        if said := self.ask(command):
            message = f"vppctl {command} failed: {said}"
            raise daemon.DaemonError(message)

    def add_port(self, path: Path) -> None:
        """Listen at a socket; what comes by it is bridged to all other ports."""
        name = self.ask(f"create vhost-user socket {path} server packed")
        if not name.startswith("VirtualEthernet"):
            message = f"no port of VPP at {path}: {name}"
            raise daemon.DaemonError(message)
        self.tell(f"set interface l2 bridge {name} {_DOMAIN}")
        self.tell(f"set interface state {name} up")

    def version(self) -> str:
        """What it calls itself."""
        return self.ask("show version").partition(" built ")[0]

    def forget_cycles(self) -> None:
        """Begin to count them anew: what it says of many is only roughly right."""
        self.tell("clear runtime")

    def cycles(self) -> int:
        """What its worker spent in nodes that had frames, with empty looks at rings."""
        said = self.ask("show runtime").partition("Thread 1 ")[2]
        found = _NODE.findall(said)
        return round(sum(int(vectors) * float(clocks) for vectors, clocks in found))

    def counters(self) -> dict[str, int]:
        """Those of its ports, summed: `rx packets`, `tx packets`, `drops`."""
        total = {"rx packets": 0, "tx packets": 0, "drops": 0}
        for name, count in _COUNTER.findall(self.ask("show interface")):
            total[name] += int(count)
        return total


def missing(command: str = COMMAND) -> str:
    """Why it cannot be had here, or nothing."""
    for one in (command, _control(command)):
        if shutil.which(one) is None:
            return f"{one} is not installed (Debian has no package; --vpp says where)"
    return ""


@contextmanager
def running(directory: Path, command: str, place: Place) -> Iterator[Vpp]:
    """One with a worker on the processor to forward on."""
    configuration = directory / "startup.conf"
    # Asked for huge pages that are not there, it has the kernel make some, for good.
    huge = machine.huge_pages() * machine.HUGE_PAGE_KB >= _BUFFERS_MB * 1024
    configuration.write_text(
        _CONFIGURATION.format(
            directory=directory,
            place=place,
            buffers=_BUFFERS,
            page_size="default-hugepage" if huge else "default",
        )
    )
    log = directory / "log"
    with daemon.running([command, "-c", str(configuration)], log) as process:
        there = (directory / "cli.sock").exists
        daemon.wait_until(there, "socket of VPP", log, process)
        yield Vpp(directory, command, process.pid)


def _control(command: str) -> str:
    """Its `vppctl`: beside it."""
    return str(Path(command).with_name("vppctl"))
