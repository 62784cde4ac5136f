"""What a manager that was killed has left at work: to go on with it, or to end it.

Its workers forward, its keeper has what they and the front-ends are connected to. A new
manager can go on with them if it is of the same sources as far as they share memory, and
is asked for the same workers. If not, they are ended, and front-ends connect anew.
"""

import argparse
import contextlib
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any, Final

from ports.errors import PortError
from ports.vhost import saved
from ports.vhost.sockets import remove_stale
from vswitch import shared as segment
from vswitch.control import rundir, state
from vswitch.errors import VswitchError
from vswitch.kept import Kept, is_readable
from vswitch.records import Shared

_END_S: Final = 2.0
_OF_WORKERS: Final = ("workers", "spares", "cpus", "poll", "idle_us")

_log = logging.getLogger(__name__)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What a successor has to agree with."""
    words = {name: getattr(options, name) for name in _OF_WORKERS}
    return {"format": saved.FORMAT, **words}


def adopt(
    run_dir: Path, options: argparse.Namespace
) -> tuple[Kept, Shared, str] | tuple[None, None, str]:
    """What is left of a run, if we can go on with it; else it is ended.

    The text says why we could not; it is empty where nothing was left.
    """
    kept = Kept.take_over(run_dir)
    if kept is None:
        return None, None, ""
    why = _differs(kept.items("switch").get("options"), describe(options))
    if not why:
        try:
            shared = segment.attach(run_dir, writable=True)
        except VswitchError as error:
            why = str(error)
        else:
            shared.header[0]["manager_pid"] = os.getpid()
            return kept, shared, ""
    _end(kept)
    return None, None, why


def end(run_dir: Path, *, keep: bool = False) -> int:
    """End what is left of a run, and remove it; how many workers that were.

    What was set is forgotten if there was anything left, but for `keep`. Nobody else may
    do so meanwhile: hold the run directory.
    """
    kept = Kept.take_over(run_dir)
    count = _end(kept) if kept else 0
    remove_leftovers(run_dir)
    if count and not keep:
        state.forget(run_dir)
    return count


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed manager of this run directory left: sockets and memory.

    Its workers have ended, its taps too. The files it made outside the run directory are
    listed in `made`; one that somebody listens on again is not ours any more.
    """
    (run_dir / rundir.CONTROL).unlink(missing_ok=True)
    (run_dir / rundir.KEEPER).unlink(missing_ok=True)
    made = run_dir / rundir.MADE
    for line in made.read_text().splitlines() if made.exists() else []:
        with contextlib.suppress(PortError, OSError):
            remove_stale(Path(line))
            _log.info("removed the stale socket %s", line)
    made.unlink(missing_ok=True)
    if segment.remove(run_dir):
        _log.info("removed the shared memory of a run that was killed")


def _differs(item: Any, ours: dict[str, Any]) -> str:  # noqa: ANN401
    """In what the run that is left differs from us."""
    if item is None:
        return "their manager was killed before they were at work"
    for name, value in ours.items():
        before = item.words.get(name)
        if before != value:
            return f"{name} was {before} and is now {value}"
    return ""


def _end(kept: Kept) -> int:
    """End a keeper and its workers, whose sockets it has."""
    pidfds = []
    for item in kept.items("worker").values():
        with contextlib.suppress(ProcessLookupError):
            pidfds.append(os.pidfd_open(item.words["pid"]))
    kept.end()
    deadline = time.monotonic() + _END_S
    for pidfd in pidfds:
        if not is_readable(pidfd, max(0, deadline - time.monotonic())):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            is_readable(pidfd, _END_S)
        os.close(pidfd)
    return len(pidfds)
