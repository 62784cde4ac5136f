"""The shared memory segment: one layout, made by the manager, attached by everybody.

The segment's name is derived from the run directory, so the next manager of the same
directory finds what a killed one left. Offsets follow from the records; a digest of all
of them in the header refuses a process that was built from other sources.
"""

import hashlib
import mmap
import os
import secrets
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import posix_ipc
from numpy.typing import NDArray

from ports.base import (
    MAX_PORTS,
    PORT,
    REDO,
    REDO_ROWS,
    REGION,
    RING,
    RINGS_PER_PORT,
    TABLE_ROWS,
)
from ports.counters import COUNTERS
from vswitch.errors import VswitchError
from vswitch.records import FDB, FDB_BUCKETS, HEADER, MAX_WORKERS, WORKER, Shared

_MAGIC: Final = 0x76737769746368  # "vswitch"
_PAGE: Final = 4096

# name, record, shape; in the order of the segment and of Shared's fields.
_TABLES: Final[tuple[tuple[str, "np.dtype[Any]", tuple[int, ...]], ...]] = (
    ("header", HEADER, (1,)),
    ("ports", PORT, (MAX_PORTS,)),
    ("rings", RING, (MAX_PORTS * RINGS_PER_PORT,)),
    ("redo", REDO, (MAX_PORTS * RINGS_PER_PORT, REDO_ROWS)),
    ("regions", REGION, (MAX_PORTS * 2 * TABLE_ROWS,)),
    ("fdb", FDB, (FDB_BUCKETS,)),
    ("counters", COUNTERS, (MAX_WORKERS, MAX_PORTS)),
    ("workers", WORKER, (MAX_WORKERS,)),
)


def segment_name(run_dir: Path) -> str:
    """The segment of a run directory."""
    digest = hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()
    return f"/vswitch.{digest[:8]}"


def layout_digest() -> bytes:
    """What two processes must agree on to share a segment."""
    text = ";".join(f"{name} {table.descr} {shape}" for name, table, shape in _TABLES)
    return hashlib.sha256(text.encode()).hexdigest()[:16].encode()


def create(run_dir: Path, n_workers: int) -> Shared:
    """Make the segment anew, whatever was there.

    Raises:
        VswitchError: There is no room, or no right, to make it.
    """
    remove(run_dir)
    name = segment_name(run_dir)
    try:
        memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, 0o600, _segment_size())
    except (OSError, posix_ipc.Error) as error:
        message = f"cannot make shared memory {name}: {error} (is /dev/shm full?)"
        raise VswitchError(message) from error
    shared = _map(memory, mmap.PROT_READ | mmap.PROT_WRITE)
    header = shared.header[0]
    header["digest"] = layout_digest()
    header["manager_pid"] = os.getpid()
    header["n_workers"] = n_workers
    header["started_ns"] = time.monotonic_ns()
    header["hash_seed"] = secrets.randbits(62) | 1
    header["magic"] = _MAGIC
    return shared


def attach(run_dir: Path, *, writable: bool = False) -> Shared:
    """Map the segment of a running switch.

    Raises:
        VswitchError: There is none, or it was laid out by other sources.
    """
    name = segment_name(run_dir)
    try:
        memory = posix_ipc.SharedMemory(name)
    except posix_ipc.PermissionsError as error:
        message = (
            f"cannot look at {name}: it belongs to another user (become that user)"
        )
        raise VswitchError(message) from error
    except (OSError, posix_ipc.Error) as error:
        message = f"no switch in {run_dir}: {name} does not exist (start: vswitch up)"
        raise VswitchError(message) from error
    if memory.size < _segment_size():
        memory.close_fd()
        message = f"{name} is too small (it belongs to another version of vswitch)"
        raise VswitchError(message)
    shared = _map(memory, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
    header = shared.header[0]
    if header["magic"] != _MAGIC or bytes(header["digest"]) != layout_digest():
        message = (
            f"{name} has another layout (it belongs to another version of vswitch)"
        )
        raise VswitchError(message)
    return shared


def remove(run_dir: Path) -> bool:
    """Unlink the segment; False if there was none."""
    try:
        posix_ipc.unlink_shared_memory(segment_name(run_dir))
    except posix_ipc.ExistentialError:
        return False
    return True


def elapsed_s(shared: Shared) -> int:
    """Seconds since the switch started, the clock of the fdb's stamps."""
    return int((time.monotonic_ns() - int(shared.header[0]["started_ns"])) // 10**9)


def _segment_size() -> int:
    return sum(_table_size(table, shape) for _, table, shape in _TABLES)


def _table_size(table: "np.dtype[Any]", shape: tuple[int, ...]) -> int:
    size = table.itemsize * int(np.prod(shape))
    return (size + _PAGE - 1) // _PAGE * _PAGE


def _map(memory: posix_ipc.SharedMemory, protection: int) -> Shared:
    pages = mmap.mmap(memory.fd, _segment_size(), prot=protection)
    memory.close_fd()
    tables: dict[str, NDArray[np.void]] = {}
    offset = 0
    for name, table, shape in _TABLES:
        tables[name] = np.ndarray(shape, table, pages, offset)
        offset += _table_size(table, shape)
    return Shared(**tables)
