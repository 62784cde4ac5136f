"""The worker processes, seen from the manager: start, tell, watch, replace.

Everything that workers hold (mappings, descriptors) is kept in two tables here, so a
worker that starts later is brought to the same state before it hears of changes.
`broadcast` returns when every live worker has acknowledged: that is the grace period
after which nobody uses what was there before.

A worker's death is heard of through its lifeline, or its pidfd. Its rings change owner
in the shared records, the heir repairs and polls them, and a replacement starts as the
new spare. A death while answers are due counts as an answer: the dead use nothing; what
one worker alone was to do, another does. What a worker left behind stays on a list until
somebody has repaired it and lived to say so; the heir may die too. A worker that hangs is
killed, and then is a dead one.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ports import cache
from ports.aio import readable as _readable
from ports.base import RING_STOPPED, RINGS_PER_PORT, RX
from ports.host import Answer, Mapping, nothing
from vswitch import lifeline, rarp, watch
from vswitch.control import protocol
from vswitch.errors import VswitchError
from vswitch.kept import Item, Kept, is_readable
from vswitch.plan import END_ADDR, MOST_FILES, AddressPlan, NumberPlan
from vswitch.records import (
    FDB_BUCKETS,
    MAX_WORKERS,
    ROLE_ACTIVE,
    ROLE_SPARE,
    WORKER_NONE,
    WORKER_POLLING,
    WORKER_SLEEPING,
    WORKER_STARTING,
    Shared,
)

_STOP_S: Final = 2.0
# Signals by which a worker ends through what it does itself.
_OWN_FAULTS: Final = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}
    | {signal.SIGSYS}  # by a call that no worker makes
)
_FIRST_BACKOFF_S: Final = 0.05
_LAST_BACKOFF_S: Final = 5.0
_HEALTHY_S: Final = 10.0
NOBODY: Final = -1
_AT_WORK: Final = frozenset({WORKER_POLLING, WORKER_SLEEPING})
_COMPILER: Final = MAX_WORKERS - 1  # the number of the worker that only compiles

_log = logging.getLogger(__name__)


class Options(NamedTuple):
    """How workers run."""

    active: int
    spares: int
    cpus: tuple[int, ...]
    poll: str  # busy or adaptive
    idle_us: int


class _Mapped(NamedTuple):
    """A part of a file that every worker has mapped."""

    mapping: Mapping
    fd: int  # our own
    lost: Callable[[], None]  # what to do when the file has become too short


@dataclass
class _Process:
    """One worker process."""

    number: int
    pid: int
    pidfd: int
    sock: socket.socket
    started: float
    ready: bool = False
    code: str = ""  # which sources it is of
    account: watch.Account = field(default_factory=watch.Account)
    hangs: bool = False  # found so, and killed
    leaving: bool = False  # because we asked; its rings go to an heir all the same
    ending: bool = False  # because we asked
    outbox: deque[tuple[list[Any], tuple[int, ...]]] = field(default_factory=deque)
    due: dict[int, asyncio.Future[Any]] = field(default_factory=dict)

    def is_to_blame(self, code: int | None) -> bool:
        """Whether it ended by what it was at, and not by what somebody did to it."""
        if self.hangs:
            return not self.account.is_stopped
        return code is not None and -code in _OWN_FAULTS


class Workers:
    """All worker processes of a switch."""

    def __init__(
        self,
        shared: Shared,
        run_dir: Path,
        options: Options,
        numbers: NumberPlan,
        kept: Kept,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._shared = shared
        self._run_dir = run_dir
        self._options = options
        self._on_progress = on_progress
        self._on_fault: Callable[[int, int, str], None] | None = None
        self._processes: dict[int, _Process] = {}
        self._addresses = AddressPlan()
        self._numbers = numbers
        self._kept = kept
        self._span: list[int] | None = None  # what workers have of a manager before us
        self._mappings: dict[int, _Mapped] = {}  # by address
        self._fds: dict[int, int] = {}  # number in workers -> our own fd
        self._unrepaired: set[int] = set()  # numbers of the dead
        self._inherited: dict[int, asyncio.Future[None]] = {}  # by those numbers
        self._arrived = asyncio.Event()  # another worker is ready
        self._seq = 0
        self._backoff = _FIRST_BACKOFF_S
        self._stopping = False
        self._all_ready: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._reaping: set[asyncio.Task[None]] = set()

    # --- life ---

    async def start(self) -> None:
        """Start everybody; return when the active workers are ready.

        With a cold cache a worker compiles and ends, as a compiler's memory is never
        given back; the others load what it made.

        Raises:
            VswitchError: A worker died before it was ready.
        """
        total = self._options.active + self._options.spares
        if not cache.is_warm():
            await self._start_until_ready([_COMPILER])
            cache.mark_warm()
            await self._end([self._processes[_COMPILER]])
        self._spawn_missing(range(self._options.active, total))
        await self._start_until_ready(range(self._options.active))
        self._later(self._watch_forever())

    async def adopt(self) -> None:
        """Go on with the workers of a manager that was killed, and add what is missing.

        What it gave them stays in use until `shed`; nothing that they get from now on is
        at the same place.

        Raises:
            VswitchError: None was left, and another did not start.
        """
        self._seq = time.monotonic_ns()  # above that of any answer that is on the way
        for name, item in self._kept.items("worker").items():
            self._track_again(int(name), item)
        for number in range(MAX_WORKERS):
            if number not in self._processes and self._was_used(number):
                self._bury(number)
        await self._learn_spans()
        for number in self._free_numbers()[: self._lacking]:
            self._spawn(number)
        if not self._ready():
            await self._start_until_ready(sorted(self._processes)[:1])
        self._later(self._watch_forever())

    def _track_again(self, number: int, item: Item) -> None:
        """A worker that is there still; not one that has hung up."""
        sock = socket.socket(fileno=os.dup(item.fds[0]))
        sock.setblocking(False)
        if is_readable(sock.fileno(), 0) and not _peek(sock):
            sock.close()
            self._kept.drop("worker", number)
            return
        process = self._track(number, int(item.words["pid"]), sock)
        process.code = str(item.words.get("code", ""))
        if int(self._shared.workers[number]["state"]) in _AT_WORK:
            self._count_in(process)

    def _was_used(self, number: int) -> bool:
        return int(self._shared.workers[number]["state"]) != WORKER_NONE

    def _bury(self, number: int) -> None:
        """See to what a worker has left that died while there was no manager."""
        was_active = self._role(number) == ROLE_ACTIVE
        record = self._shared.workers[number]
        record["state"], record["role"] = WORKER_NONE, 0
        self._unrepaired.add(number)
        if was_active:
            self._hand_over(number)
        elif ready := self._ready():
            self._repair(ready[0])

    async def _learn_spans(self) -> None:
        """Keep clear of what the workers have."""
        told = await asyncio.gather(*(self._tell(p, "span") for p in self._ready()))
        spans = [span for span in told if _is_span(span)]  # the dead answer nothing
        low, high = _around([span[:2] for span in spans])
        first, end = _around([span[2:] for span in spans])
        if low < high:
            self._addresses.occupy(low, high)
        if first < end:
            self._numbers.occupy(first, end)
        self._span = [low, high, first, end]

    async def shed(self) -> None:
        """Have workers give up what they had before `adopt`; no record names it now."""
        if self._span is None:
            return
        await self.broadcast("shed", self._span)
        low, high, first, end = self._span
        if low < high:
            self._addresses.give_back(low)
        for number in range(first, end):
            self._numbers.give_back(number)
        self._span = None

    async def stop(self) -> None:
        """End every worker and give back what was kept for them."""
        self._stopping = True
        await self._end(list(self._processes.values()))
        await asyncio.gather(*self._reaping)
        for task in self._tasks:
            task.cancel()
        for mapped in self._mappings.values():
            os.close(mapped.fd)
        for fd in self._fds.values():
            os.close(fd)

    async def _end(self, processes: list[_Process]) -> None:
        """End processes: ask, insist after two seconds, and wait."""
        gone = [asyncio.create_task(_readable(p.pidfd)) for p in processes]
        for process in processes:
            process.ending = True
            os.kill(process.pid, signal.SIGTERM)
        if gone:
            await asyncio.wait(gone, timeout=_STOP_S)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            self._forget(process)
            await _reap(process)

    async def _start_until_ready(self, numbers: Iterable[int]) -> None:
        self._all_ready = asyncio.get_running_loop().create_future()
        self._waited_for = set(numbers)
        self._spawn_missing(sorted(self._waited_for))
        self._check_all_ready()
        await self._all_ready

    def _check_all_ready(self) -> None:
        waiting = self._all_ready
        if waiting is None or waiting.done():
            return
        processes = [self._processes.get(number) for number in self._waited_for]
        if all(process is not None and process.ready for process in processes):
            waiting.set_result(None)

    def _spawn_missing(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number not in self._processes:
                self._spawn(number)

    def _spawn(self, number: int) -> None:
        ours, theirs = protocol.pair()
        cpu = self._options.cpus[
            number % self._options.active % len(self._options.cpus)
        ]
        arguments = [
            *(sys.executable, "-m", "vswitch.worker", str(theirs.fileno())),
            *(str(number), str(self._run_dir), str(cpu)),
            *(self._options.poll, str(self._options.idle_us)),
        ]
        theirs.set_inheritable(True)
        null = os.open(os.devnull, os.O_RDONLY)
        pid = os.posix_spawn(
            sys.executable,
            arguments,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, null, 0)],
        )
        os.close(null)
        theirs.close()
        ours.setblocking(False)
        record = self._shared.workers[number]
        record["pid"], record["cpu"] = pid, cpu
        record["state"], record["role"] = WORKER_STARTING, ROLE_SPARE
        record["serving"] = 0
        lifeline.prepare(self._shared.workers, number)
        self._kept.keep("worker", number, {"pid": pid}, [ours.fileno()])
        self._track(number, pid, ours)

    def _track(self, number: int, pid: int, sock: socket.socket) -> _Process:
        loop = asyncio.get_running_loop()
        process = _Process(number, pid, os.pidfd_open(pid), sock, loop.time())
        self._processes[number] = process
        loop.add_reader(sock.fileno(), self._on_message, process)
        loop.add_reader(process.pidfd, self._on_death, process)
        return process

    def report_faults(self, to: Callable[[int, int, str], None]) -> None:
        """Have `to` called when a worker ends by what it did in the middle of a ring.

        It is called before anybody inherits that ring, with the slot of the ring's port,
        the ring's number among the port's, and what became of the worker.
        """
        self._on_fault = to

    # --- what ports ask for: `ports.host.Host` ---

    @property
    def ports(self) -> NDArray[np.void]:
        """PORT records, by slot."""
        return self._shared.ports

    @property
    def rings(self) -> NDArray[np.void]:
        """RING records, RINGS_PER_PORT for each slot."""
        return self._shared.rings

    @property
    def regions(self) -> NDArray[np.void]:
        """REGION records, two tables of TABLE_ROWS for each slot."""
        return self._shared.regions

    async def map(
        self,
        fd: int,
        length: int,
        offset: int,
        alignment: int,
        lost: Callable[[], None] = nothing,
    ) -> Mapping:
        """Map a part of a file at one address in every worker. `fd` stays the caller's.

        Raises:
            OSError: A worker could not map it.
        """
        addr = self._addresses.take(length, alignment)
        mapping = Mapping(addr, length, offset, self._numbers.take())
        kept = self._mappings[addr] = _Mapped(mapping, os.dup(fd), lost)
        result = await self.broadcast("map", [tuple(mapping)], [kept.fd])
        if result < 0:
            await self.unmap([mapping])
            raise OSError(-result, os.strerror(-result))
        return mapping

    async def unmap(self, mappings: Sequence[Mapping]) -> None:
        """Take mappings away from every worker; nothing may refer to them any more."""
        rows = [(m.addr, m.length, m.number) for m in mappings]
        ours = [self._mappings.pop(m.addr).fd for m in mappings]
        await self.broadcast("unmap", rows)
        for mapping, fd in zip(mappings, ours, strict=True):
            os.close(fd)
            self._addresses.give_back(mapping.addr)
            self._numbers.give_back(mapping.number)

    async def install(self, fds: Sequence[int]) -> list[int]:
        """Give every worker descriptors; their numbers. `fds` stay the caller's."""
        numbers = [self._numbers.take() for _ in fds]
        ours = [os.dup(fd) for fd in fds]
        self._fds.update(zip(numbers, ours, strict=True))
        await self.broadcast("fds", numbers, ours)
        return numbers

    async def uninstall(self, numbers: Sequence[int]) -> None:
        """Let every worker close descriptors that no record names any more."""
        if not numbers:
            return
        ours = [self._fds.pop(number) for number in numbers]
        await self.broadcast("close", list(numbers))
        for number, fd in zip(numbers, ours, strict=True):
            os.close(fd)
            self._numbers.give_back(number)

    async def sync(self) -> None:
        """Return when every worker has looked at the records again."""
        await self.broadcast("sync", NOBODY)

    async def change_fdb(self, verb: str, *arguments: int) -> int:
        """Let one worker change the forwarding database; what the change returned."""
        return await self._have_done("fdb", verb, list(arguments))

    async def flush(self, slot: int, *, also_static: bool) -> int:
        """Forget what lives behind a port (all ports: -1); how many addresses."""
        return await self.change_fdb("flush", slot, int(also_static), 0, FDB_BUCKETS)

    async def forget(self, slot: int) -> None:
        """Forget what was learned behind a port; with no worker to do it, that ages."""
        with contextlib.suppress(VswitchError):
            await self.flush(slot, also_static=False)

    async def announce(self, slot: int, address: bytes) -> None:
        """Let one worker, if there is one, tell every port where `address` lives now."""
        with contextlib.suppress(VswitchError):
            await self._have_done("inject", slot, rarp.frame(address))

    def owner_for(self, slot: int, pair: int) -> int:
        """The worker that is to serve a queue pair: the one that polls the fewest.

        Pairs of one port go to different workers where there are several.
        """
        active = self._active()
        if not active:
            return 0
        polled = self._shared.rings[RX::2]
        busy = polled["state"] != RING_STOPPED
        load = {n: int(np.count_nonzero(busy & (polled["owner"] == n))) for n in active}
        turn = (slot + pair) % len(active)
        order = active[turn:] + active[:turn]
        return min(order, key=lambda number: load[number])

    @property
    def active(self) -> list[int]:
        """The workers that forward, as many as there are to be."""
        active = self._active() or [0]
        return [active[n % len(active)] for n in range(self._options.active)]

    @property
    def several(self) -> bool:
        """Whether more than one worker forwards."""
        return self._options.active > 1

    # --- messages ---

    async def broadcast(
        self, word: str, argument: object, fds: Sequence[int] = ()
    ) -> int:
        """Tell every ready worker and wait for all; the smallest result."""
        told = [self._tell(p, word, argument, fds=fds) for p in self._ready()]
        answers = await asyncio.gather(*told)
        return min((answer or 0 for answer in answers), default=0)

    async def _have_done(self, word: str, *arguments: object) -> int:
        """Let one worker do something, and another if it dies meanwhile; the result."""
        while (done := await self._tell(self._anybody(), word, *arguments)) is None:
            pass
        return int(done)

    def _tell(
        self, process: _Process, word: str, *arguments: object, fds: Sequence[int] = ()
    ) -> asyncio.Future[Any]:
        self._seq += 1
        answer = asyncio.get_running_loop().create_future()
        process.due[self._seq] = answer
        process.outbox.append(([word, self._seq, *arguments], tuple(fds)))
        self._flush(process)
        return answer

    def keep(
        self,
        slot: int,
        state: dict[str, Any],
        fds: Sequence[int],
        answer: Answer | None = None,
    ) -> bool:
        """Have what a port is outlive the manager, and an answer sent with it."""
        return self._kept.keep("port", slot, state, fds, answer)

    def settle(self) -> None:
        """Return when all answers have been sent."""
        self._kept.settle()

    def keep_message(
        self, slot: int, words: dict[str, Any] | None, fds: Sequence[int] = ()
    ) -> None:
        """Have a message outlive the manager."""
        if words is None:
            self._kept.drop("message", slot)
        else:
            self._kept.keep("message", slot, words, fds)

    def _flush(self, process: _Process) -> None:
        loop = asyncio.get_running_loop()
        while process.outbox:
            message, fds = process.outbox[0]
            try:
                protocol.send(process.sock, message, fds)
            except BlockingIOError:
                loop.add_writer(process.sock.fileno(), self._flush, process)
                return
            except OSError:
                break  # its death is on the way
            process.outbox.popleft()
            self._shared.workers[process.number]["bell"] += 1
        loop.remove_writer(process.sock.fileno())

    def _on_message(self, process: _Process) -> None:
        try:
            message, _ = protocol.receive(process.sock)
        except BlockingIOError:
            return
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(process.sock.fileno())
            return
        if message[0] == "ack":
            answer = process.due.pop(message[1], None)
            if answer and not answer.done():
                answer.set_result(message[2])
        elif message[0] == "progress" and process.number == _COMPILER:
            self._on_progress(int(message[1]), int(message[2]))
        elif message[0] == "lost":
            mapped = self._mappings.get(int(message[1]))
            if mapped:
                mapped.lost()
        elif message[0] == "ready" and not process.ready:
            process.code = str(message[1])
            words = {"pid": process.pid, "code": process.code}
            self._kept.keep("worker", process.number, words, [process.sock.fileno()])
            self._welcome(process)

    def _welcome(self, process: _Process) -> None:
        """Bring a new worker to the state of the others, then count it among them."""
        for mapped in self._mappings.values():
            answer = self._tell(
                process, "map", [tuple(mapped.mapping)], fds=[mapped.fd]
            )
            answer.add_done_callback(partial(self._check_mapped, mapped))
        numbers = list(self._fds)
        for at in range(0, len(numbers), protocol.MAX_FDS):
            some = numbers[at : at + protocol.MAX_FDS]
            self._tell(process, "fds", some, fds=[self._fds[n] for n in some])
        process.ready = True
        if self._is_needed(process.number):
            self._shared.workers[process.number]["role"] = ROLE_ACTIVE
            self._adopt_orphans(process)
        self._tell(process, "sync", NOBODY)
        self._count_in(process)
        self._check_all_ready()
        self._arrived.set()

    def _count_in(self, process: _Process) -> None:
        process.ready = True
        hear = partial(_call_soon, asyncio.get_running_loop(), self._on_death, process)
        lifeline.watch(self._shared.workers, process.number, hear)

    def _check_mapped(self, mapped: _Mapped, answer: "asyncio.Future[Any]") -> None:
        """A worker that cannot map what the others have sees zeroes there."""
        if (answer.result() or 0) < 0 and mapped.mapping.addr in self._mappings:
            mapped.lost()

    # --- renewal: what `renewal.py` is made of ---

    def numbers(self, role: int, *, old: bool) -> list[int]:
        """Workers at work that have a role, of other sources than ours or of ours."""
        return [
            number
            for number in self._ready_numbers()
            if self._role(number) == role
            and (self._processes[number].code != cache.digest()) == old
        ]

    async def wait_for_spare(self) -> int:
        """The number of a spare of our sources, once there is one; started if need be."""
        if not self._options.spares and len(self._processes) == self._options.active:
            if not (free := self._free_numbers()):
                message = (
                    f"cannot replace workers: {MAX_WORKERS} is the most, and without a "
                    "spare there is no room for a new one (vswitch down --keep, then up)"
                )
                raise VswitchError(message)
            self._spawn(free[0])
        while not (spares := self.numbers(ROLE_SPARE, old=False)):
            self._arrived.clear()
            await self._arrived.wait()
        return spares[0]

    async def dismiss(self, number: int) -> float | None:
        """Have a worker leave between two turns.

        Returns:
            Seconds from its last turn until its heir had taken up its rings, if it said
            when that was.
        """
        process = self._processes[number]
        process.leaving = True
        inherited = asyncio.get_running_loop().create_future()
        self._inherited[number] = inherited
        left = await self._tell(process, "leave")
        await inherited
        return (time.monotonic_ns() - int(left)) / 1e9 if left else None

    # --- death ---

    async def _watch_forever(self) -> None:
        """Kill workers that hang. One that is not ready yet compiles, or loads."""
        while True:
            await asyncio.sleep(watch.PERIOD_S)
            for process in self._ready():
                record = self._shared.workers[process.number]
                account = process.account
                if process.hangs or account.turned(int(record["turns"])):
                    continue
                if account.rests(asleep=watch.is_asleep(record)):
                    continue
                seen = watch.look_at(process.pid, record)
                if seen and account.note(seen):
                    self._end_hang(process)

    def _end_hang(self, process: _Process) -> None:
        text = "worker %d hangs: %s (killing it) pid=%d"
        _log.warning(text, process.number, process.account, process.pid)
        process.hangs = True
        signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)

    def _on_death(self, process: _Process) -> None:
        """A worker does nothing any more, even if the kernel is not done with it."""
        if process.ending:
            return
        process.ending = True
        if process.leaving:
            self._on_message(process)  # when it left, as its last word
        code = _exit_code(process.pid)
        _step_aside(process.pid)
        cause = _name_of(code)
        serving = int(self._shared.workers[process.number]["serving"])
        what = "left" if process.leaving else "died"
        _log.warning(
            "worker %d %s: %s pid=%d", process.number, what, cause, process.pid
        )
        was_active = self._role(process.number) == ROLE_ACTIVE
        self._forget(process)
        self._later(_reap(process), self._reaping)
        if process.ready:
            self._unrepaired.add(process.number)
        if self._all_ready and not self._all_ready.done():
            message = f"worker {process.number} did not start: {cause} (see the log)"
            self._all_ready.set_exception(VswitchError(message))
            return
        if self._on_fault and serving and process.is_to_blame(code):
            # Before anybody inherits the ring.
            what = "hung" if process.hangs else f"died ({cause})"
            self._on_fault(*divmod(serving - 1, RINGS_PER_PORT), what)
        if was_active:
            self._hand_over(process.number)
        elif ready := self._ready():
            self._repair(ready[0])
        self._later(self._restart(process))

    def _hand_over(self, dead: int) -> None:
        """Give a dead worker's rings to the spare, or to whoever is left."""
        ready = self._ready_numbers()
        heirs = [n for n in ready if self._role(n) == ROLE_SPARE] or ready
        if not heirs:
            return  # the next worker to start adopts them
        heir = heirs[0]
        if self._role(heir) == ROLE_SPARE:
            record = self._shared.workers[heir]
            record["role"], record["cpu"] = (
                ROLE_ACTIVE,
                self._shared.workers[dead]["cpu"],
            )
            with contextlib.suppress(ProcessLookupError):  # dead as well
                os.sched_setaffinity(self._processes[heir].pid, {int(record["cpu"])})
        rings = self._shared.rings
        rings["owner"][rings["owner"] == dead] = heir
        self._repair(self._processes[heir])
        _log.info("worker %d took over from worker %d", heir, dead)

    def _adopt_orphans(self, process: _Process) -> None:
        """Take the rings whose owners are all gone."""
        rings = self._shared.rings
        alive = self._ready_numbers()
        for owner in {int(n) for n in np.unique(rings["owner"][rings["state"] != 0])}:
            if owner not in alive or owner == process.number:
                rings["owner"][rings["owner"] == owner] = process.number
        self._repair(process)

    def _repair(self, heir: _Process) -> None:
        """Let a worker make usable what the dead left behind."""

        def done(dead: int, _: "asyncio.Future[Any]") -> None:
            if self._processes.get(heir.number) is heir:
                self._unrepaired.discard(dead)
                if inherited := self._inherited.pop(dead, None):
                    inherited.set_result(None)

        for dead in sorted(self._unrepaired):
            answer = self._tell(heir, "sync", dead)
            answer.add_done_callback(partial(done, dead))

    async def _restart(self, process: _Process) -> None:
        """Start a replacement; wait longer each time one dies young."""
        loop = asyncio.get_running_loop()
        if loop.time() - process.started > _HEALTHY_S:
            self._backoff = _FIRST_BACKOFF_S
        if not process.leaving:
            await asyncio.sleep(self._backoff)
            self._backoff = min(2 * self._backoff, _LAST_BACKOFF_S)
        if self._lacking and not self._stopping:
            self._spawn(self._free_numbers()[0])

    @property
    def _lacking(self) -> int:
        """How many processes there are too few."""
        total = self._options.active + self._options.spares
        return max(0, total - len(self._processes))

    def _free_numbers(self) -> list[int]:
        """Not one that somebody is about to repair, if it can be helped."""
        free = [n for n in range(MAX_WORKERS) if n not in self._processes]
        return sorted(free, key=lambda number: number in self._unrepaired)

    def _forget(self, process: _Process) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(process.pidfd)
        loop.remove_reader(process.sock.fileno())
        loop.remove_writer(process.sock.fileno())
        process.sock.close()
        self._kept.drop("worker", process.number)
        self._processes.pop(process.number, None)
        record = self._shared.workers[process.number]
        record["state"], record["role"] = WORKER_NONE, 0
        for answer in process.due.values():
            if not answer.done():
                answer.set_result(None)

    def _later(
        self,
        work: Coroutine[Any, Any, None],
        tasks: "set[asyncio.Task[None]] | None" = None,
    ) -> None:
        tasks = self._tasks if tasks is None else tasks
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    # --- small questions ---

    def _anybody(self) -> _Process:
        """A worker that forwards: a ring that is not shared has one writer, no spare."""
        numbers = self._active() or self._ready_numbers()
        if not numbers:
            message = "no worker is running (see the log)"
            raise VswitchError(message)
        return self._processes[numbers[0]]

    def _ready(self) -> list[_Process]:
        return [self._processes[number] for number in self._ready_numbers()]

    def _ready_numbers(self) -> list[int]:
        return sorted(n for n, process in self._processes.items() if process.ready)

    def _active(self) -> list[int]:
        return [n for n in self._ready_numbers() if self._role(n) == ROLE_ACTIVE]

    def _role(self, number: int) -> int:
        return int(self._shared.workers[number]["role"])

    def _is_needed(self, number: int) -> bool:
        """Whether a worker that is ready now is to forward, not to be a spare.

        At the start those with the first numbers are; later whoever fills a gap.
        """
        if self._all_ready and not self._all_ready.done():
            return number < self._options.active
        active = [n for n in self._ready_numbers() if self._role(n) == ROLE_ACTIVE]
        return len(active) < self._options.active


