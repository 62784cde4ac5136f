"""The run directory: where a switch's control socket, pid file and log are.

Its pid file is locked by the manager as long as that lives, so whether a manager is there
is the kernel's answer and not a guess from a number.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Final

from vswitch.errors import ConfigError, VswitchError

CONTROL: Final = "control.sock"
LOG: Final = "log"
_PID: Final = "pid"
_SYSTEM: Final = Path("/run/vswitch")


def choose(given: Path | None) -> Path:
    """The run directory: as given, else $VSWITCH_RUN_DIR, else the user's usual one.

    Raises:
        ConfigError: An ordinary user without $XDG_RUNTIME_DIR gave none.
    """
    if given is not None:
        return given.absolute()
    if from_environment := os.environ.get("VSWITCH_RUN_DIR"):
        return Path(from_environment).absolute()
    if os.geteuid() == 0:
        return _SYSTEM
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "vswitch"
    message = "cannot choose a run directory: $XDG_RUNTIME_DIR is not set"
    raise ConfigError(f"{message} (give one with --run-dir)")


def make(run_dir: Path) -> None:
    """Make the directory unless it is there.

    Raises:
        VswitchError: We may not, or something else is there.
    """
    try:
        run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(run_dir, error) from error


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold the directory by a locked file with our pid.

    Raises:
        VswitchError: Another manager holds it, or we may not write there.
    """
    make(run_dir)
    with _lock(run_dir) as file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            (run_dir / _PID).unlink(missing_ok=True)


def holder(run_dir: Path) -> int | None:
    """The pid of the manager that holds the directory."""
    try:
        with (run_dir / _PID).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read().strip() or 0) or None
    except OSError:
        pass
    return None


def _lock(run_dir: Path) -> TextIOWrapper:
    path = run_dir / _PID
    while True:
        try:
            file = path.open("a+")
        except OSError as error:
            raise _unusable(run_dir, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            pid = holder(run_dir)
            if pid is None:
                continue  # somebody only looked, or it has not written its pid yet
            text = f"a manager is running in {run_dir}: pid {pid}"
            raise VswitchError(f"{text} (stop it with: vswitch down)") from None
        # One that just ended may have removed the file between our two steps.
        with contextlib.suppress(FileNotFoundError):
            if path.samefile(f"/proc/self/fd/{file.fileno()}"):
                return file
        file.close()


def _unusable(run_dir: Path, error: OSError) -> VswitchError:
    text = f"cannot use run directory {run_dir}: {error.strerror}"
    return VswitchError(f"{text} (choose another with --run-dir)")
