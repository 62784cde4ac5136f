"""The command `vswitch`: parse, ask the manager once, print.

Errors are one line on stderr, `what failed: what was found (what to do)`. Exit codes: 0
done, 1 refused or failed, 2 usage, 3 no manager; 130 after Ctrl-C.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from vswitch import __version__, privileges, qemu_line, tables
from vswitch import start as starting
from vswitch.control import endpoint, rundir
from vswitch.control.client import Client
from vswitch.errors import EXIT_FAILED, NoManagerError, VswitchError

_INTERRUPTED: Final = 130
_WATCH_S: Final = 1.0

app = typer.Typer(
    name="vswitch",
    help="The Ethernet switch between virtual machines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_fdb = typer.Typer(
    help="Which address is behind which port.", no_args_is_help=True, name="fdb"
)
app.add_typer(_fdb)

Json = Annotated[bool, typer.Option("-j", "--json", help="Print JSON.")]
Vlan = Annotated[int, typer.Option(help="VLAN id; 0 is untagged.")]
SocketGroup = Annotated[
    str | None, typer.Option(help="Group that guests' sockets are given to.")
]
SocketMode = Annotated[
    str | None, typer.Option(help="Mode of guests' sockets; by default 0660.")
]


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    try:
        app()
    except VswitchError as error:
        if "--debug" in sys.argv:
            raise
        print(f"vswitch: {error}", file=sys.stderr)
        sys.exit(error.code)
    except BrokenPipeError:
        # Whoever read our output has enough; nothing is left to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where the switch lives; else $VSWITCH_RUN_DIR, /run/vswitch (root) or "
            "$XDG_RUNTIME_DIR/vswitch.",
            readable=False,  # who may not look is told by us, and why
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error comes from.")
    ] = False,
) -> None:
    del debug  # `main` looks for it
    if version:
        print(f"vswitch {__version__}")
        raise typer.Exit
    context.obj = run_dir
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def up(
    context: typer.Context,
    workers: Annotated[int | None, typer.Option(help="Forwarding processes.")] = None,
    cpus: Annotated[
        str | None, typer.Option(help="CPUs to pin them to, as 1,2.")
    ] = None,
    poll: Annotated[
        Literal["adaptive", "busy"] | None,
        typer.Option(help="Sleep when idle, or never."),
    ] = None,
    spares: Annotated[
        int | None, typer.Option(help="Processes that take over from a dead worker.")
    ] = None,
    idle_us: Annotated[
        int | None, typer.Option(help="Microseconds without a frame before sleep.")
    ] = None,
    ageing: Annotated[
        int | None, typer.Option(help="Seconds after which an address is forgotten.")
    ] = None,
    forward_reserved: Annotated[
        bool | None,
        typer.Option(
            "--forward-reserved/--no-forward-reserved",
            help="Let 01:80:c2:00:00:0x (LACP, LLDP, STP) pass.",
        ),
    ] = None,
    socket_group: SocketGroup = None,
    socket_mode: SocketMode = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with options, ports and pinned addresses.", readable=False
        ),
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, and end with Ctrl-C.")
    ] = False,
) -> None:
    """Start the switch; returns when frames can flow.

    Where the last run was killed, or ended by `down --keep`, its options, ports and pinned
    addresses come back. What this command says counts most, then what FILE says, then
    what was before, then the defaults; a port of FILE that had been removed is there again.
    A port that was there before and cannot be opened now is shown as down and tried again;
    one that only FILE knows ends the start.
    """
    run_dir = rundir.choose(context.obj)
    arguments = ["--run-dir", str(run_dir)]
    for name, value in {
        "workers": workers,
        "cpus": cpus,
        "poll": poll,
        "spares": spares,
        "idle-us": idle_us,
        "ageing": ageing,
        "socket-group": socket_group,
        "socket-mode": socket_mode,
        "config": config and config.absolute(),
    }.items():
        arguments += [f"--{name}={value}"] if value is not None else []
    if forward_reserved is not None:
        arguments.append(f"--{'' if forward_reserved else 'no-'}forward-reserved")
    if foreground:
        sys.stdout.flush()
        command = starting.command(arguments)
        environment = privileges.environment()
        os.execve(command[0], command, environment)  # noqa: S606 (no shell wanted)
    began = time.monotonic()
    try:
        with _Progress() as on_progress:
            ready = starting.start(arguments, run_dir, on_progress)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    _say_up(ready, time.monotonic() - began)


def _say_up(ready: dict[str, Any], seconds: float) -> None:
    cpus = ",".join(str(cpu) for cpu in ready["cpus"][: ready["workers"]])
    parts = [
        _plural(ready["workers"], "worker") + f" on cpu {cpus}",
        _plural(ready["spares"], "spare"),
        f"{ready['poll']} polling",
        f"pid {ready['pid']}",
    ]
    print(f"up in {seconds:.1f} s: {', '.join(parts)}")
    if ready["adopted"]:
        print("the manager before was killed; its workers and guests went on")
    _say_restored(ready)


def _say_restored(ready: dict[str, Any]) -> None:
    if ready["why_anew"]:
        text = f"warning: workers of the manager before were ended: {ready['why_anew']}"
        print(f"{text}; guests connect anew", file=sys.stderr)
    restored = ready["restored"]
    if restored["ports"] or restored["addresses"]:
        ports = _plural(restored["ports"], "port")
        addresses = _plural(restored["addresses"], "pinned address", "es")
        print(f"from the run before: {ports}, {addresses}")
    for trouble in restored["troubles"]:
        print(f"warning: {trouble}", file=sys.stderr)


@app.command()
def down(
    context: typer.Context,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Keep what is set for the next `vswitch up`."),
    ] = False,
) -> None:
    """Stop the switch and remove what it made; what was set is forgotten.

    What is to be there each time belongs in a file (vswitch up --config FILE).
    """
    run_dir = rundir.choose(context.obj)
    pid = rundir.holder(run_dir)
    if pid is None and (count := _end_orphans(run_dir, keep=keep)):
        print(f"down: {_plural(count, 'worker')} had gone on without a manager")
        return
    if pid is None:
        text, advice = f"no manager in {run_dir}", "start it with: vswitch up"
        if (left := run_dir / rundir.STATE).exists():
            text += "; what was set in the last run is kept"
            advice = f"vswitch up goes on from it, rm {left} forgets it"
        raise NoManagerError(f"{text} ({advice})")
    with starting.until_ended(pid) as process:
        _ask_to_end(run_dir, process, keep=keep)
    print("down")


@app.command()
def upgrade(context: typer.Context, as_json: Json = False) -> None:
    """Go on by the code that is installed now, while guests stay and frames flow.

    First the manager, then worker by worker. If the new code lays out shared memory
    differently the switch is started anew, and guests connect anew.
    """
    from vswitch import upgrade as upgrading  # noqa: PLC0415 (others need none of it)

    run_dir = rundir.choose(context.obj)
    workers = []
    try:
        with _Progress() as on_progress:
            manager = upgrading.replace_manager(run_dir, on_progress)
        if manager and not as_json:
            _say_replaced(manager)
        for renewed in upgrading.renew_workers(run_dir):
            workers.append(renewed)
            if not as_json:
                print(_renewed_text(renewed))
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    if as_json:
        _print_json({"manager": manager, "workers": workers})
    elif not manager and not workers:
        print(f"nothing to do: all of it is of this code, version {__version__}")


def _say_replaced(ready: dict[str, Any]) -> None:
    version = f"{ready['before']} to {ready['version']}"
    took = f"{ready['seconds']:.1f} s without one"
    print(f"manager: version {version}, {took}, pid {ready['pid']}")
    if not ready["adopted"]:
        _say_restored(ready)


def _renewed_text(renewed: dict[str, Any]) -> str:
    if renewed["heir"] is None:
        return f"worker {renewed['worker']}: replaced; it was a spare"
    gap = renewed["gap_s"]
    stood = "it died by itself" if gap is None else f"{1000 * gap:.1f} ms without one"
    return f"worker {renewed['worker']}: replaced by worker {renewed['heir']}, {stood}"


def _end_orphans(run_dir: Path, *, keep: bool) -> int:
    """End what a killed manager has left at work; how many workers that were."""
    if not (run_dir / rundir.KEEPER).exists():
        return 0
    # Brings NumPy, which takes longer than most commands.
    from vswitch import orphans  # noqa: PLC0415

    with rundir.hold(run_dir):
        return orphans.end(run_dir, keep=keep)


def _ask_to_end(run_dir: Path, process: int, *, keep: bool) -> None:
    """By a signal, which needs nobody to listen; what it cannot say over the socket."""
    if not keep:
        try:
            signal.pidfd_send_signal(process, signal.SIGTERM)
        except PermissionError:  # a member of the group may ask, and not send signals
            pass
        else:
            return
    with Client(run_dir) as manager:
        manager.ask("down", keep=keep)


@app.command("add-port")
def add_port(
    context: typer.Context,
    where: Annotated[
        str,
        typer.Argument(
            metavar="ENDPOINT",
            help="A vhost-user socket's path (or vhost:PATH), tap:IFNAME for a tap of our "
            "own, eth:IFNAME for an interface that is there, or xdp:IFNAME for all of it.",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="What to call the port.")] = None,
    mode: Annotated[
        Literal["server", "client"],
        typer.Option(help="server: we listen, QEMU connects; client: the other way."),
    ] = "server",
    queues: Annotated[
        int | None, typer.Option(help="Most queue pairs; by default 8.")
    ] = None,
    max_addresses: Annotated[
        int | None, typer.Option(help="Most addresses learned behind it.")
    ] = None,
    config_space: Annotated[
        bool,
        typer.Option(
            "--config-space",
            help="For a front-end that asks us what the device is like; QEMU does not.",
        ),
    ] = False,
    backend: Annotated[
        Literal["auto", "vhost-net", "io_uring", "plain"],
        typer.Option(help="How a tap's frames come and go; auto: the best there is."),
    ] = "auto",
    socket_group: SocketGroup = None,
    socket_mode: SocketMode = None,
    libvirt: Annotated[
        bool, typer.Option("--libvirt", help="Print XML instead of QEMU arguments.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Connect a guest or an uplink; prints what to tell QEMU."""
    leads_to = endpoint.parse(where, Path.cwd())
    chosen = endpoint.check_name(name or leads_to.default_name)
    with _manager(context) as manager:
        answer = manager.ask(
            "add_port",
            endpoint=leads_to.text,
            name=chosen,
            mode=mode,
            queues=queues,
            max_addresses=max_addresses,
            config_space=config_space,
            backend=backend,
            socket_group=socket_group,
            socket_mode=socket_mode,
        )
    lines = ""
    if leads_to.kind == endpoint.VHOST:
        text = qemu_line.libvirt_text if libvirt else qemu_line.qemu_text
        lines = text(chosen, Path(leads_to.rest), mode, queues or 1)
    for warning in answer["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        _print_json(answer | {"arguments": lines})
        return
    print(f"port {chosen}: {'added' if answer['changed'] else 'unchanged'}")
    if lines:
        print(f"start the guest with (both sizes the same):\n{lines}")


@app.command("del-port")
def del_port(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The port's name.")],
) -> None:
    """Disconnect a port; what was learned behind it is forgotten."""
    with _manager(context) as manager:
        manager.ask("del_port", name=name)
    print(f"port {name}: removed")


@app.command()
def show(context: typer.Context, as_json: Json = False) -> None:
    """Show workers and ports; a port's state is a word and a reason."""
    with _manager(context) as manager:
        answer = manager.ask("show")
    _print(answer, tables.show(answer), as_json=as_json)


@app.command()
def stats(
    context: typer.Context,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show rates, every second, until Ctrl-C.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what every port received and sent, and every drop under its name."""
    with _manager(context) as manager:
        if not watch:
            answer = manager.ask("stats")
            _print(answer, tables.stats(answer), as_json=as_json)
        elif as_json:
            for answer in _each_second(manager):
                _print_json(answer, indent=None)
        else:
            _watch(manager)


def _watch(manager: Client) -> None:
    from rich.live import Live  # noqa: PLC0415 (50 ms that other commands save)
    from rich.text import Text  # noqa: PLC0415

    answers = _each_second(manager)
    before, then = next(answers), time.monotonic()
    with Live(Text("measuring ..."), auto_refresh=False) as live:
        for answer in answers:
            now = time.monotonic()
            text = Text(tables.rates(before, answer, now - then), no_wrap=True)
            live.update(text, refresh=True)
            before, then = answer, now


def _each_second(manager: Client) -> Iterator[dict[str, Any]]:
    while True:
        yield manager.ask("stats")
        time.sleep(_WATCH_S)


@_fdb.command("show")
def fdb_show(context: typer.Context, as_json: Json = False) -> None:
    """List the addresses."""
    with _manager(context) as manager:
        entries = manager.ask("fdb_show")
    _print(entries, tables.fdb(entries), as_json=as_json)


@_fdb.command("add")
def fdb_add(context: typer.Context, mac: str, port: str, vlan: Vlan = 0) -> None:
    """Pin an address to a port."""
    with _manager(context) as manager:
        manager.ask("fdb_add", mac=mac, ifname=port, vlan=vlan)


@_fdb.command("del")
def fdb_del(context: typer.Context, mac: str, vlan: Vlan = 0) -> None:
    """Forget an address, learned or pinned."""
    with _manager(context) as manager:
        manager.ask("fdb_del", mac=mac, vlan=vlan)


@_fdb.command("flush")
def fdb_flush(
    context: typer.Context,
    port: Annotated[str | None, typer.Option(help="Only those behind a port.")] = None,
) -> None:
    """Forget all learned addresses."""
    with _manager(context) as manager:
        flushed = manager.ask("fdb_flush", ifname=port)["flushed"]
    print(f"{_plural(flushed, 'address', 'es')} forgotten")


@app.command()
def demo(
    guests: Annotated[
        Literal["auto", "qemu", "builtin"],
        typer.Option(help="Which guests; auto: QEMU where it is installed."),
    ] = "auto",
) -> None:
    """Two guests, ping and TCP between them, throughput; then all is taken down."""
    from vswitch import demo as story  # noqa: PLC0415 (other commands need none of it)

    sys.exit(story.run(guests))


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Measure this switch beside others that are installed; `bench --help` tells how."""
    here = Path(__file__).parent
    # In the wheel it lies within the package, in a checkout beside it.
    places = [here / "measurements", here.parent]
    place = next(place for place in places if (place / "bench").is_dir())
    path = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "bench", *context.args]
    sys.stdout.flush()
    os.execve(command[0], command, os.environ | {"PYTHONPATH": path})  # noqa: S606


# --- how things are printed ---------------------------------------------------------


@contextmanager
def _manager(context: typer.Context) -> Iterator[Client]:
    with Client(rundir.choose(context.obj)) as manager:
        try:
            yield manager
        except KeyboardInterrupt:
            sys.exit(_INTERRUPTED)


class _Progress:
    """A bar on a terminal, a line elsewhere, and only if there is anything to wait for."""

    def __init__(self) -> None:
        self._owned = ExitStack()
        self._advance: Callable[[int], None] | None = None

    def __enter__(self) -> Callable[[int, int], None]:
        return self._on_progress

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    def _on_progress(self, done: int, total: int) -> None:
        if self._advance is None:
            self._advance = self._begin(total)
        self._advance(done)

    def _begin(self, total: int) -> Callable[[int], None]:
        text = "compiling the data path, once"
        if not sys.stderr.isatty():
            print(f"{text} ...", file=sys.stderr)
            return lambda _: None
        from rich.console import Console  # noqa: PLC0415 (50 ms that others save)
        from rich.progress import Progress  # noqa: PLC0415

        bar = Progress(console=Console(stderr=True), transient=True)
        self._owned.enter_context(bar)
        task = bar.add_task(text, total=total)
        return lambda done: bar.update(task, completed=done)


def _print(answer: object, text: str, *, as_json: bool) -> None:
    if as_json:
        _print_json(answer)
    else:
        print(text)


def _print_json(answer: object, indent: int | None = 2) -> None:
    print(json.dumps(answer, indent=indent), flush=True)


def _plural(count: int, word: str, ending: str = "s") -> str:
    return f"{count} {word}{'' if count == 1 else ending}"


if __name__ == "__main__":
    main()
