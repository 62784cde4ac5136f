"""A ring of system calls (io_uring): a burst of frames for the price of one call.

Numba-free; `uring_data` has the jitted half. Each worker has one of its own, from when
the first port asks for it. A request means the descriptors and the memory of whoever
submits it, so a ring can be neither shared nor inherited. Nor need it be: every request
says that it must not wait (RWF_NOWAIT), so all are completed when the call returns, and
between two bursts there is nothing in the ring. A worker that dies takes no more with it
than one that dies between two calls.

A ring writes to what is open and does nothing else, whoever gets hold of it: it is
restricted to that (Linux 5.10). Filters of system calls would not see what it is asked.

linux/io_uring.h; io_uring_setup(2), io_uring_enter(2).
"""

import ctypes
import errno
import mmap
import os
import struct
from typing import Final

import numpy as np

from ports.burst import BURST_SIZE
from ports.errors import errno_name

_SETUP: Final = 425
_REGISTER: Final = 427
_SETUP_DISABLED: Final = 1 << 6
_REGISTER_RESTRICTIONS: Final = 11
_REGISTER_ENABLE: Final = 12
_RESTRICT_TO_OP: Final = 1
_RESTRICTION: Final = "HB13x"  # struct io_uring_restriction
_OP_WRITEV: Final = 2
_RWF_NOWAIT: Final = 8
_OFFSET_RINGS: Final = 0
_OFFSET_REQUESTS: Final = 0x10000000
# struct io_uring_params: ten words, of which the first two are the sizes; then where in
# the mapping the parts of the two rings are, ten words each.
_PARAMS: Final = "30I"
_FLAGS: Final = 2
_REQUEST_PLACES: Final = 10
_RESULT_PLACES: Final = 20
_HEAD, _TAIL, _MASK = 0, 1, 2  # words of both
_ARRAY: Final = 6
_RESULTS: Final = 5

REQUESTS: Final = BURST_SIZE  # places; a power of two

# struct io_uring_sqe, as far as a write needs it.
REQUEST: Final = np.dtype(
    [
        ("opcode", "u1"),
        ("flags", "u1"),
        ("priority", "<u2"),
        ("fd", "<i4"),
        ("offset", "<i8"),
        ("addr", "<i8"),  # of SEGMENT rows
        ("len", "<u4"),  # how many
        ("rw_flags", "<u4"),
        ("user_data", "<i8"),
        ("padding", "<i8", (3,)),
    ]
)

# struct io_uring_cqe.
RESULT: Final = np.dtype([("user_data", "<i8"), ("result", "<i4"), ("flags", "<u4")])

# What the data path knows of a worker's ring; addresses in that worker.
URING: Final = np.dtype(
    [
        ("fd", "<i8"),
        ("requests", "<i8"),  # REQUEST[REQUESTS]
        ("request_tail", "<i8"),
        ("results", "<i8"),  # RESULT[]
        ("result_head", "<i8"),
        ("result_tail", "<i8"),
        ("result_mask", "<i8"),
    ]
)

_CAUSES: Final = {
    errno.EPERM: "it is forbidden (look at sysctl kernel.io_uring_disabled and seccomp)",
    errno.ENOSYS: "the kernel has none",
    errno.EINVAL: "the kernel cannot restrict it to writes (Linux 5.10 can)",
    errno.ENOMEM: "no memory may be locked for it (raise ulimit -l)",
}

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Uring:
    """A ring for the data path, as long as this lives. Raises OSError."""

    def __init__(self) -> None:
        fd, params = _set_up()
        requests, results = params[0], params[1]
        places = params[_REQUEST_PLACES:_RESULT_PLACES]
        replies = params[_RESULT_PLACES:]
        array_end = places[_ARRAY] + 4 * requests
        length = max(array_end, replies[_RESULTS] + RESULT.itemsize * results)
        try:
            self._rings = mmap.mmap(fd, length, offset=_OFFSET_RINGS)
            self._requests = mmap.mmap(
                fd, REQUEST.itemsize * requests, offset=_OFFSET_REQUESTS
            )
        except OSError:
            os.close(fd)
            raise
        # Place n of the ring always holds request n.
        order = np.frombuffer(self._rings, "<u4", requests, places[_ARRAY])
        order[:] = range(requests)
        rows = np.frombuffer(self._requests, REQUEST)
        rows["opcode"], rows["rw_flags"] = _OP_WRITEV, _RWF_NOWAIT
        begin = np.frombuffer(self._rings, np.uint8).ctypes.data
        self._record = np.zeros(1, URING)
        record = self._record[0]
        record["fd"], record["requests"] = fd, rows.ctypes.data
        record["request_tail"] = begin + places[_TAIL]
        record["results"] = begin + replies[_RESULTS]
        record["result_head"] = begin + replies[_HEAD]
        record["result_tail"] = begin + replies[_TAIL]
        record["result_mask"] = results - 1

    @property
    def address(self) -> int:
        """Where the data path finds it: its URING record."""
        return int(self._record.ctypes.data)

    def close(self) -> None:
        """Give it back; nothing may use it any more."""
        self._rings.close()
        self._requests.close()
        os.close(int(self._record[0]["fd"]))


def missing(fd: int) -> str:
    """Why a tap's descriptor cannot be written to by a ring; nothing if it can."""
    try:
        ring, _ = _set_up()
    except OSError as error:
        return _CAUSES.get(error.errno or 0, errno_name(error))
    os.close(ring)
    try:
        os.pwritev(fd, [b"?"], 0, _RWF_NOWAIT)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return "this kernel's taps would have it wait (Linux 5.11 does better)"
    return ""


def _set_up() -> tuple[int, tuple[int, ...]]:
    """Make a ring that can only write; its descriptor and parameters."""
    words = [0] * (struct.calcsize(_PARAMS) // 4)
    words[_FLAGS] = _SETUP_DISABLED
    params = ctypes.create_string_buffer(struct.pack(_PARAMS, *words))
    restriction = struct.pack(_RESTRICTION, _RESTRICT_TO_OP, _OP_WRITEV)
    fd = _call(_SETUP, REQUESTS, params)
    try:
        _call(_REGISTER, fd, _REGISTER_RESTRICTIONS, restriction, 1)
        _call(_REGISTER, fd, _REGISTER_ENABLE, None, 0)
    except OSError:
        os.close(fd)
        raise
    return fd, struct.unpack_from(_PARAMS, params)


def _call(*arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    result = int(_libc.syscall(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
