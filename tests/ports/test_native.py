"""Each native operation does in compiled code what its Python twin does."""

import errno
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ports import native

SIZES = (1, 2, 4, 8)
LENGTHS = (0, 1, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 512, 513, 1500, 9000)


@native.jit
def jit_copy(dst, src, length):
    native.copy_bytes(dst, src, length)


@native.jit
def jit_loads(addr):
    return (
        native.load_u8(addr),
        native.load_u16(addr),
        native.load_u32(addr),
        native.load_u64(addr),
        native.load_acquire_u16(addr),
        native.load_acquire_u32(addr),
        native.load_acquire_u64(addr),
        native.load_any_u64(addr + 3),
        native.load_any_u16(addr + 1),
    )


@native.jit
def jit_stores(addr, value):
    native.store_u8(addr, value)
    native.store_u16(addr + 8, value)
    native.store_u32(addr + 16, value)
    native.store_u64(addr + 24, value)
    native.store_release_u16(addr + 32, value)
    native.store_release_u32(addr + 40, value)
    native.store_release_u64(addr + 48, value)
    native.store_any_u16(addr + 57, value)
    native.store_any_u32(addr + 65, value)
    native.store_any_u64(addr + 73, value)


@native.jit
def jit_or(addr, bits):
    native.or_u8(addr, bits)


@native.jit
def jit_swaps(addr):
    first = native.swap_if_u64(addr, 0, 5)
    second = native.swap_if_u64(addr, 0, 9)
    third = native.swap_if_u32(addr + 8, 0, 6)
    fourth = native.swap_if_u32(addr + 8, 6, 7)
    return first, second, third, fourth, native.add_u64(addr, -2)


@native.jit
def jit_wait(addr, wanted):
    while native.load_acquire_u16(addr) != wanted:
        native.pause()
    return True


@native.jit
def jit_read(fd, addr, length):
    return native.read_fd(fd, addr, length)


@native.jit
def jit_signal(fd):
    native.eventfd_signal(fd)


@native.jit
def jit_epoll(fd, events):
    return native.wait_epoll(fd, events, 1, 0)


@native.jit
def jit_alarm(timer):
    native.set_alarm(timer)


@native.jit
def jit_clock(timespec):
    return native.monotonic_ns(timespec)


def twin(function):
    return getattr(function, "py_func", function)


@pytest.mark.parametrize("length", LENGTHS)
def test_copy_bytes_copies_exactly_its_length(length):
    source = np.random.default_rng(length).integers(1, 255, 9100).astype(np.uint8)
    target = np.zeros(9200, np.uint8)
    jit_copy(target.ctypes.data + 3, source.ctypes.data + 5, length)
    assert bytes(target[3 : 3 + length]) == bytes(source[5 : 5 + length])
    assert not target[:3].any()
    assert not target[3 + length :].any()


def test_loads_agree_with_their_twins():
    memory = np.arange(200, 264).astype(np.uint8)
    addr = memory.ctypes.data
    assert jit_loads(addr) == twin(jit_loads)(addr)


@pytest.mark.parametrize("value", [0, 1, -1, 0x1122334455667788, -(1 << 62)])
def test_stores_agree_with_their_twins(value):
    compiled, plain = np.zeros(96, np.uint8), np.zeros(96, np.uint8)
    jit_stores(compiled.ctypes.data, value)
    twin(jit_stores)(plain.ctypes.data, value)
    assert bytes(compiled) == bytes(plain)


def test_swaps_agree_with_their_twins():
    compiled, plain = np.zeros(2, np.int64), np.zeros(2, np.int64)
    expected = (0, 5, 0, 6, 5)
    assert jit_swaps(compiled.ctypes.data) == expected
    assert twin(jit_swaps)(plain.ctypes.data) == expected
    assert list(compiled) == list(plain) == [3, 7]


def test_or_agrees_with_its_twin():
    compiled, plain = np.full(3, 0x11, np.uint8), np.full(3, 0x11, np.uint8)
    jit_or(compiled.ctypes.data + 1, 0x86)
    twin(jit_or)(plain.ctypes.data + 1, 0x86)
    assert list(compiled) == list(plain) == [0x11, 0x97, 0x11]


