"""The manager: owns everything that lives long, touches no frame, maps no guest memory.

    python -m vswitch.manager --run-dir DIR ... [--status-fd FD]

It makes the segment, starts the workers, brings back what was set when a run before it was
killed, serves commands on the control socket and holds the ports. Where the workers of that
run are still at work, it goes on with them. Whoever started it reads
progress and the outcome of the start from the status descriptor; without one they go to
the log. SIGTERM, SIGINT and the command `down` end everything and leave nothing behind but
the log, and what is set if `down` says so.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import msgpack

from ports import cache
from vswitch import __version__, orphans, privileges, renewal, snapshot
from vswitch import shared as segment
from vswitch.control import rundir, state
from vswitch.control.config import NOTHING
from vswitch.errors import VswitchError
from vswitch.kept import Kept
from vswitch.options import check_options, parse_options, under
from vswitch.plan import MOST_FILES, NumberPlan
from vswitch.portbook import PortBook
from vswitch.server import Arguments, Commands, ControlServer
from vswitch.settings import Restored, Settings
from vswitch.workers import Options, Workers

_SAMPLE_S: Final = 1.0
_LONGEST_LOG: Final = 8 << 20
_AGAIN: Final = 75  # EX_TEMPFAIL: a service that restarts what failed starts us again

_log = logging.getLogger(__name__)


class Manager:
    """One switch."""

    def __init__(
        self, options: argparse.Namespace, report: Callable[[Any], None]
    ) -> None:
        self._options = options
        self._report = report
        self._run_dir = Path(options.run_dir)
        self._code = cache.digest()  # now: the files may be others soon
        self._done = asyncio.Event()
        self._keeps = False  # beyond its end, what is set
        self._leaves_with = 0  # an exit code
        self._renewing = asyncio.Lock()
        self._commands: Commands = {
            "status": self._status,
            "add_port": self._add_port,
            "del_port": self._del_port,
            "show": self._show,
            "stats": self._stats,
            "fdb_show": self._fdb_show,
            "fdb_add": self._fdb_add,
            "fdb_del": self._fdb_del,
            "fdb_flush": self._fdb_flush,
            "hand_over": self._hand_over,
            "renew": self._renew,
            "down": self._down,
        }

    # --- life ---

    async def run(self) -> None:
        """Start, serve until somebody says down, and clean up.

        Raises:
            VswitchError: The switch cannot start.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._done.set)
        self._most_files = _raise_file_limit()  # the keeper's, too
        with rundir.hold(self._run_dir):
            _trim_log(self._run_dir)
            self._before = state.read(self._run_dir) or NOTHING
            self._options = under(self._options, self._before.switch)
            check_options(self._options)
            self._find_or_make()
            try:
                await self._start_and_serve()
            finally:
                segment.remove(self._run_dir)
                for leaf in (rundir.CONTROL, rundir.MADE):
                    (self._run_dir / leaf).unlink(missing_ok=True)

    def _find_or_make(self) -> None:
        """Go on with the segment and the keeper of a killed manager, or have our own."""
        options = self._options
        kept, shared, self._why_anew = orphans.adopt(self._run_dir, options)
        self._adopted = kept is not None
        self._leaves = self._adopted  # a start that fails changes nothing
        if kept and shared:
            self._kept, self._shared = kept, shared
        else:
            if self._why_anew:
                _log.warning("starting anew: %s", self._why_anew)
            orphans.remove_leftovers(self._run_dir)
            self._kept = Kept(self._run_dir)
            self._kept.start()
            self._shared = segment.create(self._run_dir, options.workers)
            words = orphans.describe(options)
            self._kept.keep("switch", "options", words, [])
        header = self._shared.header[0]
        header["ageing_s"] = options.ageing
        header["forward_reserved"] = int(options.forward_reserved)

    async def _start_and_serve(self) -> None:
        options = self._options
        self._workers = Workers(
            self._shared,
            self._run_dir,
            Options(
                options.workers,
                options.spares,
                tuple(options.cpus),
                options.poll,
                options.idle_us,
            ),
            NumberPlan(self._most_files),
            self._kept,
            lambda done, total: self._report({"progress": [done, total]}),
        )
        self._ports = PortBook(
            self._shared,
            self._workers,
            self._kept,
            options.socket_group,
            options.socket_mode,
        )
        self._settings = Settings(
            self._run_dir, self._ports, self._workers, options.said
        )
        self._usage = snapshot.Usage(self._shared)
        try:
            begin = self._workers.adopt if self._adopted else self._workers.start
            starting = asyncio.create_task(begin())
            await _first_of(starting, self._done.wait())
            if self._done.is_set():
                starting.cancel()
            else:
                await starting
                restored = await self._settings.restore(options.file, self._before)
                await self._serve(restored)
        except VswitchError as error:
            if not self._leaves:
                raise
            self._report({"error": {"code": error.code, "message": str(error)}})
            _leave(error.code)
        finally:
            if self._leaves:
                _leave(self._leaves_with)
            await self._ports.close()
            await self._workers.stop()
            self._kept.end()
            _log.info("down")

    async def _serve(self, restored: Restored) -> None:
        self._keeps = self._done.is_set()  # a start that was broken off changes nothing
        self._leaves = self._keeps and self._adopted
        _make_way(self._options)
        self._kept.watch()
        self._began = {
            "restored": restored._asdict(),
            "adopted": self._adopted,
            "why_anew": self._why_anew,
        }
        server = ControlServer(self._run_dir / rundir.CONTROL, self._commands)
        await server.start()
        chores = [
            asyncio.create_task(self._sample_forever()),
            asyncio.create_task(self._settings.retry_forever()),
        ]
        self._report({"ready": await self._status({})})
        _log.info("up pid=%d workers=%d", os.getpid(), self._options.workers)
        try:
            await self._done.wait()
        finally:
            for chore in chores:
                chore.cancel()
            await asyncio.gather(*chores, return_exceptions=True)
            await server.stop()
        if not self._keeps:
            state.forget(self._run_dir)

    async def _sample_forever(self) -> None:
        """Note every second what `show` wants to know of the time before."""
        while True:
            await asyncio.sleep(_SAMPLE_S)
            self._usage.sample()
            for entry in (*self._ports, *self._ports.missing):
                entry.note_state()

    def _describe(self) -> Arguments:
        options = self._options
        return {
            "workers": options.workers,
            "spares": options.spares,
            "cpus": list(options.cpus),
            "poll": options.poll,
            "run_dir": str(self._run_dir),
        }

    # --- commands ---

    async def _status(self, _: Arguments) -> Arguments:
        words = {"pid": os.getpid(), "version": __version__, "code": self._code}
        words["foreground"] = self._options.foreground
        return words | self._began | self._describe()

    async def _hand_over(self, _: Arguments) -> Arguments:
        """End as if killed, for a successor that goes on with everything."""
        self._keeps = self._leaves = True
        self._leaves_with = _AGAIN if self._options.foreground else 0
        self._done.set()
        return {"pid": os.getpid()}

    async def _renew(self, _: Arguments) -> Arguments:
        async with self._renewing:
            return await renewal.renew_one(self._workers)

    async def _down(self, wanted: Arguments) -> Arguments:
        self._keeps = bool(wanted.get("keep"))
        self._done.set()
        return {"pid": os.getpid()}

    async def _add_port(self, wanted: Arguments) -> Arguments:
        entry, added = await self._settings.add_port(wanted)
        return {
            "name": entry.port.name,
            "kind": entry.port.kind,
            "endpoint": entry.endpoint.text,
            "mode": entry.port.mode,
            "changed": added,
            "warnings": list(entry.port.warnings),
        }

    async def _del_port(self, wanted: Arguments) -> Arguments:
        await self._settings.del_port(str(wanted["name"]))
        return {}

    async def _show(self, _: Arguments) -> Arguments:
        entries = (*self._ports, *self._ports.missing)
        ports = [entry.describe() for entry in entries]
        return {"workers": self._usage.workers(), "ports": ports}

    async def _stats(self, _: Arguments) -> Arguments:
        return snapshot.stats(self._shared, self._ports.slots)

    async def _fdb_show(self, _: Arguments) -> list[Arguments]:
        names = {slot: name for name, slot in self._ports.slots.items()}
        return snapshot.fdb_entries(self._shared, names)

    async def _fdb_add(self, wanted: Arguments) -> Arguments:
        vlan, name = int(wanted.get("vlan") or 0), str(wanted["ifname"])
        await self._settings.add_address(str(wanted["mac"]), vlan, name)
        return {}

    async def _fdb_del(self, wanted: Arguments) -> Arguments:
        vlan = int(wanted.get("vlan") or 0)
        await self._settings.del_address(str(wanted["mac"]), vlan)
        return {}

    async def _fdb_flush(self, wanted: Arguments) -> Arguments:
        name = wanted.get("ifname")
        slot = self._ports.named(str(name)).slot if name else -1
        return {"flushed": await self._workers.flush(slot, also_static=False)}


