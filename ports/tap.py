"""A tap port: a Linux tap interface as an uplink. Control half; `tap_data` has the other.

Life cycle: `open` attaches to the interface, which the kernel makes if it is absent, and
sets it up. An interface that we made goes away with our last descriptor; one that was
there (`ip tuntap add`) stays, and loses the offloads that we could do. The link going
down and up is followed and shown; frames for a link that is down are counted by the data
path, as the kernel refuses them.

How frames come and go (the backend) is chosen then, too: the best that can be had, unless
somebody asks for another one.

Every worker has a queue of its own, which it receives from and transmits into: so none
waits for another, and as the kernel answers a flow by the queue that it came in by, both
ways of a flow stay with one worker where its guest does. A tap that was made for a single
queue is used by all.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, cast

import numpy as np

from ports import tap_device, uring, vhost_net
from ports.base import (
    BACKEND_PLAIN,
    BACKEND_URING,
    KIND_NONE,
    KIND_TAP,
    KIND_VHOST_NET,
    NO_FD,
    RING_STARTING,
    RING_STOPPED,
    RINGS_PER_PORT,
    RX,
    TX,
)
from ports.burst import MAX_FRAME
from ports.errors import PortError
from ports.host import NO_CHOICE, Backend, Host, State
from ports.links import LinkMonitor, bring_up
from ports.tap_device import Tap
from ports.vhost.channel import close_fds
from ports.vhost.features import (
    RECEIVER,
    RECEIVER_USO,
    SENDER,
    SENDER_USO,
    feature_names,
)
from ports.vhost.virtio import NET_HDR_LEN
from ports.vhost_net import VhostNet


class _Way(NamedTuple):
    """A backend, as the data path knows it."""

    kind: int
    number: int
    missing: Callable[[int], str]  # what a tap's descriptor lacks for it, or nothing


# The best first; the last can always be had.
_WAYS: Final = {
    "vhost-net": _Way(KIND_VHOST_NET, BACKEND_PLAIN, vhost_net.missing),
    "io_uring": _Way(KIND_TAP, BACKEND_URING, uring.missing),
    "plain": _Way(KIND_TAP, BACKEND_PLAIN, lambda _: ""),
}
AUTO: Final = "auto"
BACKENDS: Final = (AUTO, *_WAYS)


class TapPort:
    """Control half of a tap port."""

    kind = "tap"
    mode = ""
    warnings: Sequence[str] = ()

    def __init__(
        self,
        host: Host,
        slot: int,
        name: str,
        interface: str,
        most_queues: int,
        backend: str,
    ) -> None:
        self.name = name
        self.interface = interface
        self.backend = NO_CHOICE
        self._wanted_backend = backend
        self._host = host
        self._slot = slot
        self._owners = host.active[:most_queues]  # of its queues, if it has as many
        self._tap: Tap | None = None
        self._numbers: list[int] = []  # of its queues in workers
        self._vhosts: list[VhostNet] = []  # or what serves its queues
        self._link = "down"
        self._receiver, self._sender = RECEIVER, SENDER
        self._monitor = LinkMonitor(interface, self._on_link)

    async def open(self) -> None:
        """Attach to the interface, set it up, and start its rings.

        Raises:
            PortError: It is no tap, is taken, or we lack the right; or the backend that
                was asked for cannot be had.
        """
        await tap_device.check_unused(self.interface)
        self._tap = tap_device.attach(self.interface, len(self._owners))
        await self._begin()

    async def resume(self, kept: dict[str, Any], fds: Sequence[int]) -> None:
        """Go on with the queues of a manager that was killed; no ring is in use.

        Raises:
            PortError: The backend that was asked for cannot be had any more.
        """
        queues = kept["queues"]
        close_fds(fds[queues:])  # the kernel's threads, which have served our rings
        self._tap = Tap(list(fds[:queues]), kept["segments_udp"])
        await self._begin()

    async def _begin(self) -> None:
        """Set up the interface that we are attached to, and start its rings."""
        assert self._tap is not None  # noqa: S101 (both callers have attached)
        self._keep()
        self.backend = choose_backend(self._wanted_backend, self._tap.fds[0])
        if not self._tap.segments_udp:
            self._receiver &= ~RECEIVER_USO
            self._sender &= ~SENDER_USO
        await bring_up(self.interface)
        await self._monitor.start()
        way = _WAYS[self.backend.name]
        self._prepare(way)
        if way.kind == KIND_VHOST_NET:
            await self._connect_vhosts()
        else:
            await self._connect()
        for index in range(2 * self._queues):
            self._ring(index)["state"] = RING_STARTING
        await self._host.sync()
        self._keep()
        self._host.ports[self._slot]["up"] = 1

    def _keep(self) -> None:
        """Let the interface, and the kernel's threads at it, outlive us."""
        assert self._tap is not None  # noqa: S101 (both callers have attached)
        words = {"queues": self._queues, "segments_udp": self._tap.segments_udp}
        fds = [*self._tap.fds, *(vhost.fileno() for vhost in self._vhosts)]
        self._host.keep(self._slot, words, fds)

    async def close(self) -> None:
        """Detach; an interface that we made goes away."""
        await self._monitor.stop()
        record = self._host.ports[self._slot]
        record["up"] = 0
        for index in range(2 * self._queues):
            self._ring(index)["state"] = RING_STOPPED
        await self._host.sync()
        record["kind"], record["pairs"] = KIND_NONE, 0
        for index in range(2 * self._queues):
            self._ring(index)["kick_fd"] = self._ring(index)["call_fd"] = NO_FD
        await self._host.uninstall(self._numbers)
        self._numbers = []
        for vhost in self._vhosts:
            await vhost.close()
        self._vhosts = []
        if self._tap:
            tap_device.detach(self._tap)
            self._tap = None

    def state(self) -> State:
        """The port's state and its reason."""
        state = self._link_state()
        return State(state.word, f"{state.reason}{self._few_queues()}")

    def features(self) -> list[str]:
        """What the kernel does and lets us do."""
        return feature_names(self._receiver | self._sender)

    def queues(self) -> dict[str, int]:
        """One for each worker, if the interface has as many."""
        return {"enabled": self._queues, "max": len(self._owners)}

    @property
    def _fds(self) -> list[int]:
        return self._tap.fds if self._tap else []

    @property
    def _queues(self) -> int:
        return len(self._fds)

    def _link_state(self) -> State:
        interface = f"interface {self.interface}"
        if self._link == "up":
            return State("up", f"{interface} is up")
        if self._link == "moved":
            where = "in another network namespace, where its link cannot be seen"
            return State("up", f"{interface} is {where}")
        if self._link == "gone":
            remedy = f"vswitch del-port {self.name}, then add it again"
            return State("down", f"{interface} is gone ({remedy})")
        remedy = f"ip link set {self.interface} up"
        return State("down", f"{interface} is down ({remedy})")

    def _few_queues(self) -> str:
        """What to say of an interface that has not a queue for each worker."""
        if self._queues == len(self._owners):
            return ""
        remedy = f"ip tuntap add {self.interface} mode tap multi_queue"
        return f"; it has one queue for {len(self._owners)} workers ({remedy})"

    def _on_link(self, state: str) -> None:
        self._link = state
        # vhost-net does not tell what becomes of a frame; other backends hear it.
        for pair in range(len(self._vhosts)):
            self._ring(2 * pair + TX)["enabled"] = state in {"up", "moved"}

    def _prepare(self, way: _Way) -> None:
        """Fill in what is the same for every backend."""
        record = self._host.ports[self._slot]
        record["kind"], record["backend"] = way.kind, way.number
        record["max_frame"], record["offloads"] = MAX_FRAME, self._receiver
        record["pairs"] = self._queues
        owners = self._owners
        if self._queues == 1:
            owners = [self._host.owner_for(self._slot, 0)]
        for index in range(2 * self._queues):
            ring = self._ring(index)
            ring["owner"], ring["port"] = owners[index // 2], self._slot
            ring["header_len"], ring["features"] = NET_HDR_LEN, self._sender
            ring["shared"], ring["lock"], ring["enabled"] = 0, 0, 1
            ring["call_fd"] = ring["err_fd"] = NO_FD

    async def _connect(self) -> None:
        """Let workers read and write the queues themselves."""
        self._numbers = await self._host.install(self._fds)
        for index in range(2 * self._queues):
            self._ring(index)["kick_fd"] = self._numbers[index // 2]

    async def _connect_vhosts(self) -> None:
        """Let the kernel serve the queues, and workers its rings."""
        for pair, fd in enumerate(self._fds):
            vhost = VhostNet(self._host)
            self._vhosts.append(vhost)
            await vhost.open(fd)
            rx, tx = self._ring(2 * pair + RX), self._ring(2 * pair + TX)
            vhost.describe(rx, tx)
            tx["shared"] = self._host.several
        self._on_link(self._link)

    def _ring(self, index: int) -> np.void:
        return cast("np.void", self._host.rings[self._slot * RINGS_PER_PORT + index])


def choose_backend(wanted: str, fd: int) -> Backend:
    """The best backend that a tap's descriptor can have, or the one of BACKENDS wanted.

    Raises:
        PortError: That cannot be had.
    """
    passed: dict[str, str] = {}
    for name in _WAYS if wanted == AUTO else (wanted,):
        lack = _WAYS[name].missing(fd)
        if not lack:
            return Backend(
                name, "; ".join(f"no {n}: {why}" for n, why in passed.items())
            )
        passed[name] = lack
    raise PortError(f"cannot use backend {wanted}: {passed[wanted]}")
