"""How the manager hears at once that a worker has died, however large it was.

A pidfd becomes readable when the kernel has taken all of a process apart, which takes
tens of milliseconds, or a second with the page tables of large guests. Long before that
it gives back what the dying thread holds of robust mutexes (set_robust_list(2)), and that
thread does nothing any more. So each worker's main thread holds such a mutex in its WORKER
record, and a thread of the manager waits until the kernel has changed its lock word.

It waits by futex(2) and not by locking: libc follows and writes pointers that lie in the
mutex, which a worker that somebody has taken over may have written.
"""

import ctypes
from collections.abc import Callable
from threading import Thread
from typing import Final

import numpy as np
from numpy.typing import NDArray

_SHARED: Final = 1  # PTHREAD_PROCESS_SHARED
_ROBUST: Final = 1  # PTHREAD_MUTEX_ROBUST
_FUTEX: Final = 202  # of x86-64
_WAIT: Final = 0
_WAITERS: Final = 0x80000000  # linux/futex.h
_DIED: Final = 0x40000000

_libc: Final = ctypes.CDLL(None)


def prepare(workers: NDArray[np.void], number: int) -> None:
    """Make the mutex of a worker that is about to start."""
    attributes = ctypes.c_int64()
    _libc.pthread_mutexattr_init(ctypes.byref(attributes))
    _libc.pthread_mutexattr_setpshared(ctypes.byref(attributes), _SHARED)
    _libc.pthread_mutexattr_setrobust(ctypes.byref(attributes), _ROBUST)
    _libc.pthread_mutex_init(_mutex(workers, number), ctypes.byref(attributes))


def hold(workers: NDArray[np.void], number: int) -> None:
    """Hold our mutex until this thread ends, and have the kernel wake who waits then."""
    _libc.pthread_mutex_lock(_mutex(workers, number))
    _word(workers, number).value |= _WAITERS


def watch(workers: NDArray[np.void], number: int, ended: Callable[[], object]) -> None:
    """Call `ended`, in a thread of its own, when the worker that holds it has died."""
    word = _word(workers, number)
    alive = word.value
    address, unchanged = ctypes.byref(word), ctypes.c_uint32(alive)

    def wait() -> None:
        while word.value == alive and not alive & _DIED:
            _libc.syscall(_FUTEX, address, _WAIT, unchanged, None, None, 0)
        ended()

    Thread(target=wait, daemon=True).start()


def _word(workers: NDArray[np.void], number: int) -> ctypes.c_uint32:
    """Its lock word: who holds it, and two bits. The first of a pthread_mutex_t."""
    return ctypes.c_uint32.from_address(_mutex(workers, number).value or 0)


def _mutex(workers: NDArray[np.void], number: int) -> ctypes.c_void_p:
    field = workers["life"]
    return ctypes.c_void_p(field.ctypes.data + number * field.strides[0])
