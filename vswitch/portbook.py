"""The ports of a switch: which there are, and the slot of each in the shared tables."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from ports.base import MAX_PAIRS, MAX_PORTS, NO_FD, RING_STOPPED, RINGS_PER_PORT
from ports.errors import PortError
from ports.eth import EthPort
from ports.host import Backend, State
from ports.links import check_name
from ports.tap import AUTO, TapPort
from ports.vhost.sockets import Access, access
from ports.vhost_user import VhostUserPort
from ports.xdp import XdpPort
from vswitch.control import endpoint
from vswitch.control.endpoint import Endpoint
from vswitch.errors import ConfigError, VswitchError
from vswitch.kept import Item, Kept
from vswitch.missing import MissingPort
from vswitch.records import Shared
from vswitch.workers import Workers

_GUEST_ADDRESSES: Final = 16384
_UPLINK_ADDRESSES: Final = 65536
_NO_SLOT: Final = -1

_log = logging.getLogger(__name__)

Arguments = dict[str, Any]


class Port(Protocol):
    """What the manager asks of a port of any kind."""

    name: str
    kind: str
    mode: str
    backend: Backend
    warnings: Sequence[str]  # what whoever added it should know

    async def open(self) -> None:
        """Begin. Raises PortError."""

    async def resume(self, kept: Arguments, fds: Sequence[int]) -> None:
        """Begin with what a manager that was killed has kept of it; `fds` are its own.

        Raises PortError.
        """

    async def close(self) -> None:
        """End, and give everything back."""

    def state(self) -> State:
        """A word and a reason."""

    def features(self) -> list[str]:
        """Names of what was negotiated."""

    def queues(self) -> dict[str, int]:
        """Queue pairs in use and at most."""


class Entry:
    """A port in the manager's table."""

    def __init__(self, slot: int, leads_to: Endpoint, port: Port) -> None:
        self.slot = slot
        self.endpoint = leads_to
        self.port = port
        self._word = ""
        self._since = time.time()

    def note_state(self) -> State:
        """The port's state; how long it has been in it is known to a sample's time."""
        state = self.port.state()
        if state.word != self._word:
            self._word, self._since = state.word, time.time()
        return state

    def describe(self) -> Arguments:
        """What `show` prints of it."""
        state = self.note_state()
        return {
            "name": self.port.name,
            "kind": self.port.kind,
            "endpoint": self.endpoint.text,
            "mode": self.port.mode,
            "state": state.word,
            "reason": state.reason,
            "since": round(self._since, 3),
            "features": self.port.features(),
            "queues": self.port.queues(),
            "backend": self.port.backend.name,
            "backend_reason": self.port.backend.reason,
        }