def _raise_file_limit() -> int:
    """Allow as many descriptors as we may have; workers inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = min(hard, MOST_FILES) if hard != resource.RLIM_INFINITY else MOST_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


async def _first_of(*work: Awaitable[Any]) -> None:
    """Wait for the first; the others that we wrapped are not waited for any more."""
    tasks = [asyncio.ensure_future(one) for one in work]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks[1:]:
        task.cancel()


def _leave(code: int) -> NoReturn:
    """End as a kill would end us: our successor finds everything at work."""
    logging.shutdown()
    os._exit(code)


def _trim_log(run_dir: Path) -> None:
    """Begin a log that has grown long anew; ours is open for appending."""
    with contextlib.suppress(FileNotFoundError):
        log = run_dir / rundir.LOG
        if log.stat().st_size > _LONGEST_LOG:
            os.truncate(log, 0)


def run(options: argparse.Namespace, report: Callable[[Arguments], None]) -> int:
    """Run a manager to its end; the exit code. `report` hears of the start.

    Errors of the start are reported, not raised.
    """
    try:
        privileges.keep_for_manager()
        asyncio.run(_run(options, report))
    except VswitchError as error:
        report({"error": {"code": error.code, "message": str(error)}})
        return error.code
    return 0


def _make_way(options: argparse.Namespace) -> None:
    """Be where no worker is, with whatever we start from now on, if there is such a CPU.

    What we do several times a second takes a third of a millisecond, and a ring may be
    full after some microseconds. Workers that were started before compiled everywhere.
    """
    theirs = options.cpus[: options.workers]
    if others := os.sched_getaffinity(0).difference(theirs):
        os.sched_setaffinity(0, others)


async def _run(
    options: argparse.Namespace, report: Callable[[Arguments], None]
) -> None:
    await Manager(options, report).run()


class _Status:
    """Tells whoever started us how the start goes, until it is over."""

    def __init__(self, fd: int) -> None:
        self._file = os.fdopen(fd, "wb", buffering=0) if fd >= 0 else None
        self._logged = 0

    def report(self, event: Arguments) -> None:
        """Pass an event on; without a reader its gist goes to the log."""
        if self._file is None:
            self._log(event)
            return
        with contextlib.suppress(BrokenPipeError):
            self._file.write(msgpack.packb(event))
        if "progress" not in event:
            self._file.close()
            self._file = None

    def _log(self, event: Arguments) -> None:
        if "error" in event:
            _log.error("%s", event["error"]["message"])
        elif "progress" in event:
            done, total = event["progress"]
            quarter = 4 * done // total if total else 0
            if quarter > self._logged:
                self._logged = quarter
                _log.info("compiling the data path: %d of %d", done, total)


def main() -> None:
    """Run a manager whose starter reads the status descriptor."""
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", level=logging.INFO)
    sys.exit(_start(sys.argv[1:]))


def _start(arguments: Sequence[str]) -> int:
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--status-fd", type=int, default=-1)
    status = _Status(finder.parse_known_args(arguments)[0].status_fd)
    try:
        options = parse_options(arguments)
    except VswitchError as error:
        status.report({"error": {"code": error.code, "message": str(error)}})
        return error.code
    return run(options, status.report)


if __name__ == "__main__":
    main()
