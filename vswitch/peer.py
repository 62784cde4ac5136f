"""Who may talk to the manager: root, its own user, and members of the run directory's group.

The modes of the socket and of its directory say the same; they can be loosened by mistake,
and a descriptor can be handed on. What counts is who connected.
"""

import array
import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Final

from ports import denied
from vswitch.control import rundir

_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid
_SO_PEERGROUPS: Final = 59  # asm-generic/socket.h
_GROUPS_SIZE: Final = 1024  # as much as Python asks for: 256 groups
_ROOT: Final = 0


def refusal(connection: socket.socket, run_dir: Path) -> str:
    """Why whoever connected may not talk to us; empty if they may."""
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
    )
    _, uid, gid = _CREDENTIALS.unpack(credentials)
    if uid in {_ROOT, os.geteuid()}:
        return ""
    if run_dir.stat().st_gid in {gid, *_groups(connection)}:
        return ""
    remedy = denied.joining(run_dir, uid, denied.ENTER) or rundir.as_owner(run_dir)
    text = f"the manager refuses to talk to us: {denied.whose(run_dir, uid)}"
    return f"{text} ({remedy})"


def _groups(connection: socket.socket) -> list[int]:
    """The groups beside the first; none of somebody who has too many to tell."""
    with contextlib.suppress(OSError):
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_SIZE)
        return array.array("I", raw).tolist()
    return []