def test_a_wait_on_an_index_ends_when_another_thread_stores_it():
    # With a plain load the compiler may read once and wait for ever.
    word = np.zeros(1, np.int64)
    waiter = threading.Thread(target=jit_wait, args=(word.ctypes.data, 7), daemon=True)
    waiter.start()
    native.store_release_u16(word.ctypes.data, 7)
    waiter.join(30)
    assert not waiter.is_alive()


def test_read_fd_returns_the_errno():
    memory = np.zeros(8, np.uint8)
    reader, writer = os.pipe2(os.O_NONBLOCK)
    try:
        assert jit_read(reader, memory.ctypes.data, 8) == -11  # EAGAIN
        os.write(writer, b"abc")
        assert jit_read(reader, memory.ctypes.data, 8) == 3
        assert bytes(memory[:3]) == b"abc"
    finally:
        os.close(reader)
        os.close(writer)


def test_eventfd_signal_counts_and_never_blocks():
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        jit_signal(fd)
        twin(jit_signal)(fd)
        assert os.eventfd_read(fd) == 2
    finally:
        os.close(fd)


@pytest.mark.parametrize("wait", [jit_epoll, twin(jit_epoll)], ids=["jit", "twin"])
def test_wait_epoll_says_how_many_events_there_are_or_the_errno(wait):
    memory = np.zeros(12, np.uint8)
    fd = os.eventfd(0)
    try:
        with select.epoll() as epoll:
            epoll.register(fd, select.EPOLLIN | select.EPOLLET)
            assert wait(epoll.fileno(), memory.ctypes.data) == 0
            os.eventfd_write(fd, 1)
            assert wait(epoll.fileno(), memory.ctypes.data) == 1
            assert wait(epoll.fileno(), memory.ctypes.data) == 0  # an edge comes once
            assert wait(fd, memory.ctypes.data) == -errno.EINVAL
    finally:
        os.close(fd)


@pytest.mark.parametrize("clock", [jit_clock, twin(jit_clock)], ids=["jit", "twin"])
def test_monotonic_ns_is_that_of_python(clock):
    timespec = np.zeros(2, np.int64)
    before = time.monotonic_ns()
    assert before <= clock(timespec.ctypes.data) <= time.monotonic_ns()


@pytest.mark.parametrize("set_", [jit_alarm, twin(jit_alarm)], ids=["jit", "twin"])
def test_set_alarm_sets_the_timer_of_the_process(set_):
    timer = np.array([0, 0, 1000, 500_000], np.int64)
    before = signal.getitimer(signal.ITIMER_REAL)  # this test's own deadline
    try:
        set_(timer.ctypes.data)
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 900 < left <= 1000.5
        assert interval == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_map_fixed_refuses_to_replace_a_mapping():
    fd = os.memfd_create("test")
    addr = 20 << 40
    try:
        os.ftruncate(fd, 4096)
        assert native.map_fixed(addr, 4096, fd, 0) == 0
        assert native.map_fixed(addr, 4096, fd, 0) == -17  # EEXIST
        native.store_u64(addr, 77)
        assert os.pread(fd, 1, 0) == b"M"
        assert native.unmap(addr, 4096) == 0
    finally:
        os.close(fd)


TOUCHES_WHAT_IS_GONE = """
import os, sys
from ports import native

@native.jit
def touch(addr):
    native.store_u64(addr, 7)
    return native.load_u64(addr)

begin, length = 20 << 40, 8192
fd = os.memfd_create("test")
os.ftruncate(fd, length)
assert native.map_fixed(begin, length, fd, 0) == 0
assert touch(begin + 4096) == 7
asked = []

def repair(addr):
    asked.append(addr - begin)
    return sys.argv[1] == "ours" and native.replace_by_zeroes(begin, length) == 0

keep = native.catch_bus_errors(repair)
os.ftruncate(fd, 0)
print(touch(begin + 4096), asked, flush=True)
"""


@pytest.fixture
def touch_what_is_gone(tmp_path):
    program = tmp_path / "touch.py"  # a file, or its jitted code could not be kept
    program.write_text(TOUCHES_WHAT_IS_GONE)

    def run(whose):
        return subprocess.run(
            [sys.executable, str(program), whose],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_a_fault_that_is_repaired_is_survived(touch_what_is_gone):
    done = touch_what_is_gone("ours")
    assert (done.returncode, done.stdout) == (0, "7 [4096]\n"), done.stderr


def test_a_fault_that_is_not_repaired_is_fatal(touch_what_is_gone):
    assert touch_what_is_gone("another's").returncode == -signal.SIGBUS
