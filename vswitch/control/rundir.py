"""The run directory: where a switch's control socket, pid file, state and log are.

Its pid file is locked by the manager as long as that lives, so whether a manager is there
is the kernel's answer and not a guess from a number.
"""

import contextlib
import fcntl
import os
import shlex
import stat
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Final

from ports import denied
from ports.errors import errno_name
from vswitch.errors import ConfigError, VswitchError

CONTROL: Final = "control.sock"
KEEPER: Final = "keeper.sock"
LOG: Final = "log"
MADE: Final = "made"  # sockets made outside of the directory
STATE: Final = "state.toml"
_PID: Final = "pid"
_ROOT: Final = 0
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
        VswitchError: We may not, something else is there, or others may write there.
    """
    try:
        run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(run_dir, error) from error
    _check_safe(run_dir)


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold the directory by a locked file with our pid.

    Raises:
        VswitchError: Another manager holds it, we may not write there, or others may.
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
    """The pid of the manager that holds the directory.

    Raises:
        VswitchError: We may not look.
    """
    try:
        with (run_dir / _PID).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read().strip() or 0) or None
    except PermissionError as error:
        raise unreachable(run_dir, run_dir / _PID, error) from error
    except OSError:
        pass
    return None


def _lock(run_dir: Path) -> TextIOWrapper:
    path = run_dir / _PID
    while True:
        try:
            file = path.open("a+")
        except OSError as error:
            raise unusable(run_dir, error) from error
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


def _check_safe(run_dir: Path) -> None:
    """Refuse a directory in which others could replace our files, or lead them astray."""
    status, uid = run_dir.stat(), os.geteuid()
    if status.st_uid not in {_ROOT, uid}:
        remedy = as_owner(run_dir, "up")
    elif status.st_mode & stat.S_IWOTH:
        remedy = f"anybody may write there; --run-dir {run_dir / 'vswitch'}"
    else:
        return
    text = f"cannot use run directory {run_dir}: {denied.whose(run_dir, uid)}"
    raise VswitchError(f"{text} ({remedy})")


def as_owner(run_dir: Path, command: str = "COMMAND") -> str:
    """How to give a command as the one to whom the switch, or the way there, belongs."""
    owner = denied.culprit(run_dir).stat().st_uid
    user = "" if owner == _ROOT else f"-u {denied.user_name(owner)} "
    return f"sudo {user}vswitch --run-dir {shlex.quote(str(run_dir))} {command}"


def unreachable(run_dir: Path, path: Path, error: OSError) -> VswitchError:
    """What to say where the kernel does not let us at `path` in a run directory."""
    what, uid = denied.culprit(path), os.geteuid()
    needed = denied.WRITE if what == path else denied.ENTER
    try:
        found = denied.whose(what, uid)
        remedy = denied.joining(what, uid, needed) or as_owner(run_dir)
    except OSError as error_there:  # it has gone meanwhile
        found, remedy = errno_name(error_there), "try again"
    return VswitchError(f"cannot reach {path}: {errno_name(error)}: {found} ({remedy})")


def unusable(run_dir: Path, error: OSError) -> VswitchError:
    """What to say where we cannot have a run directory."""
    text = f"cannot use run directory {run_dir}: {error.strerror}"
    remedy = "choose another with --run-dir"
    if isinstance(error, PermissionError):
        what, uid = denied.culprit(run_dir), os.geteuid()
        while not what.exists():
            what = what.parent
        user = denied.user_name(uid)
        make = f"sudo install -d -m 0750 -o {user} {shlex.quote(str(run_dir))}"
        how = as_owner(run_dir, "up") if what == run_dir else make
        text, remedy = f"{text}: {denied.whose(what, uid)}", f"{remedy}, or: {how}"
    return VswitchError(f"{text} ({remedy})")