class PortBook:
    """All ports of a switch. One is added or removed at a time; that is the caller's."""

    def __init__(
        self,
        shared: Shared,
        workers: Workers,
        kept: Kept,
        socket_group: str,
        socket_mode: str,
    ) -> None:
        """Begin with none; for sockets of ports that do not say who may connect."""
        self._shared = shared
        self._workers = workers
        self._kept = kept
        self._sockets = {"socket_group": socket_group, "socket_mode": socket_mode}
        self._entries: dict[str, Entry] = {}
        self._missing: dict[str, Entry] = {}
        self._taken_before: dict[str, int] = {}  # slots of uplinks to be opened again
        workers.report_faults(self._note_fault)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    @property
    def missing(self) -> list[Entry]:
        """Ports that are wanted and could not be opened; they have no slot."""
        return list(self._missing.values())

    @property
    def slots(self) -> dict[str, int]:
        """Where each port is in the shared tables."""
        return {name: entry.slot for name, entry in self._entries.items()}

    def named(self, name: str) -> Entry:
        """The port of that name.

        Raises:
            VswitchError: There is none.
        """
        entry = self._entries.get(name)
        if name in self._missing:
            reason = self._missing[name].port.state().reason
            raise VswitchError(f"port {name} is down: {reason}")
        if entry is None:
            known = ", ".join(self._entries) or "none"
            raise VswitchError(f"no port {name} (known: {known})")
        return entry

    async def add(self, wanted: Arguments) -> tuple[Entry, bool]:
        """Add a port; False with it where it was there already, just so.

        Args:
            wanted: endpoint and name; the other words of a port in a configuration
                file may be left out.

        Raises:
            VswitchError: The name or the endpoint is taken, or it cannot be opened.
        """
        leads_to = endpoint.parse(str(wanted["endpoint"]), Path("/"))
        name = endpoint.check_name(str(wanted["name"]))
        mode = str(wanted.get("mode") or "server")
        backend = str(wanted.get("backend") or AUTO)
        present = self._present(name, leads_to, mode, backend)
        if present is not None:
            return present, False
        slot = self._taken_before.pop(name, None)
        if slot is None:
            slot = self._free_slot()
            self._clear(slot)
        try:
            chosen = {"mode": mode, "backend": backend}
            port = self._make(slot, name, leads_to, wanted | chosen)
            self._kept.keep("slot", name, {"slot": slot, "wanted": wanted}, [])
            await _open(port, self._inherit(slot))
        except (PortError, OSError, MemoryError) as error:
            self._give_up(name, slot)
            raise VswitchError(f"port {name}: {error}") from error
        entry = self._entries[name] = Entry(slot, leads_to, port)
        self._missing.pop(name, None)
        _log.info("port %s: added endpoint=%s", name, leads_to.text)
        return entry, True

    def miss(self, wanted: Arguments, reason: str) -> None:
        """Show a port that is wanted and could not be opened, or why it still cannot."""
        leads_to = endpoint.parse(wanted["endpoint"], Path("/"))
        guest = leads_to.kind == endpoint.VHOST
        kind = VhostUserPort.kind if guest else leads_to.kind
        mode = wanted.get("mode", "server") if guest else ""
        port = MissingPort(wanted["name"], kind, mode, reason)
        entry = self._missing.setdefault(port.name, Entry(_NO_SLOT, leads_to, port))
        entry.port = port

    async def resume(self, ports: Sequence[Arguments]) -> None:
        """Go on with the ports of a manager that was killed, if they are wanted still.

        Guests are resumed at once. An uplink's rings are stopped, and it finds its slot,
        and what was kept of it, when it is added.
        """
        before = self._kept.items("slot")
        wanted = {words["name"]: words for words in ports}
        for name, item in before.items():
            slot = int(item.words["slot"])
            if item.words["wanted"] != wanted.get(name):
                continue
            if not await self._resume_guest(slot, wanted[name]):
                self._taken_before[name] = slot
        for name, item in before.items():
            if name not in self._entries:
                self._stop_rings(int(item.words["slot"]))
        await self._workers.sync()
        await self._workers.shed()
        for name, item in before.items():
            if name not in self._entries and name not in self._taken_before:
                await self._workers.flush(int(item.words["slot"]), also_static=True)
                self._give_up(name, int(item.words["slot"]))

    async def _resume_guest(self, slot: int, wanted: Arguments) -> bool:
        leads_to = endpoint.parse(wanted["endpoint"], Path("/"))
        name = wanted["name"]
        if leads_to.kind != endpoint.VHOST:
            return False
        state = self._inherit(slot)
        if state is None:
            return False
        full = {"mode": "server", "backend": AUTO} | wanted
        try:
            port = self._make(slot, name, leads_to, full)
            await _open(port, state)
        except (PortError, OSError, MemoryError) as error:
            _log.warning("port %s: cannot go on: %s", name, error)
            return False
        self._entries[name] = Entry(slot, leads_to, port)
        return True

    def _inherit(self, slot: int) -> Item | None:
        """What was kept of the port of a slot, with descriptors of the caller's own."""
        item = self._kept.items("port").get(str(slot))
        if item is None:
            return None
        message = self._kept.items("message").get(str(slot), Item({}, ()))
        fds = tuple(os.dup(fd) for fd in (*item.fds, *message.fds))
        return Item(item.words | {"message": message.words}, fds)

    def _stop_rings(self, slot: int) -> None:
        self._shared.ports[slot]["up"] = 0
        first = slot * RINGS_PER_PORT
        self._shared.rings[first : first + RINGS_PER_PORT]["state"] = RING_STOPPED

    async def remove(self, name: str) -> None:
        """Close a port and forget what was behind it.

        Raises:
            VswitchError: There is none of that name.
        """
        if self._missing.pop(name, None):
            return
        entry = self.named(name)
        await entry.port.close()
        await self._workers.flush(entry.slot, also_static=True)
        del self._entries[name]
        self._give_up(name, entry.slot)
        _log.info("port %s: removed", name)

    async def close(self) -> None:
        """Close all ports, whatever happens to one of them."""
        for entry in self:
            with contextlib.suppress(PortError, OSError, VswitchError):
                await entry.port.close()
        self._entries.clear()

    def _note_fault(self, slot: int, queue: int, what: str) -> None:
        """Tell a port that a worker has ended in the middle of its ring.

        Nobody can make an uplink's driver do what it should not; those go on.
        """
        for entry in self:
            port = entry.port
            if entry.slot == slot and isinstance(port, VhostUserPort):
                port.note_fault(queue, what)
            elif entry.slot == slot:
                _log.warning("port %s: a worker %s while it served it", port.name, what)

    def _present(
        self, name: str, leads_to: Endpoint, mode: str, backend: str
    ) -> Entry | None:
        present = self._entries.get(name)
        if present:
            has = (present.port.mode, present.port.backend.name)
            same = has[0] in {"", mode} and backend in {AUTO, has[1]}
            if present.endpoint == leads_to and same:
                return present
            taken = " ".join(word for word in (present.endpoint.text, *has) if word)
            text = f"cannot add port {name}: the name is taken by {taken}"
            raise VswitchError(f"{text} (choose another with --name)")
        for entry in self:
            if _are_one(entry.endpoint, leads_to):
                other = entry.port.name
                text = f"cannot add port {name}: {entry.endpoint.text} is port {other}"
                raise VswitchError(f"{text} (vswitch del-port {other})")
        return None

    def _make(
        self, slot: int, name: str, leads_to: Endpoint, wanted: Arguments
    ) -> Port:
        backend = wanted["backend"]
        _check_backend(backend, leads_to)
        if leads_to.kind == endpoint.XDP and wanted.get("queues") is not None:
            text = (
                f"cannot choose the queues of {leads_to.text}: it takes all there are"
            )
            raise ConfigError(f"{text} (ethtool -L {leads_to.rest} combined N)")
        allowed = self._who_may_connect(leads_to, wanted)
        pairs = _number(wanted, "queues", MAX_PAIRS, MAX_PAIRS)
        guest = leads_to.kind == endpoint.VHOST
        limit = _GUEST_ADDRESSES if guest else _UPLINK_ADDRESSES
        addresses = _number(wanted, "max_addresses", limit, _UPLINK_ADDRESSES)
        self._shared.ports[slot]["max_addresses"] = addresses
        header = self._shared.header[0]
        header["port_slots"] = max(int(header["port_slots"]), slot + 1)
        if leads_to.kind == endpoint.VHOST:
            return VhostUserPort(
                self._workers,
                slot,
                name,
                Path(leads_to.rest),
                wanted["mode"],
                pairs,
                access=allowed,
                config_space=bool(wanted.get("config_space")),
            )
        check_name(leads_to.kind, leads_to.rest)
        if leads_to.kind == endpoint.TAP:
            return TapPort(self._workers, slot, name, leads_to.rest, pairs, backend)
        if leads_to.kind == endpoint.ETH:
            return EthPort(self._workers, slot, name, leads_to.rest, pairs)
        return XdpPort(self._workers, slot, name, leads_to.rest)

    def _who_may_connect(self, leads_to: Endpoint, wanted: Arguments) -> Access:
        """Of a socket that we listen on: what the port says, else the switch.

        Raises:
            ConfigError: The port says it, and is no such socket.
            PortError: There is no such group, or it is no mode.
        """
        own = {word: wanted[word] for word in self._sockets if wanted.get(word)}
        listens = leads_to.kind == endpoint.VHOST and wanted["mode"] == "server"
        if own and not listens:
            text = f"cannot use {' and '.join(own)} with {leads_to.text}"
            raise ConfigError(f"{text}: we do not listen there (leave it out)")
        return access(**self._sockets | own)

    def _free_slot(self) -> int:
        taken = {*self.slots.values(), *self._taken_before.values()}
        for slot in range(MAX_PORTS):
            if slot not in taken:
                return slot
        message = f"cannot add a port: all {MAX_PORTS} are in use (remove one)"
        raise VswitchError(message)

    def _give_up(self, name: str, slot: int) -> None:
        """Free a slot of which no worker uses anything."""
        self._clear(slot)
        self._kept.drop("slot", name)
        self._kept.drop("port", slot)
        self._kept.drop("message", slot)
        self._kept.settle()  # a tap is gone when its last descriptor is

    def _clear(self, slot: int) -> None:
        """Wipe a slot that no worker uses."""
        self._shared.ports[slot] = 0
        self._shared.counters[:, slot] = 0
        rings = self._shared.rings[slot * RINGS_PER_PORT : (slot + 1) * RINGS_PER_PORT]
        rings[:] = 0
        for field in ("kick_fd", "call_fd", "err_fd"):
            rings[field] = NO_FD


def _are_one(one: Endpoint, other: Endpoint) -> bool:
    """Whether two endpoints lead to the same thing; an interface is one of any kind."""
    return one == other or (
        endpoint.VHOST not in {one.kind, other.kind} and one.rest == other.rest
    )


def _check_backend(backend: str, leads_to: Endpoint) -> None:
    """Refuse a choice of backend where there is none.

    Raises:
        ConfigError: Just so.
    """
    if backend != AUTO and leads_to.kind != endpoint.TAP:
        text = f"cannot use backend {backend!r} with {leads_to.text}"
        raise ConfigError(f"{text}: only a tap has a choice (leave it out)")


async def _open(port: Port, kept: Item | None) -> None:
    """Open a port; one that cannot be is closed again."""
    try:
        if kept:
            await port.resume(kept.words, kept.fds)
        else:
            await port.open()
    except BaseException:
        await port.close()
        raise


def _number(wanted: Arguments, name: str, default: int, most: int) -> int:
    """A number that may be left out.

    Raises:
        ConfigError: It is not within 1 to `most`.
    """
    given = wanted.get(name)
    number = default if given is None else int(given)
    if not 1 <= number <= most:
        raise ConfigError(f"cannot use {name} {number}: not within 1 to {most}")
    return number
