"""The manager: owns everything that lives long, touches no frame, maps no guest memory.

    python -m vswitch.manager --run-dir DIR ... [--status-fd FD]

It makes the segment, starts the workers, serves commands on the control socket and holds
the ports. Whoever started it reads progress and the outcome of the start from the status
descriptor; without one they go to the log. SIGTERM, SIGINT and the command `down` end
everything and leave nothing behind but the log.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

import msgpack

from ports.base import MAX_PAIRS, MAX_PORTS, RINGS_PER_PORT
from ports.errors import PortError
from ports.tap import TapPort, check_name
from ports.vhost_user import State, VhostUserPort, remove_stale
from vswitch import __version__, snapshot
from vswitch import shared as segment
from vswitch.control import config, endpoint, rundir
from vswitch.control.endpoint import Endpoint
from vswitch.errors import EXIT_FAILED, ConfigError, VswitchError
from vswitch.plan import NumberPlan
from vswitch.records import MAX_WORKERS
from vswitch.workers import Options, Workers

_MOST_FILES: Final = 65536
_MAX_MESSAGE: Final = 1 << 20
_GUEST_ADDRESSES: Final = 16384
_UPLINK_ADDRESSES: Final = 65536
_MADE: Final = "made"  # in the run directory: sockets made outside of it
_LONGEST_LOG: Final = 8 << 20

_log = logging.getLogger(__name__)

Arguments = dict[str, Any]


class Port(Protocol):
    """What the manager asks of a port of any kind."""

    name: str
    kind: str
    mode: str

    async def open(self) -> None:
        """Begin. Raises PortError."""

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

    def describe(self) -> Arguments:
        """What `show` prints of it."""
        state = self.port.state()
        if state.word != self._word:
            self._word, self._since = state.word, time.time()
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
        }


class Manager:
    """One switch."""

    def __init__(
        self, options: argparse.Namespace, report: Callable[[Any], None]
    ) -> None:
        self._options = options
        self._report = report
        self._run_dir = Path(options.run_dir)
        self._entries: dict[str, Entry] = {}
        self._changing = asyncio.Lock()  # one port is added or removed at a time
        self._done = asyncio.Event()
        self._clients: set[asyncio.Task[None]] = set()
        self._commands: dict[str, Callable[[Arguments], Awaitable[Any]]] = {
            "status": self._status,
            "add_port": self._add_port,
            "del_port": self._del_port,
            "show": self._show,
            "stats": self._stats,
            "fdb_show": self._fdb_show,
            "fdb_add": self._fdb_add,
            "fdb_del": self._fdb_del,
            "fdb_flush": self._fdb_flush,
            "down": self._down,
        }

    # --- life ---

    async def run(self) -> None:
        """Start, serve until somebody says down, and clean up.

        Raises:
            VswitchError: The switch cannot start.
        """
        with rundir.hold(self._run_dir):
            _trim_log(self._run_dir)
            _remove_leftovers(self._run_dir)
            self._make_segment()
            try:
                await self._start_and_serve()
            finally:
                segment.remove(self._run_dir)
                for leaf in (rundir.CONTROL, _MADE):
                    (self._run_dir / leaf).unlink(missing_ok=True)

    def _make_segment(self) -> None:
        options = self._options
        self._shared = segment.create(self._run_dir, options.workers)
        header = self._shared.header[0]
        header["ageing_s"] = options.ageing
        header["forward_reserved"] = int(options.forward_reserved)

    async def _start_and_serve(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._done.set)
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
            NumberPlan(_raise_file_limit()),
            lambda done, total: self._report({"progress": [done, total]}),
        )
        self._usage = snapshot.Usage(self._shared)
        try:
            starting = asyncio.create_task(self._workers.start())
            await _first_of(starting, self._done.wait())
            if self._done.is_set():
                starting.cancel()
            else:
                await starting
                for port in self._options.ports:
                    await self._add_port(port)
                await self._serve()
        finally:
            await self._close_ports()
            await self._workers.stop()
            for client in self._clients:
                client.cancel()
            _log.info("down")

    async def _serve(self) -> None:
        path = self._run_dir / rundir.CONTROL
        server = await asyncio.start_unix_server(self._talk, path, limit=_MAX_MESSAGE)
        path.chmod(0o660)
        async with server:
            self._report({"ready": {"pid": os.getpid(), **self._describe()}})
            _log.info("up pid=%d workers=%d", os.getpid(), self._options.workers)
            sampling = asyncio.create_task(self._usage.sample_forever())
            await self._done.wait()
            sampling.cancel()

    async def _close_ports(self) -> None:
        for entry in list(self._entries.values()):
            with contextlib.suppress(PortError, OSError, VswitchError):
                await entry.port.close()
        self._entries.clear()

    def _describe(self) -> Arguments:
        options = self._options
        return {
            "workers": options.workers,
            "spares": options.spares,
            "cpus": list(options.cpus),
            "poll": options.poll,
            "run_dir": str(self._run_dir),
        }

    # --- the control socket ---

    async def _talk(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        if task:
            self._clients.add(task)
            task.add_done_callback(self._clients.discard)
        unpacker = msgpack.Unpacker(max_buffer_size=_MAX_MESSAGE)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while data := await reader.read(65536):
                await self._answer_all(unpacker, data, writer)
        writer.close()

    async def _answer_all(
        self, unpacker: "msgpack.Unpacker", data: bytes, writer: asyncio.StreamWriter
    ) -> None:
        try:
            unpacker.feed(data)
            for request in unpacker:
                writer.write(msgpack.packb(await self._answer(request)))
                await writer.drain()
        except (ValueError, msgpack.UnpackException) as error:
            text = f"control socket: bytes that are no message: {error}"
            message = {"error": {"code": EXIT_FAILED, "message": text}}
            writer.write(msgpack.packb(message))
            raise ConnectionError(text) from error

    async def _answer(self, request: object) -> Arguments:
        name = request.get("command") if isinstance(request, dict) else None
        command = self._commands.get(str(name))
        if command is None or not isinstance(request, dict):
            text = f"control socket: unknown command {name!r} (is the CLI of another"
            return {"error": {"code": EXIT_FAILED, "message": f"{text} version?)"}}
        try:
            return {"ok": await command(request)}
        except VswitchError as error:
            return {"error": {"code": error.code, "message": str(error)}}
        except (PortError, OSError, MemoryError) as error:
            return {"error": {"code": EXIT_FAILED, "message": str(error)}}
        except (KeyError, TypeError, ValueError) as error:
            text = f"control socket: {name}: bad arguments: {error!r}"
            return {"error": {"code": EXIT_FAILED, "message": text}}

    # --- commands ---

    async def _status(self, _: Arguments) -> Arguments:
        return {"pid": os.getpid(), "version": __version__, **self._describe()}

    async def _down(self, _: Arguments) -> Arguments:
        self._done.set()
        return {"pid": os.getpid()}

    async def _add_port(self, wanted: Arguments) -> Arguments:
        async with self._changing:
            return await self._add_port_alone(wanted)

    async def _add_port_alone(self, wanted: Arguments) -> Arguments:
        leads_to = endpoint.parse(str(wanted["endpoint"]), Path("/"))
        name = endpoint.check_name(str(wanted["name"]))
        mode = str(wanted.get("mode") or "server")
        present = self._entries.get(name)
        if present:
            same = present.endpoint == leads_to and present.port.mode in ("", mode)
            if same:
                return self._describe_port(present, changed=False)
            taken = f"{present.endpoint.text} {present.port.mode}".strip()
            text = f"cannot add port {name}: the name is taken by {taken}"
            raise VswitchError(f"{text} (choose another with --name)")
        for entry in self._entries.values():
            if entry.endpoint == leads_to:
                text = f"cannot add port {name}: {leads_to.text} is {entry.port.name}"
                raise VswitchError(f"{text} (vswitch del-port {entry.port.name})")
        slot = self._free_slot()
        try:
            port = self._make_port(slot, name, leads_to, wanted | {"mode": mode})
            self._note_made(leads_to)
            await port.open()
        except PortError as error:
            self._clear_slot(slot)
            raise VswitchError(f"port {name}: {error}") from error
        entry = self._entries[name] = Entry(slot, leads_to, port)
        _log.info("port %s: added endpoint=%s", name, leads_to.text)
        return self._describe_port(entry, changed=True)

    def _make_port(
        self, slot: int, name: str, leads_to: Endpoint, wanted: Arguments
    ) -> Port:
        uplink = leads_to.kind == endpoint.TAP
        most = _number(wanted, "queues", MAX_PAIRS, MAX_PAIRS)
        limit = _UPLINK_ADDRESSES if uplink else _GUEST_ADDRESSES
        addresses = _number(wanted, "max_addresses", limit, _UPLINK_ADDRESSES)
        self._clear_slot(slot)
        self._shared.ports[slot]["max_addresses"] = addresses
        header = self._shared.header[0]
        header["port_slots"] = max(int(header["port_slots"]), slot + 1)
        if uplink:
            check_name(leads_to.rest)
            return TapPort(self._workers, slot, name, leads_to.rest)
        path, mode = Path(leads_to.rest), wanted["mode"]
        return VhostUserPort(self._workers, slot, name, path, mode, most)

    def _describe_port(self, entry: Entry, *, changed: bool) -> Arguments:
        return {
            "name": entry.port.name,
            "kind": entry.port.kind,
            "endpoint": entry.endpoint.text,
            "mode": entry.port.mode,
            "changed": changed,
        }

    async def _del_port(self, wanted: Arguments) -> Arguments:
        async with self._changing:
            entry = self._entry(str(wanted["name"]))
            await entry.port.close()
            await self._workers.flush(entry.slot, also_static=True)
            del self._entries[entry.port.name]
            self._clear_slot(entry.slot)
            _log.info("port %s: removed", entry.port.name)
        return {}

    async def _show(self, _: Arguments) -> Arguments:
        ports = [entry.describe() for entry in self._entries.values()]
        return {"workers": self._usage.workers(), "ports": ports}

    async def _stats(self, _: Arguments) -> Arguments:
        slots = {name: entry.slot for name, entry in self._entries.items()}
        return snapshot.stats(self._shared, slots)

    async def _fdb_show(self, _: Arguments) -> list[Arguments]:
        names = {entry.slot: name for name, entry in self._entries.items()}
        return snapshot.fdb_entries(self._shared, names)

    async def _fdb_add(self, wanted: Arguments) -> Arguments:
        entry = self._entry(str(wanted["ifname"]))
        key = snapshot.parse_key(str(wanted["mac"]), int(wanted.get("vlan") or 0))
        if not await self._workers.change_fdb("set", key, entry.slot):
            text = f"cannot add {wanted['mac']}: its bucket is full of static entries"
            raise VswitchError(f"{text} (delete one)")
        return {}

    async def _fdb_del(self, wanted: Arguments) -> Arguments:
        key = snapshot.parse_key(str(wanted["mac"]), int(wanted.get("vlan") or 0))
        if not await self._workers.change_fdb("remove", key):
            text = f"cannot delete {wanted['mac']}: it is not in the table"
            raise VswitchError(f"{text} (vswitch fdb show)")
        return {}

    async def _fdb_flush(self, wanted: Arguments) -> Arguments:
        name = wanted.get("ifname")
        slot = self._entry(str(name)).slot if name else -1
        return {"flushed": await self._workers.flush(slot, also_static=False)}

    # --- slots ---

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(self._entries) or "none"
            raise VswitchError(f"no port {name} (known: {known})")
        return entry

    def _free_slot(self) -> int:
        taken = {entry.slot for entry in self._entries.values()}
        for slot in range(MAX_PORTS):
            if slot not in taken:
                return slot
        message = f"cannot add a port: all {MAX_PORTS} are in use (remove one)"
        raise VswitchError(message)

    def _clear_slot(self, slot: int) -> None:
        """Wipe a slot that no worker uses."""
        self._shared.ports[slot] = 0
        self._shared.ports[slot]["fd"] = -1
        self._shared.counters[:, slot] = 0
        rings = self._shared.rings[slot * RINGS_PER_PORT : (slot + 1) * RINGS_PER_PORT]
        rings[:] = 0
        for field in ("kick_fd", "call_fd", "err_fd"):
            rings[field] = -1

    def _note_made(self, leads_to: Endpoint) -> None:
        """Remember a socket file outside the run directory, should we be killed."""
        if leads_to.kind == endpoint.VHOST:
            with (self._run_dir / _MADE).open("a") as made:
                made.write(f"{leads_to.rest}\n")


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


def _remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed manager of this run directory left: sockets and memory.

    Its workers ended with it, its taps too. The files it made outside the run directory
    are listed in `made`; one that somebody listens on again is not ours any more.
    """
    (run_dir / rundir.CONTROL).unlink(missing_ok=True)
    made = run_dir / _MADE
    for line in made.read_text().splitlines() if made.exists() else []:
        with contextlib.suppress(PortError, OSError):
            remove_stale(Path(line))
            _log.info("removed the stale socket %s", line)
    made.unlink(missing_ok=True)
    if segment.remove(run_dir):
        _log.info("removed the shared memory of a run that was killed")


