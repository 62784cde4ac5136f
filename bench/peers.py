"""Switches to be measured beside each other: this one, and what else there is here.

Each is a context manager that starts it with as many vhost-user ports as a case needs, in
a directory of its own, with one forwarding thread that has one processor to itself, and
yields a `System`. All of a case are there at the same time and take turns: one that polls
is halted while another forwards, as all of them get the same processor.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from bench import daemon, machine, ovs, testpmd, vpp
from bench.machine import Place
from bench.rig import switch
from vswitch import __version__
from vswitch.control import rundir
from vswitch.control.client import Client

_LONG: Final = 1514  # bytes of the longest frame that needs no setting
_DPDK_MB: Final = 1024
_ADDRESSES: Final = 1 << 16  # that a switch has to know behind one port


class Need(NamedTuple):
    """What a case asks of every system."""

    ports: int
    length: int  # bytes of the longest frame


class Work(NamedTuple):
    """What a system has counted; None: it does not say."""

    frames: int | None = None  # taken from guests
    delivered: int | None = None
    dropped: int | None = None
    cycles: int | None = None  # in which it had something to do
    idle_cycles: int | None = None
    idle_rounds: int | None = None

    def since(self, before: "Work") -> "Work":
        """What came since then."""
        return Work(
            *(
                None if new is None or old is None else new - old
                for new, old in zip(self, before, strict=True)
            )
        )


def _no_work() -> Work:
    return Work()


Phase = Callable[[], AbstractContextManager[object]]


@dataclass
class System:
    """A switch that is there, halted."""

    name: str
    version: str
    group: int  # its process group
    paths: list[Path]  # the sockets of its ports
    forwarding: Phase = nullcontext  # it forwards meanwhile
    attaching: Phase = nullcontext  # it answers front-ends meanwhile
    work: Callable[[], Work] = _no_work
    guests_listen: bool = False
    looks_up: bool = True  # not only from each port to its neighbour


Start = Callable[[Path, Need, Place], AbstractContextManager[System]]


def _there() -> str:
    return ""


class Kind(NamedTuple):
    """A switch that one can have."""

    start: Start
    missing: Callable[[], str] = _there  # why it cannot be had here, or nothing
    cache: str = ""  # the variable that says where it keeps things between starts


@contextmanager
def running(name: str, kind: Kind, need: Need, place: Place) -> Iterator[System]:
    """One of them, started for what a case needs.

    Raises:
        DaemonError: It did not start.
    """
    with (
        daemon.run_directory() as directory,
        kind.start(directory, need, place) as system,
    ):
        system.name = name
        yield system


# --- this switch --------------------------------------------------------------------


@contextmanager
def _vswitch(directory: Path, need: Need, place: Place) -> Iterator[System]:
    """Ours, as users have it: its worker sleeps when there is nothing to do."""
    with switch(f"--cpus={place.cpu}") as (manager, own):
        paths = _sockets(directory, need)
        for path in paths:
            manager.ask(
                "add_port",
                name=path.stem,
                endpoint=f"vhost:{path}",
                mode="server",
                max_addresses=_ADDRESSES,
            )
        group = rundir.holder(own / "run")
        assert group is not None
        work = partial(_work_of_vswitch, manager)
        yield System("vswitch", __version__, group, paths, work=work)


def _work_of_vswitch(manager: Client) -> Work:
    stats = manager.ask("stats")
    ports, workers = stats["ports"].values(), stats["workers"].values()
    by_ports = ("rx_frames", "tx_frames", "tx_drop_ring_full")
    by_workers = ("busy_cycles", "idle_cycles", "polls")
    return Work(
        *(sum(port[name] for port in ports) for name in by_ports),
        *(sum(worker[name] for worker in workers) for name in by_workers),
    )


# --- DPDK's testpmd -----------------------------------------------------------------

_FORWARDED: Final = re.compile(
    r"RX-packets: (\d+) .*\s+TX-packets: (\d+) +TX-dropped: (\d+) .*"
)
_CYCLES: Final = re.compile(r"total cycles=(\d+)")


@contextmanager
def _testpmd(directory: Path, need: Need, place: Place) -> Iterator[System]:
    """Each frame of a port goes to the next: no lookup, the bare cost of DPDK's vhost."""
    paths = _sockets(directory, need)
    room = testpmd.ROOM if need.length <= _LONG else need.length + testpmd.HEADROOM
    eal = [
        *(*_dpdk_memory(_DPDK_MB), "-v", "-m", str(_DPDK_MB)),
        # Nobody reads what it says of each message, and a full pipe would stop it.
        "--log-level=lib.vhost.config:warning",
        *("-l", f"{place.other},{place.cpu}", f"--main-lcore={place.other}"),
        *(f"--vdev=net_vhost{n},iface={path}" for n, path in enumerate(paths)),
    ]
    application = [
        *("--forward-mode=io", "--nb-cores=1", "--record-core-cycles"),
        *("--no-flush-rx", f"--mbuf-size={room + testpmd.HEADROOM}"),
        f"--total-num-mbufs={1024 * (need.ports + 6)}",
    ]
    with testpmd.Testpmd("switch", eal, application) as pmd:

        @contextmanager
        def forwarding() -> Iterator[None]:
            pmd.start()
            try:
                yield
            finally:
                pmd.stop()

        found = re.search(r"'(DPDK [^']+)'", pmd.banner)
        version = found[1] if found else "of an unknown version"
        work = partial(_work_of_testpmd, pmd)
        # Its threads for front-ends go on when it does not forward.
        yield System(
            *("", version, pmd.pid, paths, forwarding), work=work, looks_up=False
        )


