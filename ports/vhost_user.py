"""A vhost-user port: one guest, attached through a Unix socket.

Life cycle: `open` listens (server mode) or starts to connect (client mode). One front-end
at a time is served by a task that reads a message, lets the session change what is
*wanted*, brings the port there (`_reconcile`), and only then replies. When the front-end
goes away everything it gave us is given back and the port waits for the next one.

Order of `_reconcile`, each step awaited: rings that may not go on are stopped; new memory
is mapped in every worker; the table of regions is switched in one store; old memory is
unmapped; new call descriptors are put in place; rings that may run are started by their
owners. Nothing is unmapped or closed before every worker has confirmed that it looks at
the new records.

What an identical memory table needs is nothing: front-ends send it at every start.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar, cast

import numpy as np

from ports.aio import readable, unbroken, writable
from ports.appear import appeared
from ports.base import (
    KIND_NONE,
    KIND_VHOST_USER,
    LOG_ROW,
    NO_FD,
    RING_BROKEN,
    RING_STARTING,
    RING_STOPPED,
    RINGS_PER_PORT,
    RX,
    TABLE_ROWS,
    TX,
)
from ports.burst import MAX_FRAME
from ports.errors import ProtocolError
from ports.host import NO_CHOICE, Host, Mapping, State
from ports.vhost import virtio
from ports.vhost.channel import Channel, close_fds
from ports.vhost.features import OFFERED_PROTOCOL, RECEIVER, feature_names
from ports.vhost.messages import PF_CONFIG, Message
from ports.vhost.session import (
    NOT_SHARED,
    BaseReply,
    Session,
    WantedRegion,
    WantedRing,
)
from ports.vhost.sockets import Access, check_path, explain_refusal, listen

_ETHERNET_AND_TAG: Final = 18
_CONNECT_S: Final = 0.01
_LOOK_AGAIN_S: Final = 1.0
_MEMORY_DUE_S: Final = 1.0
_LOG_WINDOW_S: Final = 10.0
_LOG_LINES: Final = 20
_BRIEF_S: Final = 1.0
_LEFT_OFTEN: Final = 3
_FAULTS_COUNT_S: Final = 3600.0  # a fault is forgotten after that

_log = logging.getLogger(__name__)

_Thing = TypeVar("_Thing")
_Mapped = tuple[WantedRegion, Mapping]


class _Basis(NamedTuple):
    """What a running ring rests on; if any of it changes, the ring has to stop."""

    places: tuple[object, ...]  # its three parts: part of a file, offset
    num: int
    features: int  # without LOG_ALL, which does not concern it
    kick_fd: int  # the session's
    err_fd: int


class _Running(NamedTuple):
    """What a ring was started with."""

    basis: _Basis
    base: int  # packed: the position that the front-end gave
    kick: int  # numbers in workers, NO_FD for none
    err: int


class _Left(NamedTuple):
    """Where a packed ring stood when its front-end went away without stopping it."""

    places: tuple[object, ...]
    num: int
    base: int
    position: int


class VhostUserPort:
    """Control half of a vhost-user port."""

    kind = "vhost-user"
    backend = NO_CHOICE
    warnings: Sequence[str] = ()

    def __init__(
        self,
        host: Host,
        slot: int,
        name: str,
        path: Path,
        mode: str,
        pairs: int,
        *,
        access: Access,
        config_space: bool = False,
    ) -> None:
        self.name = name
        self.path = path
        self.mode = mode
        self._host = host
        self._slot = slot
        self._pairs = pairs
        self._access = access
        self._offered_protocol = OFFERED_PROTOCOL | (PF_CONFIG if config_space else 0)
        self._listener: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._session: Session | None = None
        self._features_since = 0.0
        self._mapped: list[_Mapped] = []
        self._log_mapped: _Mapped | None = None
        self._running: dict[int, _Running] = {}
        self._left: dict[int, _Left] = {}
        self._ran: set[int] = set()  # rings that ran since the front-end connected
        self._calls: dict[int, tuple[int, int]] = {}  # ring: our fd, number in workers
        self._table_half = 0
        self._trouble: OSError | None = None
        self._connection: socket.socket | None = None
        self._quarantined = ""  # why, until another front-end's frames flow
        self._culprit: Session | None = None
        self._faults = 0  # workers that ended at a ring of ours
        self._fault_at = 0.0
        self._connected = 0.0
        self._left_early = 0  # front-ends in a row that soon went while negotiating
        self._log_window = 0.0
        self._logged = 0

    # --- life ---

    async def open(self) -> None:
        """Listen, or begin to look for the front-end's socket.

        Raises:
            PortError: The path cannot be used.
        """
        check_path(self.path)
        if self.mode == "server":
            self._listener = listen(self.path, self._access)
        record = self._host.ports[self._slot]
        record["kind"] = KIND_VHOST_USER
        record["max_frame"] = MAX_FRAME
        for index in range(RINGS_PER_PORT):
            ring = self._ring(index)
            ring["port"], ring["number"] = self._slot, self._number(index)
        if self._listener:
            serve = self._accept_forever(self._listener)
        else:
            serve = self._connect_forever()
        self._tasks.append(asyncio.create_task(serve))

    async def close(self) -> None:
        """Let the front-end go and give everything back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener:
            self._listener.close()
            self.path.unlink(missing_ok=True)
        self._host.ports[self._slot]["kind"] = KIND_NONE

    # --- what users see ---

    def state(self) -> State:
        """The port's state and its reason."""
        session = self._session
        if warning := self._warning():
            return warning
        if session is None:
            return State("waiting-for-frontend", self._what_for())
        if int(self._host.ports[self._slot]["up"]):
            return State("up", self._describe_rings())
        problem = self._problem(session)
        if problem:
            return State("waiting-for-driver", problem)
        if not session.protocol_features and not session.features_known:
            return State("negotiating", "the front-end is connected")
        return State("waiting-for-driver", "the guest's driver has not started")

    def features(self) -> list[str]:
        """Names of the negotiated virtio features."""
        session = self._session
        return feature_names(session.features or 0) if session else []

    def queues(self) -> dict[str, int]:
        """Queue pairs: enabled ones, and how many a guest may have."""
        return {
            "enabled": int(self._host.ports[self._slot]["pairs"]),
            "max": self._pairs,
        }

    def note_fault(self, queue: int, what: str) -> None:
        """Part from the front-end when a second worker ends at a ring of the port.

        The first may have been any mistake of ours. The rings are stopped before
        anybody takes them up.

        Args:
            queue: The virtqueue that the worker was at.
            what: What became of it.
        """
        now = time.monotonic()
        if now - self._fault_at > _FAULTS_COUNT_S:
            self._faults = 0
        self._fault_at = now
        self._faults += 1
        reason = f"a worker {what} while it served virtqueue {queue}"
        if self._faults == 1:
            self._log(f"{reason} (once more, and the port is quarantined)")
            return
        self._host.ports[self._slot]["up"] = 0
        for index in self._running:
            self._ring(index)["state"] = RING_STOPPED
        self._quarantine(f"{reason}, and not for the first time")

    def _warning(self) -> State | None:
        """What is wrong with front-ends that come and go."""
        if self._quarantined:
            return State("quarantined", f"{self._quarantined} (start the guest anew)")
        if self._left_early >= _LEFT_OFTEN and self._is_new():
            text = "front-ends leave while negotiating (has their guest more than"
            return State("negotiating", f"{text} {self._pairs} queue pairs?)")
        return None

    def _what_for(self) -> str:
        if self.mode == "server":
            return f"listening on {self.path}"
        trouble = self._trouble and explain_refusal(self.path, self._trouble)
        return f"connecting to {self.path}: {trouble or 'no front-end yet'}"

    def _is_new(self) -> bool:
        """Whether the last front-end connected a moment ago."""
        return time.monotonic() - self._connected < _BRIEF_S

    def _describe_rings(self) -> str:
        pairs = int(self._host.ports[self._slot]["pairs"])
        broken = [
            index
            for index in self._running
            if int(self._ring(index)["state"]) == RING_BROKEN
        ]
        text = f"{pairs} queue pair{'s' if pairs != 1 else ''}"
        if broken:
            text += f"; virtqueue {broken[0]} is broken: the guest's indexes make no"
            text += " sense (reset the guest's driver)"
        return text

    def _problem(self, session: Session) -> str:
        if session.memory_problem:
            return session.memory_problem
        waited = time.monotonic() - self._features_since
        if session.features_known and not session.memory and waited > _MEMORY_DUE_S:
            return NOT_SHARED
        return session.problem

    # --- the socket ---

    async def _accept_forever(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            await self._serve(connection)

    async def _connect_forever(self) -> None:
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # A Unix socket connects at once or not at all.
                connection.setblocking(False)
                connection.connect(str(self.path))
            except OSError as error:
                connection.close()
                self._trouble = error.with_traceback(None)
                if isinstance(error, FileNotFoundError):
                    await appeared(self.path, _LOOK_AGAIN_S)
                else:
                    # Nothing tells when somebody begins to listen on a socket.
                    await asyncio.sleep(_CONNECT_S)
                continue
            await self._serve(connection)

    async def _serve(self, connection: socket.socket) -> None:
        """Serve one front-end until it goes, or breaks the protocol."""
        channel = Channel(connection)
        self._connection = connection
        session = self._session = Session(
            self._pairs, offered_protocol=self._offered_protocol
        )
        self._features_since = 0.0
        self._connected = time.monotonic()
        self._ran.clear()
        self._log("connected")
        try:
            await self._converse(channel, session)
        except EOFError:
            self._log("the front-end went away")
        except ProtocolError as error:
            self._log(f"{error}; closing the connection")
        except Exception:  # noqa: BLE001 (our mistake costs a connection, not the port)
            _log.exception("port %s: closing the connection", self.name)
        finally:
            channel.close()
            await unbroken(self._disconnect(session))

    async def _converse(self, channel: Channel, session: Session) -> None:
        while True:
            message = await self._receive(channel)
            known = session.features_known
            step = session.handle(message)
            if step.refused:
                self._log(step.refused)
            if session.features_known and not known:
                self._features_since = time.monotonic()
                asyncio.get_running_loop().call_later(
                    _MEMORY_DUE_S + 0.1, self._warn_of_missing_memory, session
                )
            reply = step.reply
            try:
                await unbroken(self._reconcile(session))
            except (OSError, MemoryError) as error:
                self._log(f"cannot take what the front-end gave: {error}")
                if step.nack is None:
                    raise ProtocolError("cannot go on without it") from error
                reply = step.nack
            if step.base is not None:
                reply = step.base.encode(self._next_index(step.base))
            for address in session.take_announced():
                await self._host.announce(self._slot, address)
            if reply is not None:
                await self._send(channel, reply)
            close_fds(session.take_retired())
            if step.close:
                raise ProtocolError(step.refused or "the message cannot be answered")

    async def _receive(self, channel: Channel) -> Message:
        while True:
            message = channel.receive(time.monotonic())
            if message is not None:
                return message
            due = channel.deadline_s
            timeout = None if due is None else max(0.0, due - time.monotonic())
            try:
                await asyncio.wait_for(readable(channel.fileno()), timeout)
            except TimeoutError:
                message_text = "a message was begun and not completed"
                raise ProtocolError(message_text) from None

    async def _send(self, channel: Channel, reply: bytes) -> None:
        channel.send(reply)
        while channel.wants_write:
            await writable(channel.fileno())
            channel.flush()

    async def _disconnect(self, session: Session) -> None:
        early = not session.features_known and self._is_new()
        self._left_early = self._left_early + 1 if early else 0
        packed, running = session.packed, dict(self._running)
        session.close()
        await self._reconcile(session)
        self._left = self._positions(running) if packed else {}
        close_fds(session.take_retired())
        self._session = None
        await self._host.flush(self._slot, also_static=False)

    def _quarantine(self, reason: str) -> None:
        """Part from a front-end that took away what we had from it."""
        self._log(f"{reason}; closing the connection")
        self._quarantined, self._culprit = reason, self._session
        if self._connection:
            with contextlib.suppress(OSError):  # it is gone
                self._connection.shutdown(socket.SHUT_RDWR)

    def _warn_of_missing_memory(self, session: Session) -> None:
        if session is self._session and not session.memory:
            self._log(NOT_SHARED)

    # --- wanted and applied ---

    async def _reconcile(self, session: Session) -> None:
        served = any(ring.enabled for ring in session.rings)
        wanted = {
            ring.index: ring for ring in session.rings if ring.runnable and served
        }
        await self._stop_rings(session, wanted)
        await self._switch_memory(session)
        await self._replace_calls(wanted)
        await self._switch_logging(wanted)
        await self._start_rings(session, wanted)
        self._publish(session)

    async def _stop_rings(
        self, session: Session, wanted: dict[int, WantedRing]
    ) -> None:
        stale = [
            index
            for index, running in self._running.items()
            if index not in wanted or running.basis != _basis(session, wanted[index])
        ]
        if not stale:
            return
        self._host.ports[self._slot]["up"] = 0
        for index in stale:
            self._ring(index)["state"] = RING_STOPPED
        await self._host.sync()
        numbers = []
        for index in stale:
            running = self._running.pop(index)
            numbers += [n for n in (running.kick, running.err) if n != NO_FD]
            record = self._ring(index)
            record["kick_fd"] = record["call_fd"] = record["err_fd"] = NO_FD
            if index in self._calls:
                numbers.append(self._calls.pop(index)[1])
        await self._host.uninstall(numbers)

    async def _switch_memory(self, session: Session) -> None:
        old = [*self._mapped, *_listed(self._log_mapped)]
        wanted = [*session.memory, *_listed(session.log)]
        if [_identity(region) for region, _ in old] == [
            _identity(region) for region in wanted
        ]:
            return
        kept = {_file_part(region): mapping for region, mapping in old}
        new: list[_Mapped] = []
        added: list[Mapping] = []
        try:
            for region in wanted:
                mapping = kept.get(_file_part(region))
                if mapping is None:
                    mapping = await self._map(region)
                    added.append(mapping)
                new.append((region, mapping))
        except (OSError, MemoryError):
            await self._host.unmap(added)
            raise
        self._log_mapped = new.pop() if session.log else None
        self._mapped = new
        self._write_table()
        await self._host.sync()
        used = {mapping for _, mapping in [*new, *_listed(self._log_mapped)]}
        gone = [mapping for _, mapping in old if mapping not in used]
        if gone:
            await self._host.unmap(gone)

    async def _map(self, region: WantedRegion) -> Mapping:
        """Map a region's pages; the region may begin inside its first page."""
        page = region.block_size
        begin = region.mmap_offset // page * page
        end = -(-(region.mmap_offset + region.size) // page) * page
        where = f"from offset {begin:#x} on"
        lost = partial(
            self._quarantine, f"the guest's memory file was truncated {where}"
        )
        return await self._host.map(region.fd, end - begin, begin, page, lost)

    def _write_table(self) -> None:
        """Write the other half of this port's region rows, then name it in one store."""
        self._table_half = 1 - self._table_half
        first = (2 * self._slot + self._table_half) * TABLE_ROWS
        for row, mapped in enumerate(self._mapped, start=first):
            self._write_row(row, mapped)
        self._host.regions[first + LOG_ROW]["size"] = 0
        if self._log_mapped:
            self._write_row(first + LOG_ROW, self._log_mapped)
        self._host.ports[self._slot]["regions"] = first << 8 | len(self._mapped)

    def _write_row(self, row: int, mapped: _Mapped) -> None:
        region, mapping = mapped
        record = self._host.regions[row]
        record["gpa"] = _signed(region.gpa)
        record["size"] = region.size
        record["addr"] = _address(region, mapping)
        record["frontend_va"] = _signed(region.frontend_va)

    async def _switch_logging(self, wanted: dict[int, WantedRing]) -> None:
        """Begin or cease to mark what is written to running rings."""
        changed = [
            index
            for index in self._running
            if bool(self._ring(index)["logged"]) != wanted[index].logged
        ]
        for index in changed:
            self._write_logging(wanted[index])
        if changed:
            await self._host.sync()

    def _write_logging(self, ring: WantedRing) -> None:
        assert ring.addr is not None  # noqa: S101 (runnable rings have areas)
        assert ring.areas is not None  # noqa: S101
        record, table = self._ring(ring.index), ring.areas.desc
        record["log_used"] = _signed(ring.addr.log)
        region, _ = self._mapped[table.region]
        record["log_desc"] = _signed(region.gpa + table.offset)
        record["logged"] = int(ring.logged)

    async def _replace_calls(self, wanted: dict[int, WantedRing]) -> None:
        """Put new call descriptors in place of running rings' old ones."""
        changed = [
            index
            for index in self._running
            if self._calls.get(index, (NO_FD, NO_FD))[0] != wanted[index].call_fd
        ]
        if not changed:
            return
        old = [self._calls.pop(index)[1] for index in changed if index in self._calls]
        for index in changed:
            await self._install_call(index, wanted[index].call_fd)
        await self._host.sync()
        await self._host.uninstall(old)

    async def _install_call(self, index: int, fd: int) -> None:
        number = NO_FD
        if fd != NO_FD:
            (number,) = await self._host.install([fd])
            self._calls[index] = (fd, number)
        self._ring(index)["call_fd"] = number

    async def _start_rings(
        self, session: Session, wanted: dict[int, WantedRing]
    ) -> None:
        fresh = [ring for index, ring in wanted.items() if index not in self._running]
        for ring in fresh:
            await self._prepare_ring(session, ring)
        for index, ring in wanted.items():
            self._ring(index)["enabled"] = int(ring.enabled)
        for ring in fresh:
            self._ring(ring.index)["state"] = RING_STARTING
        if fresh:
            await self._host.sync()

    async def _prepare_ring(self, session: Session, ring: WantedRing) -> None:
        numbers = []
        for fd in (ring.kick_fd, ring.err_fd):
            numbers += await self._host.install([fd]) if fd != NO_FD else [NO_FD]
        kick, err = numbers
        basis = _basis(session, ring)
        base = virtio.PACKED_BASE if ring.base is None else ring.base
        self._running[ring.index] = _Running(basis, base, kick, err)
        self._ran.add(ring.index)
        assert ring.areas is not None  # noqa: S101 (runnable rings have areas)
        record = self._ring(ring.index)
        record["owner"] = self._host.owner_for(self._slot, ring.index // 2)
        record["shared"] = int(self._host.several)
        record["size"] = ring.num
        record["header_len"] = session.header_len
        record["features"] = session.features or 0
        for part in ("desc", "avail", "used"):
            place = getattr(ring.areas, part)
            region, mapping = self._mapped[place.region]
            record[part] = _address(region, mapping) + place.offset
        self._write_logging(ring)
        record["lock"] = 0
        record["packed"] = int(session.packed)
        record["next_avail"] = self._position(ring.index)
        record["signalled_used"] = base
        record["kick_fd"], record["err_fd"] = kick, err
        await self._install_call(ring.index, ring.call_fd)

    def _positions(self, running: dict[int, _Running]) -> dict[int, _Left]:
        """Where packed rings stand that were stopped because the front-end is gone."""
        return {
            index: _Left(
                basis.places, basis.num, base, int(self._ring(index)["next_used"])
            )
            for index, (basis, base, _, _) in running.items()
        }

    def _position(self, index: int) -> int:
        """Where to take up a packed ring: its base, unless we know better.

        A front-end that lost us does not know how far we came, and says again what it
        said at the ring's start.
        """
        basis, base, _, _ = self._running[index]
        left = self._left.pop(index, None)
        if left and left[:3] == (basis.places, basis.num, base):
            return left.position
        return base

    def _publish(self, session: Session) -> None:
        """Say whether frames may flow, and into how many queue pairs."""
        runs = [
            index in self._running and session.rings[index].enabled
            for index in range(len(session.rings))
        ]
        pairs = 0
        while pairs < self._pairs and runs[2 * pairs + TX]:
            pairs += 1
        record = self._host.ports[self._slot]
        mtu = session.mtu
        record["max_frame"] = MAX_FRAME if mtu is None else mtu + _ETHERNET_AND_TAG
        record["pairs"] = pairs
        record["offloads"] = (session.features or 0) & RECEIVER
        record["up"] = int(pairs > 0 and any(runs[RX::2]))
        if record["up"] and session is not self._culprit:
            self._quarantined = ""

    def _next_index(self, stopped: BaseReply) -> int:
        """Next available index of a ring that was stopped: what it has consumed."""
        if stopped.index not in self._ran:
            return stopped.fallback
        return int(self._ring(stopped.index)["next_used"])

    def _number(self, index: int) -> int:
        return self._slot * RINGS_PER_PORT + index

    def _ring(self, index: int) -> np.void:
        return cast("np.void", self._host.rings[self._number(index)])

    def _log(self, text: str) -> None:
        """Log a line; of a storm of lines (a reconnect loop) the first, then how many."""
        now = time.monotonic()
        if now - self._log_window > _LOG_WINDOW_S and self._logged <= _LOG_LINES:
            self._log_window, self._logged = now, 0
        self._logged += 1
        if self._logged <= _LOG_LINES:
            _log.info("port %s: %s", self.name, text)
        elif self._logged == _LOG_LINES + 1:
            _log.info("port %s: more lines; they are counted for a while", self.name)
            asyncio.get_running_loop().call_later(_LOG_WINDOW_S, self._log_count)

    def _log_count(self) -> None:
        """Log how many lines were left out, and begin anew."""
        left_out = self._logged - _LOG_LINES
        _log.info("port %s: %d lines left out", self.name, left_out)
        self._log_window, self._logged = time.monotonic(), 0


def _basis(session: Session, ring: WantedRing) -> _Basis:
    assert ring.areas is not None  # noqa: S101 (runnable rings have areas)
    places = tuple(
        (_file_part(session.memory[place.region]), place.offset) for place in ring.areas
    )
    features = (session.features or 0) & ~virtio.F_LOG_ALL
    return _Basis(places, ring.num, features, ring.kick_fd, ring.err_fd)


def _listed(thing: _Thing | None) -> list[_Thing]:
    return [] if thing is None else [thing]


def _identity(region: WantedRegion) -> tuple[int, ...]:
    return (region.gpa, region.frontend_va, *_file_part(region))


def _file_part(region: WantedRegion) -> tuple[int, ...]:
    return (region.device, region.inode, region.mmap_offset, region.size)


def _address(region: WantedRegion, mapping: Mapping) -> int:
    """Where a region's first byte is mapped."""
    return mapping.addr + region.mmap_offset - mapping.offset


def _signed(word: int) -> int:
    """A 64-bit address as the records hold it."""
    return word - (1 << 64) if word >= 1 << 63 else word
