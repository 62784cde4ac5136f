"""What is applied of a vhost-user session: the records, mappings and rings of its port.

`reconcile` brings a port to what its session wants. Its order, each step awaited: rings
that may not go on are stopped; new memory is mapped in every worker; the table of regions
is switched in one store; old memory is unmapped; new call descriptors are put in place;
rings that may run are started by their owners. Nothing is unmapped or closed before every
worker has confirmed that it looks at the new records.

What an identical memory table needs is nothing: front-ends send it at every start.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar, cast

import numpy as np

from ports.base import (
    LOG_ROW,
    NO_FD,
    RING_BROKEN,
    RING_RUNNING,
    RING_STARTING,
    RING_STOPPED,
    RINGS_PER_PORT,
    RX,
    TABLE_ROWS,
    TX,
)
from ports.burst import MAX_FRAME
from ports.host import Host, Mapping
from ports.vhost import virtio
from ports.vhost.features import RECEIVER
from ports.vhost.session import BaseReply, Session, WantedRegion, WantedRing

_ETHERNET_AND_TAG: Final = 18

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


class Left(NamedTuple):
    """A packed ring whose front-end, or manager, went away without stopping it.

    Where it stood is in its record for as long as it is not started again.
    """

    places: tuple[object, ...]
    num: int
    base: int


_TAKEN_UP: Final = frozenset({RING_RUNNING, RING_BROKEN})


class Applied:
    """One port's. Whoever changes it does so in one task."""

    def __init__(
        self, host: Host, slot: int, pairs: int, lost: Callable[[str], None]
    ) -> None:
        """Begin with nothing; `lost` is told why when a worker lost a guest's memory."""
        self._host = host
        self._slot = slot
        self._pairs = pairs
        self._lost = lost
        self._mapped: list[_Mapped] = []
        self._log_mapped: _Mapped | None = None
        self._running: dict[int, _Running] = {}
        self._calls: dict[int, tuple[int, int]] = {}  # ring: our fd, number in workers
        self._table_half = 0
        self.ran: set[int] = set()  # rings that ran since the front-end connected
        self.left: dict[int, Left] = {}

    def number_rings(self) -> None:
        """Tell each ring's record whose it is."""
        for index in range(RINGS_PER_PORT):
            ring = self._ring(index)
            ring["port"], ring["number"] = self._slot, self._number(index)

    def stop_now(self) -> None:
        """Let nobody take up a ring from now on; who is at one goes on until a sync."""
        self._host.ports[self._slot]["up"] = 0
        for index in self._running:
            self._ring(index)["state"] = RING_STOPPED

    @property
    def broken(self) -> list[int]:
        """Rings whose guest's indexes make no sense."""
        return [n for n in self._running if int(self._ring(n)["state"]) == RING_BROKEN]

    @property
    def up(self) -> bool:
        """Whether frames may flow."""
        return bool(self._host.ports[self._slot]["up"])

    @property
    def enabled_pairs(self) -> int:
        """Queue pairs that we may transmit into."""
        return int(self._host.ports[self._slot]["pairs"])

    async def reconcile(self, session: Session) -> None:
        """Bring the port to what the session wants.

        Raises:
            OSError, MemoryError: What the front-end gave cannot be taken.
        """
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
        lost = partial(self._lost, f"the guest's memory file was truncated {where}")
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
        self.ran.add(ring.index)
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

    async def leave(self, session: Session) -> None:
        """Apply a session that is over, and remember where its packed rings stood."""
        packed, running = session.packed, dict(self._running)
        session.close()
        await self.reconcile(session)
        self.left = {}
        if packed:
            for index, (basis, base, _, _) in running.items():
                self._note_left(index, basis, base)

    def save(self) -> dict[str, Any]:
        """What `load` needs; where packed rings stand now is in the shared records."""
        return {
            "ran": sorted(self.ran),
            "left": [[n, *x] for n, x in self.left.items()],
        }

    def load(self, words: dict[str, Any]) -> None:
        """Remember what a manager knew that was killed."""
        self.ran = set(words["ran"])
        for index, places, num, base in words["left"]:
            self.left[index] = Left(_tuples(places), num, base)

    def note_running(self, session: Session) -> None:
        """Remember the packed rings that it had running, before anybody stops them."""
        for ring in session.rings if session.packed else ():
            if ring.runnable and int(self._ring(ring.index)["state"]) in _TAKEN_UP:
                base = virtio.PACKED_BASE if ring.base is None else ring.base
                self._note_left(ring.index, _basis(session, ring), base)

    async def stop_all(self) -> None:
        """Stop whatever runs, by the records."""
        self._host.ports[self._slot]["up"] = 0
        for index in range(RINGS_PER_PORT):
            self._ring(index)["state"] = RING_STOPPED
        await self._host.sync()

    def _note_left(self, index: int, basis: _Basis, base: int) -> None:
        self.left[index] = Left(basis.places, basis.num, base)

    def _position(self, index: int) -> int:
        """Where to take up a packed ring: its base, unless we know better.

        A front-end that lost us does not know how far we came, and says again what it
        said at the ring's start.
        """
        basis, base, _, _ = self._running[index]
        left = self.left.pop(index, None)
        if left == Left(basis.places, basis.num, base):
            return int(self._ring(index)["next_used"])
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

    def next_index(self, stopped: BaseReply) -> int:
        """Next available index of a ring that was stopped: what it has consumed."""
        if stopped.index not in self.ran:
            return stopped.fallback
        return int(self._ring(stopped.index)["next_used"])

    def _number(self, index: int) -> int:
        return self._slot * RINGS_PER_PORT + index

    def _ring(self, index: int) -> np.void:
        return cast("np.void", self._host.rings[self._number(index)])


def _basis(session: Session, ring: WantedRing) -> _Basis:
    assert ring.areas is not None  # noqa: S101 (runnable rings have areas)
    places = tuple(
        (_file_part(session.memory[place.region]), place.offset) for place in ring.areas
    )
    features = (session.features or 0) & ~virtio.F_LOG_ALL
    return _Basis(places, ring.num, features, ring.kick_fd, ring.err_fd)


def _tuples(thing: Any) -> Any:  # noqa: ANN401
    """Lists as the tuples that they were."""
    return tuple(map(_tuples, thing)) if isinstance(thing, list) else thing


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
