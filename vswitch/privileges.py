"""What the processes may still do once they have what they need.

The manager gives up every capability that no port needs. Workers begin with less, as a
program that root runs gets no more than its bounding set, and give up all of it before they
see the first frame. Nobody can get anything back: no_new_privs is set, and inherited.

capabilities(7), capset(2), prctl(2), core(5).
"""

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from ports.errors import errno_name


class Capability(NamedTuple):
    """One that the manager keeps, where it has it."""

    name: str
    bit: int  # linux/capability.h
    why: str


_DAC_OVERRIDE: Final = 1

KEPT: Final = (
    Capability("CAP_CHOWN", 0, "to give sockets to a group"),
    Capability(
        "CAP_DAC_OVERRIDE",
        _DAC_OVERRIDE,
        "to use guests' sockets and directories, which are their owners'",
    ),
    Capability("CAP_NET_ADMIN", 12, "for taps, links, ethtool and XDP programs"),
    Capability("CAP_NET_RAW", 13, "for packet and AF_XDP sockets"),
    Capability("CAP_IPC_LOCK", 14, "for the memory of AF_XDP sockets"),
    Capability("CAP_BPF", 39, "for XDP programs and their maps"),
)

# A worker reads its program, which may be in a home directory, and the compiled code.
_FOR_WORKERS: Final = frozenset({_DAC_OVERRIDE})

_VERSION: Final = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
_CAPBSET_READ: Final = 23
_CAPBSET_DROP: Final = 24
_SET_NO_NEW_PRIVS: Final = 38
_CAP_AMBIENT: Final = 47
_CAP_AMBIENT_CLEAR_ALL: Final = 4
_MOST_CAPABILITIES: Final = 64

# Private memory and huge pages, not what is shared: that is the guests'.
_CORE_FILTER: Final = 0x31
_THREADS: Final = "OPENBLAS_NUM_THREADS"

_log = logging.getLogger(__name__)
_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    """Effective, permitted and inheritable; the low words, then the high ones."""

    _fields_ = (("words", ctypes.c_uint32 * 6),)


def environment() -> dict[str, str]:
    """The environment for a process that is to give up rights.

    They belong to threads, and NumPy would start some before anybody could give up any.
    """
    return os.environ | {_THREADS: "1"}


def keep_for_manager() -> None:
    """Keep what ports need, of what we have. Raises OSError.

    To be called before workers are started, and before threads are.
    """
    os.environ[_THREADS] = "1"  # of workers
    _bound(_FOR_WORKERS)
    dropped = _drop_all_but(capability.bit for capability in KEPT)
    others = len(list(Path("/proc/self/task").iterdir())) - 1
    if dropped and others:
        text = "%d threads of libraries keep the capabilities that we had (set %s=1)"
        _log.warning(text, others, _THREADS)


def give_up() -> None:
    """Keep nothing. Raises OSError.

    Workers stay dumpable, though: else the manager could not read how one ended, in
    /proc/PID/stat, without CAP_SYS_PTRACE, which lets one read everybody's memory. What
    must not be in a core file is guests' memory.
    """
    with contextlib.suppress(FileNotFoundError):  # a kernel that writes no core files
        Path("/proc/self/coredump_filter").write_text(f"{_CORE_FILTER:#x}")
    _drop_all_but(())


def _bound(kept: frozenset[int]) -> None:
    """Limit what programs that root runs may get, if we have CAP_SETPCAP."""
    for bit in range(_MOST_CAPABILITIES):
        if _libc.prctl(_CAPBSET_READ, bit, 0, 0, 0) < 0:
            return  # the kernel knows no more of them
        if bit not in kept:
            _libc.prctl(_CAPBSET_DROP, bit, 0, 0, 0)


def _drop_all_but(bits: Iterable[int]) -> bool:
    """Drop the others, of this thread and of what it starts; whether there were any."""
    header, sets = _Header(_VERSION, 0), _Sets()
    _check(_libc.capget(ctypes.byref(header), ctypes.byref(sets)))
    kept, dropped = sum(1 << bit for bit in bits), 0
    for high in (0, 1):
        effective, permitted, inheritable = (3 * high + n for n in range(3))
        word = kept >> 32 * high & 0xFFFFFFFF
        dropped |= sets.words[permitted] & ~word
        sets.words[permitted] &= word
        sets.words[effective] = sets.words[permitted]
        sets.words[inheritable] = 0
    _libc.prctl(_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _check(_libc.capset(ctypes.byref(header), ctypes.byref(sets)))
    _check(_libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    return bool(dropped)


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        message = f"cannot give up capabilities: {errno_name(OSError(number, ''))}"
        raise OSError(number, message)
