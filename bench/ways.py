"""Ways from one network namespace to another: ours, the kernel's bridge, OVS, VDE.

Each is a context manager that, given three namespaces and a number, makes interface
`a<number>` in the first and `b<number>` in the last, with whatever joins them running in
the one between. All exist at the same time, so that they can take turns.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Final, NamedTuple

from bench import daemon, ovs
from bench.namespace import Namespace
from bench.rig import switch

_VDE: Final = "vde_switch"


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


@contextmanager
def vde_tap(land: Land, number: int) -> Iterator[None]:
    """VDE's switch between two taps."""
    with daemon.run_directory() as directory:
        taps = [f"{letter}{number}" for _, letter in land.ends]
        options = " ".join(f"-t {name}" for name in taps)
        # It ends when nobody can type at it.
        script = (
            f"sleep infinity | {_VDE} -f /dev/null -s {directory}/sockets {options}"
        )
        log = directory / "log"
        command = [*land.middle.prefix, "sh", "-c", script]
        with daemon.running(command, log) as process:
            daemon.wait_until(
                lambda: all(land.middle.link(name) for name in taps),
                "taps of VDE",
                log,
                process,
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
    "vde": vde_tap,
}


def missing(name: str) -> str:
    """Why a way cannot be had here, or nothing."""
    if name == "vde":
        return daemon.missing([_VDE], "vde2")
    return ovs.missing() if name.startswith("ovs") else ""


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
def _ovs(land: Land, name: str) -> Iterator[Callable[..., str]]:
    """Open vSwitch in the middle with a bridge of that name; yields its `ovs-vsctl`."""
    with (
        daemon.run_directory() as directory,
        ovs.running(directory, prefix=land.middle.prefix) as running,
    ):
        bridge = ("set", "bridge", name, "datapath_type=netdev")
        running.control("add-br", name, "--", *bridge)
        yield running.control