def _work_of_testpmd(pmd: testpmd.Testpmd) -> Work:
    """Its counts since it last began to forward, of all ports."""
    said = pmd.ask("show fwd stats all").rpartition("Accumulated")[2]
    counts, cycles = _FORWARDED.search(said), _CYCLES.search(said)
    if counts is None:
        message = f"testpmd told no counts but: {said}"
        raise daemon.DaemonError(message)
    frames, delivered, dropped = map(int, counts.groups())
    return Work(frames, delivered, dropped, int(cycles[1]) if cycles else 0)


def _dpdk_memory(megabytes: int) -> list[str]:
    needed = megabytes * 1024 // machine.HUGE_PAGE_KB
    return [] if machine.huge_pages() >= needed else ["--no-huge"]


# --- Open vSwitch with DPDK ---------------------------------------------------------

_BRIDGE: Final = "br0"
_OVS_MB: Final = 2048
_FEW_PORTS: Final = 4
_FORGET_MS: Final = 600_000  # not while others have their turn
_RECEIVED: Final = re.compile(r"packets received: (\d+)")
_PROCESSED: Final = re.compile(r"processing cycles: (\d+)")


@contextmanager
def _ovs(directory: Path, need: Need, place: Place) -> Iterator[System]:
    """Its userspace datapath, which learns addresses (the action NORMAL)."""
    # With --no-huge goes --legacy-mem, which it has to be told, too.
    memory = ["--no-huge", "--legacy-mem"] if _dpdk_memory(_OVS_MB) else []
    extra = " ".join([*memory, "--no-pci", "--no-telemetry"])
    settings = [
        "other_config:dpdk-init=true",
        f"other_config:dpdk-extra={extra}",
        f"other_config:dpdk-alloc-mem={_OVS_MB}",
        f"other_config:dpdk-lcore-mask={1 << place.other:#x}",
        f"other_config:pmd-cpu-mask={1 << place.cpu:#x}",
        "other_config:vhost-sock-dir=.",
        f"other_config:max-idle={_FORGET_MS}",
    ]
    if need.ports <= _FEW_PORTS:
        # Buffers as needed; the default is 262144 of them, which take long to make.
        settings.append("other_config:per-port-memory=true")
    # It makes a tap for each bridge; nobody else shall see them.
    apart = ("unshare", "--net", "--")
    with ovs.running(directory, settings, apart, dpdk=True) as it:
        it.control(
            *("add-br", _BRIDGE, "--", "set", "bridge", _BRIDGE),
            *("datapath_type=netdev", f"other_config:mac-table-size={2 * _ADDRESSES}"),
        )
        names = [f"p{number}" for number in range(need.ports)]
        mtu = [f"mtu_request={need.length - 14}"] if need.length > _LONG else []
        for name in names:
            it.control(
                *("add-port", _BRIDGE, name, "--", "set", "interface", name),
                *("type=dpdkvhostuser", *mtu),
            )
        paths = [directory / name for name in names]
        turn = partial(_awake, it.pid)
        with _halted(it.pid):
            yield System(
                *("", ovs.version_dpdk(), it.pid, paths, turn, turn),
                work=partial(_work_of_ovs, it),
            )


