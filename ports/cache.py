"""Where compiled code is kept: one directory for each state of the sources.

Numba's own cache notices a changed file but not a changed file that it imports, so a
stale caller would survive the edit of a constant. A directory named by a digest of all
sources, the CPU's features and the Numba flags cannot be stale.

Numba-free: the manager asks `is_warm` before it decides who compiles.
"""

import hashlib
import os
import shutil
import stat
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

_KEPT_DIRECTORIES: Final = 4
_COMPLETE: Final = "complete"


def cache_dir() -> Path:
    """The directory for these sources on this CPU with these Numba flags."""
    return _base() / digest()


def is_warm() -> bool:
    """Whether a worker has compiled everything before."""
    return (cache_dir() / _COMPLETE).exists()


def mark_warm() -> None:
    """Note that everything is compiled, and drop caches of older sources."""
    directory = cache_dir()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _COMPLETE).touch()
    others = [path for path in _base().iterdir() if path != directory and path.is_dir()]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[_KEPT_DIRECTORIES - 1 :]:
        shutil.rmtree(path, ignore_errors=True)


@cache
def _base() -> Path:
    given = os.environ.get("VSWITCH_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    base = Path(given) / "jit" if given else Path(home) / "vswitch" / "jit"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError:
        private = Path(tempfile.gettempdir()) / f"vswitch-{os.getuid()}"
        private.mkdir(mode=0o700, exist_ok=True)
        # Anybody may have made it before us, and what lies there is run.
        if not _is_private(private):
            message = f"{private} is not ours alone (set VSWITCH_CACHE_DIR)"
            raise PermissionError(message) from None
        base = private / "jit"
        base.mkdir(exist_ok=True)
    return base


def _is_private(directory: Path) -> bool:
    status = directory.lstat()
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return ours and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@cache
def digest() -> str:
    """What tells these sources, on this CPU with these Numba flags, from all others."""
    whole = hashlib.sha256()
    root = Path(__file__).parent.parent
    for package in ("ports", "vswitch"):
        for path in sorted((root / package).rglob("*.py")):
            whole.update(str(path.relative_to(root)).encode())
            whole.update(path.read_bytes())
    for name in sorted(os.environ):
        if name.startswith("NUMBA_"):
            whole.update(f"{name}={os.environ[name]}".encode())
    whole.update(_cpu_features())
    return whole.hexdigest()[:16]


def _cpu_features() -> bytes:
    with Path("/proc/cpuinfo").open("rb") as lines:
        return next((line for line in lines if line.startswith(b"flags")), b"")