def _raise_file_limit() -> int:
    """Allow as many descriptors as we may have; workers inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = min(hard, _MOST_FILES) if hard != resource.RLIM_INFINITY else _MOST_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


async def _first_of(*work: Awaitable[Any]) -> None:
    """Wait for the first; the others that we wrapped are not waited for any more."""
    tasks = [asyncio.ensure_future(one) for one in work]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks[1:]:
        task.cancel()


def _trim_log(run_dir: Path) -> None:
    """Begin a log that has grown long anew; ours is open for appending."""
    with contextlib.suppress(FileNotFoundError):
        log = run_dir / rundir.LOG
        if log.stat().st_size > _LONGEST_LOG:
            os.truncate(log, 0)


def default_cpus() -> list[int]:
    """The CPUs that we may use, without the first, which the rest of the host likes."""
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[1:] or cpus


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `python -m vswitch.manager`, over those of a configuration file.

    Raises:
        VswitchError: The file cannot be read, or makes no sense.
    """
    parser = _Parser(prog="vswitch.manager")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--spares", type=int, default=1)
    parser.add_argument("--cpus", type=_cpu_list, default=default_cpus())
    parser.add_argument("--poll", choices=config.POLLS, default=config.POLLS[0])
    parser.add_argument("--idle-us", type=int, default=100)
    parser.add_argument("--ageing", type=int, default=300)
    parser.add_argument(
        "--forward-reserved", action=argparse.BooleanOptionalAction, default=True
    )
    parser.add_argument("--status-fd", type=int, default=-1)
    path = parser.parse_args(arguments).config
    given = config.read(path) if path else config.NOTHING
    parser.set_defaults(**given.switch)
    options = parser.parse_args(arguments)
    options.ports = given.ports
    return options


