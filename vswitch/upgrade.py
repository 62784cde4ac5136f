"""Go on with a switch by the code that is installed now: its manager, then its workers.

The new code is tried out first, in a directory of its own, so it is known to start and is
compiled before the old manager leaves. Between the two managers frames go on. The workers
follow one by one (`renewal.py`).
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from ports import cache
from vswitch import start as starting
from vswitch.control.client import Client
from vswitch.errors import NoManagerError, VswitchError

_SERVICE_S: Final = 30.0
_LOOK_S: Final = 0.05

OnProgress = Callable[[int, int], None]


def replace_manager(run_dir: Path, on_progress: OnProgress) -> dict[str, Any] | None:
    """Have a manager of our sources go on in place of the one that runs.

    Returns:
        What it says of itself, `seconds` without a manager, and `before`, the version of
        the other one; None if that was of our sources already.

    Raises:
        VswitchError: It is somebody else's, or ours does not start.
    """
    with Client(run_dir) as manager:
        status = manager.ask("status")
        if status.get("code") == cache.digest():
            return None
        pid = int(status["pid"])
        _check_ours(pid)
        _try_out(on_progress)
        began = time.monotonic()
        with starting.until_ended(pid):
            manager.ask("hand_over")
    if status["foreground"]:
        ready = _wait_for_service(run_dir)
    else:
        ready = starting.start(["--run-dir", str(run_dir)], run_dir, on_progress)
    seconds = time.monotonic() - began
    return ready | {"seconds": seconds, "before": status["version"]}


def renew_workers(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Replace workers that are of other sources than their manager; what became of each."""
    with Client(run_dir) as manager:
        while renewed := manager.ask("renew"):
            yield renewed


def _check_ours(pid: int) -> None:
    """A manager that we start has our rights, so it has to be our own."""
    owner = Path(f"/proc/{pid}").stat().st_uid
    if owner != os.geteuid():
        text = f"cannot upgrade: the manager, pid {pid}, is of uid {owner}"
        raise VswitchError(f"{text} and we are {os.geteuid()} (become that user)")


def _try_out(on_progress: OnProgress) -> None:
    """Start a switch without ports by the new code, and end it."""
    with tempfile.TemporaryDirectory(prefix="vswitch-") as directory:
        run_dir = Path(directory) / "run"
        arguments = [f"--run-dir={run_dir}", "--spares=0"]
        try:
            pid = int(starting.start(arguments, run_dir, on_progress)["pid"])
        except VswitchError as error:
            message = f"the new code does not start, so nothing was changed: {error}"
            raise VswitchError(message) from error
        with starting.until_ended(pid), Client(run_dir) as trial:
            trial.ask("down")


def _wait_for_service(run_dir: Path) -> dict[str, Any]:
    """Whoever runs it in the foreground has to start it again."""
    deadline = time.monotonic() + _SERVICE_S
    while time.monotonic() < deadline:
        try:
            with Client(run_dir) as manager:
                status = dict(manager.ask("status"))
        except NoManagerError:
            time.sleep(_LOOK_S)
        else:
            return status
    text = f"nobody started a manager again within {_SERVICE_S:.0f} s"
    raise VswitchError(f"{text} (frames go on; vswitch up --foreground)")
