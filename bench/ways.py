"""Ways from one network namespace to another: ours, the kernel's bridge, OVS.

Each is a context manager that, given three namespaces and a number, makes interface
`a<number>` in the first and `b<number>` in the last, with whatever joins them running in
the one between. All exist at the same time, so that they can take turns.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from bench.namespace import Namespace
from bench.rig import switch

_OVS_COMMANDS: Final = ("ovsdb-tool", "ovsdb-server", "ovs-vswitchd", "ovs-vsctl")
_OVS_SCHEMA: Final = Path("/usr/share/openvswitch/vswitch.ovsschema")
_START_S: Final = 20.0


class Land(NamedTuple):
    """The namespaces: two that talk, and one between them."""

    one: Namespace
    middle: Namespace
    other: Namespace

    @property
    def ends(self) -> tuple[tuple[Namespace, str], ...]:
        """Those that talk, and how their interfaces' names begin."""
        return (self.one, "a"), (self.other, "b")


Builder = Callable[[Land, int], AbstractContextManager[None]]


def veths(land: Land, number: int) -> list[str]:
    """Lay a pair of interfaces from each end to the middle; their names there."""
    names = []
    for space, letter in land.ends:
        name = f"{letter}{number}"
        land.middle.ip(f"link add {name}m type veth peer name {name} netns {space.pid}")
        land.middle.ip(f"link set {name}m up")
        names.append(f"{name}m")
    return names


def hand_out(land: Land, number: int) -> None:
    """Move interfaces that a switch made in the middle to the ends."""
    for space, letter in land.ends:
        land.middle.ip(f"link set {letter}{number} netns {space.pid}")


@contextmanager
def bridge(land: Land, number: int) -> Iterator[None]:
    """Linux's bridge."""
    name = f"br{number}"
    land.middle.ip(f"link add {name} type bridge")
    land.middle.ip(f"link set {name} up")
    for port in veths(land, number):
        land.middle.ip(f"link set {port} master {name}")
    yield


@contextmanager
def tap(land: Land, number: int) -> Iterator[None]:
    """This switch between two taps."""
    with _ours(land) as add_port:
        for _, letter in land.ends:
            add_port(f"tap:{letter}{number}")
        hand_out(land, number)
        yield


def on_veths(kind: str) -> Builder:
    """This switch on interfaces that are there, by a kind of port."""

    @contextmanager
    def way(land: Land, number: int) -> Iterator[None]:
        with _ours(land) as add_port:
            for name in veths(land, number):
                add_port(f"{kind}:{name}")
            yield

    return way


@contextmanager
def ovs_veth(land: Land, number: int) -> Iterator[None]:
    """Open vSwitch's userspace datapath on packet sockets.

    It does not complete checksums, so the ends have to, or TCP does not come through.
    """
    with _ovs(land, f"ovs{number}") as control:
        for name in veths(land, number):
            control("add-port", f"ovs{number}", name)
        for space, letter in land.ends:
            space.run("ethtool", "-K", f"{letter}{number}", "tx", "off")
        yield


@contextmanager
def ovs_tap(land: Land, number: int) -> Iterator[None]:
    """Open vSwitch's userspace datapath with taps, which it calls internal ports."""
    with _ovs(land, f"ovs{number}") as control:
        for _, letter in land.ends:
            name = f"{letter}{number}"
            control(
                *("add-port", f"ovs{number}", name, "--"),
                *("set", "interface", name, "type=internal"),
            )
        hand_out(land, number)
        yield


WAYS: Final[dict[str, Builder]] = {
    "bridge": bridge,
    "tap": tap,
    "eth": on_veths("eth"),
    "xdp": on_veths("xdp"),
    "ovs tap": ovs_tap,
    "ovs veth": ovs_veth,
}


def missing(name: str) -> str:
    """Why a way cannot be had here, or nothing."""
    if name.startswith("ovs"):
        for command in _OVS_COMMANDS:
            if shutil.which(command) is None:
                return f"{command} is not installed"
    return ""


@contextmanager
def _ours(land: Land) -> Iterator[Callable[[str], None]]:
    """A switch in the middle; yields what adds a port."""
    with ExitStack() as owned:
        with land.middle.inside():
            manager, _ = owned.enter_context(switch())

        def add_port(endpoint: str) -> None:
            name = endpoint.partition(":")[2]
            manager.ask("add_port", name=name, endpoint=endpoint, mode="server")

        yield add_port


@contextmanager
def _ovs(land: Land, name: str) -> Iterator[Callable[..., None]]:
    """Open vSwitch in the middle with a bridge of that name; yields its `ovs-vsctl`."""
    with ExitStack() as owned:
        directory = Path(
            owned.enter_context(tempfile.TemporaryDirectory(prefix="vswitch-bench-"))
        )
        database = f"unix:{directory}/db.sock"
        environment = os.environ | {"OVS_RUNDIR": str(directory)}

        def run(*command: str) -> None:
            subprocess.run(command, check=True, env=environment, timeout=_START_S)

        def start(*command: str) -> None:
            log = f"--log-file={directory}/{command[0]}.log"
            arguments = [*land.middle.prefix, *command, log, "--verbose=console:off"]
            process = subprocess.Popen(
                arguments, env=environment, stderr=subprocess.DEVNULL
            )
            owned.callback(_end, process)

        run("ovsdb-tool", "create", f"{directory}/conf.db", str(_OVS_SCHEMA))
        start("ovsdb-server", f"{directory}/conf.db", f"--remote=p{database}")
        _wait_for(directory / "db.sock")
        control = ("ovs-vsctl", f"--db={database}")
        run(*control, "--no-wait", "init")
        start("ovs-vswitchd", database)
        run(
            *(*control, f"--timeout={_START_S:.0f}", "add-br", name, "--"),
            *("set", "bridge", name, "datapath_type=netdev"),
        )
        yield lambda *command: run(*control, *command)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=_START_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not path.exists():
        if time.monotonic() > deadline:
            message = f"{path} did not appear within {_START_S:.0f} s"
            raise TimeoutError(message)
        time.sleep(0.01)