def _work_of_ovs(it: ovs.Ovs) -> Work:
    """What its polling thread counts; 3.1 cannot tell counts of a vhost port."""
    said = it.ask("dpif-netdev/pmd-stats-show").partition("main thread")[0]
    return Work(
        frames=sum(map(int, _RECEIVED.findall(said))),
        cycles=sum(map(int, _PROCESSED.findall(said))),
    )


# --- VPP ----------------------------------------------------------------------------


def vpp_at(command: str) -> Kind:
    """VPP, by the command that starts it."""
    return Kind(partial(_vpp, command), partial(vpp.missing, command))


@contextmanager
def _vpp(command: str, directory: Path, need: Need, place: Place) -> Iterator[System]:
    """A bridge domain, which learns addresses, and one worker, which polls."""
    with vpp.running(directory, command, place) as it:
        paths = _sockets(directory, need)
        for path in paths:
            it.add_port(path)
        turn = partial(_awake, it.pid)

        @contextmanager
        def forwarding() -> Iterator[None]:
            with turn():
                it.forget_cycles()
                yield

        version, work = it.version(), partial(_work_of_vpp, it)
        with _halted(it.pid):
            yield System("", version, it.pid, paths, forwarding, turn, work)


def _work_of_vpp(it: vpp.Vpp) -> Work:
    counters = it.counters()
    dropped = counters["drops"]
    return Work(
        counters["rx packets"],
        counters["tx packets"] - dropped,
        dropped,
        it.cycles(),
    )


# --- any other ----------------------------------------------------------------------


def by_command(command: str, *, guests_listen: bool = False) -> Kind:
    """A switch that is started by a shell command; see README.md for what it is told."""
    return Kind(partial(_commanded, command, guests_listen))


@contextmanager
def _commanded(
    command: str, guests_listen: bool, directory: Path, need: Need, place: Place
) -> Iterator[System]:
    paths = _sockets(directory, need)
    told = {
        "SOCKETS": " ".join(map(str, paths)),
        "DIRECTORY": str(directory),
        "RUNTIME_DIRECTORY": str(directory),  # DPDK's own files
        "CPU": str(place.cpu),
        "OTHER_CPU": str(place.other),
        "LONGEST_FRAME": str(need.length),
    }
    log = directory / "log"
    with daemon.running(["sh", "-c", command], log, os.environ | told) as process:
        if not guests_listen:
            daemon.wait_until(
                lambda: all(path.exists() for path in paths),
                f"sockets of {command!r}",
                log,
                process,
            )
        turn = partial(_awake, process.pid)
        with _halted(process.pid):
            yield System(
                *("", " ".join(command.split()), process.pid, paths, turn, turn),
                guests_listen=guests_listen,
            )


@contextmanager
def _halted(group: int) -> Iterator[None]:
    _halt(group)
    try:
        yield
    finally:
        daemon.tell(group, signal.SIGCONT)


@contextmanager
def _awake(group: int) -> Iterator[None]:
    daemon.tell(group, signal.SIGCONT)
    try:
        yield
    finally:
        _halt(group)


def _halt(group: int) -> None:
    """Stop all its threads: one waits for a processor first, and meanwhile others go on."""
    daemon.tell(group, signal.SIGSTOP)
    deadline = time.monotonic() + daemon.START_S
    while not machine.is_halted(group):
        if time.monotonic() > deadline:
            message = f"a switch did not halt within {daemon.START_S:.0f} s"
            raise daemon.DaemonError(message)
        time.sleep(0.001)


def _sockets(directory: Path, need: Need) -> list[Path]:
    return [directory / f"p{number}.sock" for number in range(need.ports)]


KINDS: Final = {
    "vswitch": Kind(_vswitch, cache="VSWITCH_CACHE_DIR"),
    "testpmd": Kind(_testpmd, testpmd.missing),
    "ovs-dpdk": Kind(_ovs, ovs.missing_dpdk),
    "vpp": vpp_at(vpp.COMMAND),
}
