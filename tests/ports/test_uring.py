"""A ring of system calls: what it takes to have one, and that nothing stays in it."""

import ctypes
import errno
import fcntl
import os
import subprocess
import sys

import numpy as np
import pytest

from ports import uring, uring_data
from ports.burst import BURST_SIZE, SEGMENT
from ports.uring import Uring
from ports.views import uring_at
from tests import requirements
from tests.forbid import FORBID, ROOT


@pytest.fixture
def ring():
    requirements.require_io_uring()
    it = Uring()
    yield uring_at(it.address, 0)
    it.close()


@pytest.fixture
def pipe():
    ends = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    yield ends
    for end in ends:
        os.close(end)


def queue(ring, fds, words):
    """Queue a write of each word; what has to stay alive."""
    data = [np.frombuffer(word, np.uint8) for word in words]
    rows = np.zeros(len(words), SEGMENT)
    for n, (fd, piece) in enumerate(zip(fds, data, strict=True)):
        rows[n]["addr"], rows[n]["len"] = piece.ctypes.data, piece.size
        at = rows.ctypes.data + n * SEGMENT.itemsize
        uring_data.queue_write(ring, n, fd, at, 1)
    return data, rows


def words_at(address, length=4):
    return (ctypes.c_char * length).from_address(address)


def results(ring, count):
    return [uring_data.take_result(ring) for _ in range(count)]


def test_writes_are_made_in_their_order_and_say_what_became_of_them(ring, pipe):
    words = [bytes([n]) * (n + 1) for n in range(BURST_SIZE)]
    for _ in range(5):  # round the rings more than once
        keep = queue(ring, [pipe[1]] * 16, words[:16])
        assert uring_data.submit(ring, 16) == 16
        assert results(ring, 16) == list(range(1, 17))
        assert [os.read(pipe[0], 4096) for _ in range(16)] == words[:16]
        del keep


def test_what_fails_does_not_keep_the_others(ring, pipe):
    read_end, write_end = pipe
    words = [b"a", b"b", b"c"]
    keep = queue(ring, [write_end, read_end, write_end], words)
    assert uring_data.submit(ring, 3) == 3
    assert results(ring, 3) == [1, -errno.EBADF, 1]
    assert os.read(read_end, 4096) == b"a"
    assert os.read(read_end, 4096) == b"c"
    del keep


def test_a_write_that_would_wait_comes_back_at_once(ring):
    read_end, write_end = os.pipe()  # one that does wait
    try:
        full = fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ)
        keep = queue(ring, [write_end] * 3, [bytes(full), b"b", b"c"])
        assert uring_data.submit(ring, 3) == 3
        assert results(ring, 3) == [full, -errno.EAGAIN, -errno.EAGAIN]
        assert len(os.read(read_end, 2 * full)) == full
        # Nor does it come later.
        assert uring_data.submit(ring, 0) == 0
        os.set_blocking(read_end, False)
        with pytest.raises(BlockingIOError):
            os.read(read_end, 1)
        del keep
    finally:
        os.close(read_end)
        os.close(write_end)


def test_what_the_kernel_does_not_take_is_taken_back(ring, pipe):
    keep = queue(ring, [pipe[1]] * 3, [b"a", b"b", b"c"])
    fd, ring["fd"] = int(ring["fd"]), pipe[1]
    assert uring_data.submit(ring, 3) == 0
    ring["fd"] = fd
    keep = queue(ring, [pipe[1]], [b"d"])
    assert uring_data.submit(ring, 1) == 1
    assert results(ring, 1) == [1]
    assert os.read(pipe[0], 4096) == b"d"
    del keep


@pytest.mark.parametrize(
    "operation",
    [9, 16, 18, 23, 45],
    ids=["sendmsg", "connect", "openat", "write", "socket"],
)
def test_a_ring_does_nothing_but_write(ring, pipe, operation):
    keep = queue(ring, [pipe[1]], [b"a"])
    place = int(np.frombuffer(words_at(int(ring["request_tail"])), "<u4")[0])
    requests = np.frombuffer(
        words_at(int(ring["requests"]), uring.REQUESTS * uring.REQUEST.itemsize),
        uring.REQUEST,
    )
    row = requests[place % uring.REQUESTS]
    row["opcode"], before = operation, row["opcode"]
    assert uring_data.submit(ring, 1) == 1
    assert results(ring, 1) == [-errno.EACCES]
    row["opcode"] = before
    del keep


def test_a_file_that_would_wait_lacks_something():
    requirements.require_io_uring()
    fd = os.memfd_create("waits")
    try:
        assert "Linux 5.11" in uring.missing(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("error", "found"),
    [(errno.EPERM, "forbidden"), (errno.ENOSYS, "has none"), (errno.EMFILE, "EMFILE")],
)
def test_a_kernel_that_has_none_or_forbids_it_is_told_apart(error, found):
    code = "from ports import uring; print(uring.missing(0))"
    command = [*FORBID, "io_uring_setup", str(error), sys.executable, "-c", code]
    told = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert found in told.stdout
