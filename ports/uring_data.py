"""The data half of a ring of system calls: queue writes, submit them, read what became.

Everything here happens in one thread, and requests are completed within the call that
submits them. So there is nothing to order but the tail, which the kernel acquires.
"""

from typing import Final

from ports.native import (
    Record,
    jit,
    load_u32,
    store_release_u32,
    uring_enter,
)
from ports.uring import REQUESTS
from ports.views import request_at, result_at

_U32: Final = 0xFFFFFFFF
_PLACES: Final = REQUESTS - 1


@jit
def queue_write(uring: Record, at: int, fd: int, pieces: int, n_pieces: int) -> None:
    """Make write `at` of a burst: `n_pieces` SEGMENT rows at address `pieces` to `fd`."""
    place = (load_u32(int(uring["request_tail"])) + at) & _PLACES
    request = request_at(int(uring["requests"]), place)
    request["fd"] = fd
    request["addr"] = pieces
    request["len"] = n_pieces


@jit
def submit(uring: Record, n: int) -> int:
    """Have the kernel do the first `n` writes, in order; how many results there are.

    What it does not take (it has no memory) is taken back.
    """
    tail = int(uring["request_tail"])
    begin = load_u32(tail)
    store_release_u32(tail, (begin + n) & _U32)
    done = 0
    while done < n:
        got = uring_enter(int(uring["fd"]), n - done)
        if got <= 0:
            break
        done += got
    store_release_u32(tail, (begin + done) & _U32)
    head = load_u32(int(uring["result_head"]))
    return (load_u32(int(uring["result_tail"])) - head) & _U32


@jit
def take_result(uring: Record) -> int:
    """What the next write returned: bytes, or -errno."""
    head = load_u32(int(uring["result_head"]))
    row = result_at(int(uring["results"]), head & int(uring["result_mask"]))
    result = int(row["result"])
    store_release_u32(int(uring["result_head"]), (head + 1) & _U32)
    return result
