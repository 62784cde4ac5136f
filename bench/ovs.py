"""Open vSwitch with a database and sockets of its own; the system's is left alone."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from bench import daemon

_SCHEMA: Final = Path("/usr/share/openvswitch/vswitch.ovsschema")
_COMMANDS: Final = ("ovsdb-tool", "ovsdb-server", "ovs-vsctl", "ovs-appctl")
# Where Debian puts the one with DPDK, beside the one without.
_DPDK_DAEMON: Final = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk"
_DAEMON: Final = "ovs-vswitchd"
PACKAGE: Final = "openvswitch-switch"
DPDK_PACKAGE: Final = "openvswitch-switch-dpdk"


class Ovs:
    """One that runs; ask it by `control` (ovs-vsctl) and `ask` (ovs-appctl)."""

    def __init__(self, directory: Path, pid: int) -> None:
        self.pid = pid
        self._directory = directory

    def control(self, *command: str) -> str:
        """Change the configuration and wait until it is in force."""
        return _run(
            self._directory,
            *("ovs-vsctl", f"--db=unix:{self._directory}/db.sock"),
            *(f"--timeout={daemon.START_S:.0f}", *command),
        )

    def ask(self, *command: str) -> str:
        """Ask the daemon; what it says."""
        target = f"--target={self._directory}/vswitchd.ctl"
        return _run(self._directory, "ovs-appctl", target, *command)


def missing() -> str:
    """Why there is no Open vSwitch here, or nothing."""
    return daemon.missing((*_COMMANDS, _DAEMON), PACKAGE)


def missing_dpdk() -> str:
    """The same of the one with DPDK."""
    if os.geteuid() != 0:
        return "its taps need root"
    return daemon.missing((*_COMMANDS, _DPDK_DAEMON), DPDK_PACKAGE)


def version_dpdk() -> str:
    """What it is, and with which DPDK."""
    said = subprocess.run(
        [_DPDK_DAEMON, "--version"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return " with ".join(line.partition(") ")[2] or line for line in said.splitlines())


@contextmanager
def running(
    directory: Path,
    settings: Sequence[str] = (),
    prefix: Sequence[str] = (),
    *,
    dpdk: bool = False,
) -> Iterator[Ovs]:
    """A database and a daemon.

    Args:
        directory: For all of their files.
        settings: Columns of the table Open_vSwitch to set before the daemon starts.
        prefix: Before each daemon's command, to put it into a namespace.
        dpdk: Take the daemon that has DPDK in it.
    """
    command = _DPDK_DAEMON if dpdk else _DAEMON
    database = f"unix:{directory}/db.sock"
    with ExitStack() as owned:

        def start(*arguments: str, name: str, appears: str) -> int:
            log = directory / f"{name}.out"
            process = owned.enter_context(
                daemon.running(
                    [
                        *(*prefix, *arguments, f"--log-file={directory}/{name}.log"),
                        *(f"--unixctl={directory}/{name}.ctl", "--verbose=console:err"),
                    ],
                    log,
                    _environment(directory),
                )
            )
            there = (directory / appears).exists
            daemon.wait_until(there, f"{appears} of {arguments[0]}", log, process)
            return process.pid

        _run(directory, "ovsdb-tool", "create", f"{directory}/conf.db", str(_SCHEMA))
        start(
            *("ovsdb-server", f"{directory}/conf.db", f"--remote=p{database}"),
            name="database",
            appears="db.sock",
        )
        begin = ["ovs-vsctl", f"--db={database}", "--no-wait", "init"]
        if settings:
            begin += ["--", "set", "Open_vSwitch", ".", *settings]
        _run(directory, *begin)
        pid = start(command, database, name="vswitchd", appears="vswitchd.ctl")
        yield Ovs(directory, pid)


def _environment(directory: Path) -> dict[str, str]:
    names = ("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "RUNTIME_DIRECTORY")
    return os.environ | dict.fromkeys(names, str(directory))


def _run(directory: Path, *command: str) -> str:
    what = f"{command[0]} {command[-1]}"
    return daemon.ask(command, what, _environment(directory))