async def _reap(process: _Process) -> None:
    """Wait until the kernel is done with a process that has ended."""
    await _readable(process.pidfd)
    with contextlib.suppress(ChildProcessError):  # a manager before us started it
        os.waitpid(process.pid, 0)
    os.close(process.pidfd)


def _step_aside(pid: int) -> None:
    """Let the kernel take a process apart where and when its heir needs no CPU."""
    with contextlib.suppress(OSError):  # that is done
        os.kill(pid, signal.SIGKILL)  # in case it only said so
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        os.sched_setaffinity(pid, os.sched_getaffinity(0))


def _exit_code(pid: int) -> int | None:
    """How a process that is not waited for yet has ended, as waitpid will say it.

    None: somebody else has waited for it, as we did not start it.
    """
    try:
        # proc_pid_stat(5): the last field.
        status = Path(f"/proc/{pid}/stat").read_text().split()[-1]
    except OSError:
        return None
    return os.waitstatus_to_exitcode(int(status))


def _name_of(code: int | None) -> str:
    if code is None:
        return "nobody knows how"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _around(spans: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The smallest span that has all of `spans` in it, those that are empty aside."""
    full = [(begin, end) for begin, end in spans if begin < end]
    return (
        min((begin for begin, _ in full), default=0),
        max((end for _, end in full), default=0),
    )


def _is_span(answer: object) -> bool:
    """Whether that can be true; a worker may be in a guest's hands."""
    return (
        isinstance(answer, list)
        and len(answer) == 4
        and all(isinstance(number, int) for number in answer)
        and 0 <= answer[0] <= answer[1] <= END_ADDR
        and 0 <= answer[2] <= answer[3] <= MOST_FILES
    )


def _peek(sock: socket.socket) -> bytes:
    """What waits in a socket, of which at least the end of it has come."""
    try:
        return sock.recv(1, socket.MSG_PEEK)
    except OSError:
        return b""


def _call_soon(
    loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object
) -> None:
    """Call from another thread; nothing where the loop is closed by now."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(partial(function, *arguments))
