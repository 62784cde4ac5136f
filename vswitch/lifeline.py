"""How the manager hears at once that a worker has died, however large it was.

A pidfd becomes readable when the kernel has taken all of a process apart, which takes
tens of milliseconds, or a second with the page tables of large guests. Long before that
it gives back what the dying thread holds of robust mutexes (set_robust_list(2)), and that
thread does nothing any more. So each worker's main thread holds such a mutex in its WORKER
record, and a thread of the manager waits for it.
"""

import ctypes
from collections.abc import Callable
from threading import Thread
from typing import Final

import numpy as np
from numpy.typing import NDArray

_SHARED: Final = 1  # PTHREAD_PROCESS_SHARED
_ROBUST: Final = 1  # PTHREAD_MUTEX_ROBUST

_libc: Final = ctypes.CDLL(None)


def prepare(workers: NDArray[np.void], number: int) -> None:
    """Make the mutex of a worker that is about to start."""
    attributes = ctypes.c_int64()
    _libc.pthread_mutexattr_init(ctypes.byref(attributes))
    _libc.pthread_mutexattr_setpshared(ctypes.byref(attributes), _SHARED)
    _libc.pthread_mutexattr_setrobust(ctypes.byref(attributes), _ROBUST)
    _libc.pthread_mutex_init(_mutex(workers, number), ctypes.byref(attributes))


def hold(workers: NDArray[np.void], number: int) -> None:
    """Hold our mutex until this thread ends."""
    _libc.pthread_mutex_lock(_mutex(workers, number))


def watch(workers: NDArray[np.void], number: int, ended: Callable[[], object]) -> None:
    """Call `ended`, in a thread of its own, when the worker that holds it has died."""
    mutex = _mutex(workers, number)

    def wait() -> None:
        _libc.pthread_mutex_lock(mutex)
        _libc.pthread_mutex_unlock(mutex)
        ended()

    Thread(target=wait, daemon=True).start()


def _mutex(workers: NDArray[np.void], number: int) -> ctypes.c_void_p:
    field = workers["life"]
    return ctypes.c_void_p(field.ctypes.data + number * field.strides[0])
