"""Unix sockets that front-ends connect to: made over stale files, refused with a reason."""

import contextlib
import grp
import os
import re
import shlex
import socket
import stat
from pathlib import Path
from typing import Final, NamedTuple

from ports import denied
from ports.errors import PortError, errno_name

_LONGEST_PATH: Final = 107  # sockaddr_un, without its final zero
_MODE: Final = re.compile(r"0?[0-7]{3}")


class Access(NamedTuple):
    """Who may connect to a socket that we listen on."""

    mode: int = 0o660
    gid: int = -1  # as the process has it


def access(socket_group: str, socket_mode: str) -> Access:
    """Who may connect, as users write it: a group's name or number, a mode in octal.

    Raises:
        PortError: There is no such group, or it is no mode.
    """
    if not _MODE.fullmatch(socket_mode):
        message = f"cannot use socket mode {socket_mode!r}: not three octal digits"
        raise PortError(f"{message} (write it as 0660)")
    return Access(int(socket_mode, 8), _gid(socket_group) if socket_group else -1)


def _gid(group: str) -> int:
    if re.fullmatch(r"[0-9]{1,9}", group):
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        message = f"cannot use socket group {group!r}: there is none of that name"
        raise PortError(f"{message} (sudo groupadd {shlex.quote(group)})") from None


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


def listen(path: Path, allowed: Access) -> socket.socket:
    """Bind a listening socket, over a stale file if need be.

    Raises:
        PortError: Somebody listens there, the directory is missing or closed to us, or
            we may not give the socket to that group.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    try:
        remove_stale(path)
        listener.bind(str(path))
        _admit(path, allowed)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise PortError(f"cannot listen on {path}: {_explain(path, error)}") from error
    except PortError:
        listener.close()
        raise
    return listener


def _admit(path: Path, allowed: Access) -> None:
    """Set who may connect; nobody can before somebody listens.

    Raises:
        PortError: We are no member of the group.
    """
    file = os.open(path, os.O_PATH | os.O_NOFOLLOW)  # others may write here, too
    try:
        os.chown(f"/proc/self/fd/{file}", -1, allowed.gid)
        os.chmod(f"/proc/self/fd/{file}", allowed.mode)  # noqa: PTH101 (no path)
    except PermissionError as error:
        path.unlink()
        group, user = denied.group_name(allowed.gid), denied.user_name(os.geteuid())
        message = (
            f"cannot give {path} to group {group}: {errno_name(error)}: we are uid"
        )
        message += f" {os.geteuid()} ({user}) and no member"
        raise PortError(f"{message} (sudo usermod -aG {group} {user})") from error
    finally:
        os.close(file)


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
