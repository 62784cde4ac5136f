"""Unix sockets that front-ends connect to: made over stale files, refused with a reason."""

import contextlib
import os
import shlex
import socket
import stat
from pathlib import Path
from typing import Final

from ports import denied
from ports.errors import PortError, errno_name

_LONGEST_PATH: Final = 107  # sockaddr_un, without its final zero


def check_path(path: Path) -> None:
    """Refuse a path that does not fit into a socket's address.

    Raises:
        PortError: It is too long.
    """
    length = len(os.fsencode(path))
    if length > _LONGEST_PATH:
        message = (
            f"cannot use {path}: the path has {length} bytes, a socket's may have"
            f" {_LONGEST_PATH} (choose a shorter one)"
        )
        raise PortError(message)


def listen(path: Path) -> socket.socket:
    """Bind a listening socket, over a stale file if need be.

    Raises:
        PortError: Somebody listens there, or the directory is missing or closed to us.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    try:
        remove_stale(path)
        listener.bind(str(path))
        path.chmod(0o660)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise PortError(f"cannot listen on {path}: {_explain(path, error)}") from error
    except PortError:
        listener.close()
        raise
    return listener


def remove_stale(path: Path) -> None:
    """Remove the socket file of a listener that is gone.

    Raises:
        PortError: Somebody listens there, or it is no socket.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        message = f"cannot listen on {path}: a file that is no socket is there"
        raise PortError(f"{message} (choose another path)")
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # a listener with a full queue is alive
    message = f"cannot listen on {path}: EADDRINUSE: another process is listening"
    raise PortError(f"{message} (end it, or choose another path)")


def _explain(path: Path, error: OSError) -> str:
    name = errno_name(error)
    if isinstance(error, FileNotFoundError):
        return f"{name}: no directory {path.parent} (mkdir -p {path.parent})"
    if isinstance(error, PermissionError):
        return f"{name}: {_why_denied(path)}"
    return name


def _why_denied(path: Path) -> str:
    """Whose the directory is, or in one that we may write to, what we may not replace."""
    uid = os.geteuid()
    if os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
        return f"{denied.whose(path, uid)} (sudo rm {shlex.quote(str(path))})"
    what = denied.culprit(path.parent)
    user = denied.user_name(uid)
    remedy = f"sudo install -d -o {user} {shlex.quote(str(what / user))}"
    return f"{denied.whose(what, uid)} (choose a directory of your own: {remedy})"


def explain_refusal(path: Path, error: OSError) -> str:
    """Why we could not connect to somebody's socket."""
    name = errno_name(error)
    if not isinstance(error, PermissionError):
        return name
    uid, what = os.geteuid(), denied.culprit(path)
    needed = denied.WRITE if what == path else denied.ENTER
    by_hand = f"chown {denied.user_name(uid)}" if what == path else "chmod a+x"
    try:
        remedy = denied.joining(what, uid, needed)
        remedy = remedy or f"sudo {by_hand} {shlex.quote(str(what))}"
        return f"{name}: {denied.whose(what, uid)} ({remedy})"
    except OSError:  # it has gone meanwhile
        return name
