"""What to tell whom the kernel refused a path: whose it is, who we are, what helps."""

import grp
import os
import pwd
import stat
from pathlib import Path
from typing import Final

ENTER: Final = 1  # what it takes, as a digit of a mode
WRITE: Final = 2
_ROOT: Final = 0


def culprit(path: Path) -> Path:
    """The first directory on the way to `path` that we may not enter, else `path`."""
    for directory in reversed(path.parents):
        if not os.access(directory, os.X_OK, effective_ids=True):
            return directory
    return path


def whose(path: Path, uid: int) -> str:
    """Owner, group and mode of what stands in a user's way."""
    status = path.stat()
    return (
        f"{path} belongs to uid {status.st_uid} ({user_name(status.st_uid)}), "
        f"gid {status.st_gid} ({group_name(status.st_gid)}), with mode "
        f"{stat.S_IMODE(status.st_mode):04o}, we are uid {uid} ({user_name(uid)})"
    )


def joining(path: Path, uid: int, needed: int) -> str:
    """The command that makes a user a member of the group of `path`.

    Empty where the group may not do what is `needed` either, or is root's.
    """
    status = path.stat()
    if status.st_gid == _ROOT or status.st_mode >> 3 & needed != needed:
        return ""
    group, user = group_name(status.st_gid), user_name(uid)
    return f"sudo usermod -aG {group} {user}, then log in again"


def user_name(uid: int) -> str:
    """The name of a user, or the number again."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """The name of a group, or the number again."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