class _Parser(argparse.ArgumentParser):
    """Its errors are ours, to be told like any other."""

    def error(self, message: str) -> NoReturn:
        """What is wrong with the options."""
        raise ConfigError(f"cannot start: {message}")


def _cpu_list(text: str) -> list[int]:
    try:
        return [int(cpu) for cpu in text.split(",")]
    except ValueError:
        message = f"{text!r} is no list of CPUs (write it as 1,2)"
        raise argparse.ArgumentTypeError(message) from None


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that cannot work on this machine.

    Raises:
        ConfigError: Too many workers, or a CPU that we may not use.
    """
    total = options.workers + options.spares
    if options.workers < 1 or options.spares < 0 or total > MAX_WORKERS:
        text = f"cannot start {options.workers} workers and {options.spares} spares"
        raise ConfigError(f"{text}: at least one and at most {MAX_WORKERS} in all")
    allowed = os.sched_getaffinity(0)
    for cpu in options.cpus:
        if cpu not in allowed:
            text = f"cannot pin a worker to cpu {cpu}: we may use {sorted(allowed)}"
            raise ConfigError(f"{text} (choose with --cpus)")


def run(options: argparse.Namespace, report: Callable[[Arguments], None]) -> int:
    """Run a manager to its end; the exit code. `report` hears of the start.

    Errors of the start are reported, not raised.
    """
    try:
        check_options(options)
        asyncio.run(_run(options, report))
    except VswitchError as error:
        report({"error": {"code": error.code, "message": str(error)}})
        return error.code
    return 0


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
        options = parse_arguments(arguments)
    except VswitchError as error:
        status.report({"error": {"code": error.code, "message": str(error)}})
        return error.code
    return run(options, status.report)


if __name__ == "__main__":
    main()
