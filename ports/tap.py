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
from typing import Final, NamedTuple, cast

import numpy as np

from ports import tap_device, uring
from ports.base import (
    BACKEND_PLAIN,
    BACKEND_URING,
    KIND_NONE,
    KIND_TAP,
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
from ports.vhost.features import (
    RECEIVER,
    RECEIVER_USO,
    SENDER,
    SENDER_USO,
    feature_names,
)
from ports.vhost.virtio import NET_HDR_LEN


class _Way(NamedTuple):
    """A backend, as the data path knows it."""

    number: int
    missing: Callable[[int], str]  # what a tap's descriptor lacks for it, or nothing


# The best first; the last can always be had.
_WAYS: Final = {
    "io_uring": _Way(BACKEND_URING, uring.missing),
    "plain": _Way(BACKEND_PLAIN, lambda _: ""),
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
        self.backend = choose_backend(self._wanted_backend, self._tap.fds[0])
        if not self._tap.segments_udp:
            self._receiver &= ~RECEIVER_USO
            self._sender &= ~SENDER_USO
        await bring_up(self.interface)
        await self._monitor.start()
        self._numbers = await self._host.install(self._tap.fds)
        record = self._host.ports[self._slot]
        record["kind"], record["pairs"] = KIND_TAP, len(self._numbers)
        record["max_frame"], record["offloads"] = MAX_FRAME, self._receiver
        record["backend"] = _WAYS[self.backend.name].number
        owners = self._owners
        if len(self._numbers) == 1:
            owners = [self._host.owner_for(self._slot, 0)]
        for pair, (owner, number) in enumerate(zip(owners, self._numbers, strict=True)):
            for index in (2 * pair + TX, 2 * pair + RX):
                self._start(index, owner, number)
        await self._host.sync()
        record["up"] = 1

    async def close(self) -> None:
        """Detach; an interface that we made goes away."""
        await self._monitor.stop()
        record = self._host.ports[self._slot]
        record["up"] = 0
        for index in range(2 * len(self._numbers)):
            self._ring(index)["state"] = RING_STOPPED
        await self._host.sync()
        record["kind"], record["pairs"] = KIND_NONE, 0
        for index in range(2 * len(self._numbers)):
            self._ring(index)["kick_fd"] = NO_FD
        await self._host.uninstall(self._numbers)
        self._numbers = []
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
        return {"enabled": len(self._numbers), "max": len(self._owners)}

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
        if len(self._numbers) == len(self._owners):
            return ""
        remedy = f"ip tuntap add {self.interface} mode tap multi_queue"
        return f"; it has one queue for {len(self._owners)} workers ({remedy})"

    def _on_link(self, state: str) -> None:
        self._link = state

    def _start(self, index: int, owner: int, number: int) -> None:
        """Have a worker take up a ring of a queue that has that number there."""
        ring = self._ring(index)
        ring["owner"], ring["port"], ring["enabled"] = owner, self._slot, 1
        ring["header_len"], ring["features"] = NET_HDR_LEN, self._sender
        ring["shared"], ring["lock"] = 0, 0
        ring["call_fd"] = ring["err_fd"] = NO_FD
        ring["kick_fd"] = number
        ring["state"] = RING_STARTING

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
