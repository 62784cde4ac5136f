"""The only file that knows Numba, LLVM and libc.

Every operation is a plain Python function (a ctypes twin) plus an overload that
compiles to an instruction or a call, so that with NUMBA_DISABLE_JIT=1 the whole data
path runs in the interpreter. `tests/ports/test_native.py` holds the pairs against each other.

Memory shared with guests is touched only through these functions. Loads are atomic:
the compiler may neither repeat nor hoist them, so a value that was checked is the value
that is used. Addresses are plain integers.
"""

import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from ports.cache import cache_dir

numba.config.CACHE_DIR = str(cache_dir())

Record = np.void
Records = np.ndarray[Any, np.dtype[Any]]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_jitted: Final[list[Any]] = []

# One decorator for all, and the compiler settings with it.
_njit = njit(cache=True, nogil=True, error_model="numpy")


def jit(function: _Function) -> _Function:
    """Compile a function of the data path at its first call."""
    compiled = _njit(function)
    if not numba.config.DISABLE_JIT:
        _without_literals(compiled)
    _jitted.append(compiled)
    return cast("_Function", compiled)


def _without_literals(compiled: Any) -> None:
    """Let callers see one version for all integers.

    A variable that begins as a constant has the type of that constant at first, so
    Numba would compile what is called with it twice, and use one of them.
    """
    resolve = compiled.get_call_template

    def without(args: Any, kws: Any) -> Any:
        named = {name: types.unliteral(kind) for name, kind in kws.items()}
        return resolve([types.unliteral(kind) for kind in args], named)

    compiled.get_call_template = without


def jit_progress() -> tuple[int, int]:
    """How many jitted functions are ready to run, and how many there are."""
    if numba.config.DISABLE_JIT:
        return len(_jitted), len(_jitted)
    return sum(bool(f.signatures) for f in _jitted), len(_jitted)


# --- the instructions ---------------------------------------------------------------

_I64: Final = ir.IntType(64)
_VOID_PTR: Final = ir.IntType(8).as_pointer()


def _pointer(builder: Any, addr: Any, bits: int) -> Any:
    return builder.inttoptr(addr, ir.IntType(bits).as_pointer())


def _load(bits: int, ordering: str) -> Any:
    @intrinsic
    def load(_context: Any, addr: Any) -> Any:
        def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            pointer = _pointer(builder, args[0], bits)
            value = builder.load_atomic(
                pointer, ordering, bits // 8, typ=ir.IntType(bits)
            )
            return builder.zext(value, _I64) if bits < 64 else value

        return types.int64(types.int64), codegen

    return load


def _store(bits: int, ordering: str) -> Any:
    @intrinsic
    def store(_context: Any, addr: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            value = args[1]
            if bits < 64:
                value = builder.trunc(value, ir.IntType(bits))
            pointer = _pointer(builder, args[0], bits)
            builder.store_atomic(value, pointer, ordering, bits // 8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return store


def _plain_store(bits: int) -> Any:
    """A store that may be unaligned; for frame headers in guest buffers."""

    @intrinsic
    def store(_context: Any, addr: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            value = args[1]
            if bits < 64:
                value = builder.trunc(value, ir.IntType(bits))
            builder.store(value, _pointer(builder, args[0], bits), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return store


def _plain_load(bits: int) -> Any:
    """A load that may be unaligned; volatile by way of an atomic byte would be slow.

    x86 does it in one access. The value goes through an opaque register barrier (an
    atomic fence of the compiler alone), so that it is never fetched twice.
    """

    @intrinsic
    def load(_context: Any, addr: Any) -> Any:
        def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            pointer = _pointer(builder, args[0], bits)
            value = builder.load(pointer, align=1, typ=ir.IntType(bits))
            builder.fence("acq_rel", targetscope="singlethread")
            return builder.zext(value, _I64) if bits < 64 else value

        return types.int64(types.int64), codegen

    return load


def _move(size: int) -> Any:
    """Copy `size` bytes as one vector; neither side needs alignment."""

    @intrinsic
    def move(_context: Any, dst: Any, src: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            vector = ir.VectorType(ir.IntType(8), size)
            source = builder.inttoptr(args[1], vector.as_pointer())
            target = builder.inttoptr(args[0], vector.as_pointer())
            builder.store(builder.load(source, align=1, typ=vector), target, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return move


@intrinsic
def _fence(_context: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _exchange(bits: int) -> Any:
    @intrinsic
    def exchange(_context: Any, addr: Any, expected: Any, new: Any) -> Any:
        def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            word = ir.IntType(bits)
            expected, new = (
                builder.trunc(value, word) if bits < 64 else value for value in args[1:]
            )
            pointer = _pointer(builder, args[0], bits)
            pair = builder.cmpxchg(pointer, expected, new, "acq_rel", "acquire")
            before = builder.extract_value(pair, 0)
            return builder.zext(before, _I64) if bits < 64 else before

        return types.int64(types.int64, types.int64, types.int64), codegen

    return exchange


@intrinsic
def _add(_context: Any, addr: Any, value: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0], 64)
        return builder.atomic_rmw("add", pointer, args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _or(_context: Any, addr: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0], 8)
        bits = builder.trunc(args[1], ir.IntType(8))
        builder.atomic_rmw("or", pointer, bits, "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _rdtsc(_context: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        kind = ir.FunctionType(_I64, [])
        return builder.call(_declare(builder, kind, "llvm.readcyclecounter"), [])

    return types.int64(), codegen


@intrinsic
def _pause(_context: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(_declare(builder, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


def _prefetch(for_write: int) -> Any:
    @intrinsic
    def prefetch(_context: Any, addr: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            word = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [_VOID_PTR, word, word, word])
            function = _declare(builder, kind, "llvm.prefetch.p0")
            pointer = _pointer(builder, args[0], 8)
            builder.call(function, [pointer, word(for_write), word(3), word(1)])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return prefetch


def _declare(builder: Any, kind: Any, name: str) -> Any:
    return cgutils.get_or_insert_function(builder.module, kind, name)


_load_u8: Final = _load(8, "monotonic")
_load_u16: Final = _load(16, "monotonic")
_load_u32: Final = _load(32, "monotonic")
_load_u64: Final = _load(64, "monotonic")
_load_acquire_u16: Final = _load(16, "acquire")
_load_acquire_u32: Final = _load(32, "acquire")
_load_acquire_u64: Final = _load(64, "acquire")
_load_any_u64: Final = _plain_load(64)
_load_any_u16: Final = _plain_load(16)
_store_u8: Final = _store(8, "monotonic")
_store_u16: Final = _store(16, "monotonic")
_store_u32: Final = _store(32, "monotonic")
_store_u64: Final = _store(64, "monotonic")
_store_release_u16: Final = _store(16, "release")
_store_release_u32: Final = _store(32, "release")
_store_release_u64: Final = _store(64, "release")
_store_any_u64: Final = _plain_store(64)
_store_any_u32: Final = _plain_store(32)
_store_any_u16: Final = _plain_store(16)
_swap_if_u32: Final = _exchange(32)
_swap_if_u64: Final = _exchange(64)
_move_8: Final = _move(8)
_move_16: Final = _move(16)
_move_32: Final = _move(32)
_move_64: Final = _move(64)
_prefetch_read: Final = _prefetch(0)
_prefetch_write: Final = _prefetch(1)


def records_at(dtype: "np.dtype[Any]") -> Callable[[int, int], Record]:
    """Make a function (address of a table, row) -> that row as a record.

    In jitted code the result is a bare pointer: unlike an array it has no reference
    count, whose atomic updates at every call cost more than a frame's copy.
    """
    kind = numba.from_dtype(dtype)
    size = dtype.itemsize

    def record(table: int, row: int) -> Record:
        memory = (ctypes.c_char * size).from_address(table + row * size)
        return cast("Record", np.frombuffer(memoryview(memory), dtype)[0])

    @intrinsic
    def pointer(_context: Any, addr: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.int64), codegen

    @overload(record, strict=False)
    def _record(table: Any, row: Any) -> Any:
        return lambda table, row: pointer(table + row * size)

    return record


# --- libc ---------------------------------------------------------------------------

_libc: Final = ctypes.CDLL(None, use_errno=True)
_EINTR: Final = errno.EINTR
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.sched_yield.argtypes = []

_c_read: Final = types.ExternalFunction(
    "read", types.int64(types.int32, types.int64, types.int64)
)
_c_writev: Final = types.ExternalFunction(
    "writev", types.int64(types.int32, types.int64, types.int32)
)
_c_sendmmsg: Final = types.ExternalFunction(
    "sendmmsg", types.int32(types.int32, types.int64, types.int32, types.int32)
)
_c_send: Final = types.ExternalFunction(
    "send", types.int64(types.int32, types.int64, types.int64, types.int32)
)
_c_recv: Final = types.ExternalFunction(
    "recv", types.int64(types.int32, types.int64, types.int64, types.int32)
)
_c_syscall_6: Final = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))
_c_eventfd_write: Final = types.ExternalFunction(
    "eventfd_write", types.int32(types.int32, types.int64)
)
_c_epoll_wait: Final = types.ExternalFunction(
    "epoll_wait", types.int32(types.int32, types.int64, types.int32, types.int32)
)
_c_clock_gettime: Final = types.ExternalFunction(
    "clock_gettime", types.int32(types.int32, types.int64)
)
_c_setitimer: Final = types.ExternalFunction(
    "setitimer", types.int32(types.int32, types.int64, types.int64)
)
_c_sched_yield: Final = types.ExternalFunction("sched_yield", types.int32())
_c_errno: Final = types.ExternalFunction("__errno_location", types.int64())
_c_memcpy: Final = types.ExternalFunction(
    "memcpy", types.int64(types.int64, types.int64, types.int64)
)

MAP_FIXED_NOREPLACE: Final = 0x100000
_PROT_READ_WRITE: Final = 3
_MAP_SHARED: Final = 1
# Private, fixed, anonymous, and without a promise of as much memory.
_MAP_INSTEAD: Final = 0x02 | 0x10 | 0x20 | 0x4000


def map_fixed(addr: int, length: int, fd: int, offset: int) -> int:
    """Map a file at exactly `addr`; 0, or -errno (EEXIST: something is there)."""
    flags = _MAP_SHARED | MAP_FIXED_NOREPLACE
    got = _libc.mmap(addr, length, _PROT_READ_WRITE, flags, fd, offset)
    if got == ctypes.c_void_p(-1).value:
        return -ctypes.get_errno()
    return 0


def unmap(addr: int, length: int) -> int:
    """Take a mapping away; 0, or -errno."""
    return -ctypes.get_errno() if _libc.munmap(addr, length) else 0


def replace_by_zeroes(addr: int, length: int) -> int:
    """Put zeroes of our own in the place of a mapping; 0, or -errno."""
    got = _libc.mmap(addr, length, _PROT_READ_WRITE, _MAP_INSTEAD, -1, 0)
    return -ctypes.get_errno() if got == ctypes.c_void_p(-1).value else 0


class _SigAction(ctypes.Structure):
    """struct sigaction of glibc on x86-64."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_SA_SIGINFO: Final = 4
_SI_ADDR: Final = 16  # of siginfo_t, <bits/types/siginfo_t.h>
_Handler: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def catch_bus_errors(repair: Callable[[int], bool]) -> object:
    """Call `repair` with the address when jitted code touches memory that is gone.

    The access is tried again if that returns True; else, and where it raises, the
    process dies as it would have. The fault comes from our own loads and stores, so
    unlike in other signal handlers any code may run.

    Returns:
        What has to stay alive as long as faults are to be caught.
    """

    def handle(_number: int, info: int, _context: int) -> None:
        repaired = False
        try:
            repaired = repair(ctypes.c_int64.from_address(info + _SI_ADDR).value)
        finally:
            if not repaired:
                signal.signal(signal.SIGBUS, signal.SIG_DFL)

    handler = _Handler(handle)
    action = _SigAction(
        handler=ctypes.cast(handler, ctypes.c_void_p), flags=_SA_SIGINFO
    )
    if _libc.sigaction(signal.SIGBUS, ctypes.byref(action), None):
        raise OSError(ctypes.get_errno(), "cannot catch SIGBUS")
    return handler


# --- what the rest of the code calls ------------------------------------------------


def load_u8(addr: int) -> int:
    """Read a byte once."""
    return ctypes.c_uint8.from_address(addr).value


def load_u16(addr: int) -> int:
    """Read an aligned 16-bit word once."""
    return ctypes.c_uint16.from_address(addr).value


def load_u32(addr: int) -> int:
    """Read an aligned 32-bit word once."""
    return ctypes.c_uint32.from_address(addr).value


def load_u64(addr: int) -> int:
    """Read an aligned 64-bit word once, as a signed number."""
    return ctypes.c_int64.from_address(addr).value


def load_acquire_u16(addr: int) -> int:
    """Read 16 bits; later reads are not moved before it."""
    return ctypes.c_uint16.from_address(addr).value


def load_acquire_u32(addr: int) -> int:
    """Read 32 bits; later reads are not moved before it."""
    return ctypes.c_uint32.from_address(addr).value


def load_acquire_u64(addr: int) -> int:
    """Read 64 bits, signed; later reads are not moved before it."""
    return ctypes.c_int64.from_address(addr).value


def load_any_u64(addr: int) -> int:
    """Read 64 bits at any alignment, as a signed number."""
    return ctypes.c_int64.from_address(addr).value


def load_any_u16(addr: int) -> int:
    """Read 16 bits at any alignment."""
    return ctypes.c_uint16.from_address(addr).value


def store_u8(addr: int, value: int) -> None:
    """Write the low byte."""
    ctypes.c_uint8.from_address(addr).value = value & 0xFF


def store_u16(addr: int, value: int) -> None:
    """Write the low 16 bits, aligned."""
    ctypes.c_uint16.from_address(addr).value = value & 0xFFFF


def store_u32(addr: int, value: int) -> None:
    """Write the low 32 bits, aligned."""
    ctypes.c_uint32.from_address(addr).value = value & 0xFFFFFFFF


def store_u64(addr: int, value: int) -> None:
    """Write 64 bits, aligned."""
    ctypes.c_uint64.from_address(addr).value = value & 0xFFFFFFFFFFFFFFFF


def store_release_u16(addr: int, value: int) -> None:
    """Write 16 bits; earlier writes are visible to whoever acquires this one."""
    ctypes.c_uint16.from_address(addr).value = value & 0xFFFF


def store_release_u32(addr: int, value: int) -> None:
    """Write 32 bits; earlier writes are visible to whoever acquires this one."""
    ctypes.c_uint32.from_address(addr).value = value & 0xFFFFFFFF


def store_release_u64(addr: int, value: int) -> None:
    """Write 64 bits; earlier writes are visible to whoever acquires this one."""
    ctypes.c_uint64.from_address(addr).value = value & 0xFFFFFFFFFFFFFFFF


def store_any_u64(addr: int, value: int) -> None:
    """Write 64 bits at any alignment."""
    ctypes.c_uint64.from_address(addr).value = value & 0xFFFFFFFFFFFFFFFF


def store_any_u32(addr: int, value: int) -> None:
    """Write 32 bits at any alignment."""
    ctypes.c_uint32.from_address(addr).value = value & 0xFFFFFFFF


def store_any_u16(addr: int, value: int) -> None:
    """Write 16 bits at any alignment."""
    ctypes.c_uint16.from_address(addr).value = value & 0xFFFF


def move_8(dst: int, src: int) -> None:
    """Copy 8 bytes."""
    ctypes.memmove(dst, src, 8)


def move_16(dst: int, src: int) -> None:
    """Copy 16 bytes."""
    ctypes.memmove(dst, src, 16)


def move_32(dst: int, src: int) -> None:
    """Copy 32 bytes."""
    ctypes.memmove(dst, src, 32)


def move_64(dst: int, src: int) -> None:
    """Copy 64 bytes."""
    ctypes.memmove(dst, src, 64)


def memcpy(dst: int, src: int, length: int) -> None:
    """Copy `length` bytes by libc's own choice of instructions."""
    ctypes.memmove(dst, src, length)


def fence() -> None:
    """Order everything before against everything after (store to load included)."""


def swap_if_u32(addr: int, expected: int, new: int) -> int:
    """Store `new` if the 32-bit word holds `expected`; the word before. Acquires."""
    word = ctypes.c_uint32.from_address(addr)
    before = word.value
    if before == expected:
        word.value = new
    return before


def swap_if_u64(addr: int, expected: int, new: int) -> int:
    """Store `new` if the 64-bit word holds `expected`; the word before. Acquires."""
    word = ctypes.c_int64.from_address(addr)
    before = word.value
    if before == expected:
        word.value = new
    return before


def add_u64(addr: int, value: int) -> int:
    """Add atomically to a 64-bit word; the word before."""
    word = ctypes.c_int64.from_address(addr)
    before = word.value
    word.value = before + value
    return before


def or_u8(addr: int, bits: int) -> None:
    """Set bits of a byte atomically, after everything that was written before."""
    ctypes.c_uint8.from_address(addr).value |= bits & 0xFF


def rdtsc() -> int:
    """The CPU's cycle counter."""
    return time.perf_counter_ns()


def pause() -> None:
    """Tell the CPU that we spin."""


def sched_yield() -> None:
    """Let somebody else run on this CPU."""
    os.sched_yield()


def prefetch_read(addr: int) -> None:
    """Ask for the cache line at `addr`."""


def prefetch_write(addr: int) -> None:
    """Ask for the cache line at `addr`, to write it."""


def eventfd_signal(fd: int) -> bool:
    """Add 1 to an eventfd; a full counter or a closed fd is no error.

    Returns:
        Whether that had to wait until a signal came: somebody has filled the counter
        and made the open file, which is theirs as well, a blocking one.
    """
    failed = int(_libc.eventfd_write(fd, ctypes.c_uint64(1))) < 0
    return failed and ctypes.get_errno() == errno.EINTR


def read_fd(fd: int, addr: int, length: int) -> int:
    """Read up to `length` bytes into `addr`; bytes read, or -errno."""
    got = int(_libc.read(fd, ctypes.c_void_p(addr), ctypes.c_size_t(length)))
    return got if got >= 0 else -ctypes.get_errno()


def writev_fd(fd: int, iovecs: int, count: int) -> int:
    """Write `count` struct iovec at address `iovecs`; bytes written, or -errno."""
    got = int(_libc.writev(fd, ctypes.c_void_p(iovecs), count))
    return got if got >= 0 else -ctypes.get_errno()


_MSG_DONTWAIT: Final = 0x40


def sendmmsg_fd(fd: int, messages: int, count: int) -> int:
    """Send up to `count` struct mmsghdr at address `messages`; how many, or -errno.

    An error of any but the first ends the count before it, and is returned next time.
    """
    got = int(_libc.sendmmsg(fd, ctypes.c_void_p(messages), count, _MSG_DONTWAIT))
    return got if got >= 0 else -ctypes.get_errno()


def wake_sender(fd: int) -> int:
    """Have a socket send what is in its ring; 0, or -errno."""
    got = int(_libc.send(fd, None, ctypes.c_size_t(0), _MSG_DONTWAIT))
    return got if got >= 0 else -ctypes.get_errno()


def wake_receiver(fd: int) -> int:
    """Have a socket look at its ring of free buffers; 0, or -errno."""
    got = int(_libc.recv(fd, None, ctypes.c_size_t(0), _MSG_DONTWAIT))
    return got if got >= 0 else -ctypes.get_errno()


def wait_epoll(fd: int, events: int, room: int, timeout_ms: int) -> int:
    """Wait for events, with place for so many; how many there are, or -errno."""
    memory = ctypes.c_void_p(events)
    got = int(_libc.epoll_wait(fd, memory, room, timeout_ms))
    return got if got >= 0 else -ctypes.get_errno()


_CLOCK_MONOTONIC: Final = 1  # <bits/time.h>


def monotonic_ns(timespec: int) -> int:
    """What `time.monotonic_ns` says, by way of 16 bytes of ours at an address."""
    _libc.clock_gettime(_CLOCK_MONOTONIC, ctypes.c_void_p(timespec))
    return load_u64(timespec) * 10**9 + load_u64(timespec + 8)


_ITIMER_REAL: Final = 0  # <sys/time.h>


def set_alarm(timer: int) -> None:
    """Have SIGALRM as the struct itimerval at an address says."""
    _libc.setitimer(_ITIMER_REAL, ctypes.c_void_p(timer), None)


_IO_URING_ENTER: Final = 426  # <asm/unistd.h>


def uring_enter(fd: int, count: int) -> int:
    """Submit `count` requests of an io_uring; how many the kernel took, or -errno."""
    got = int(_libc.syscall(_IO_URING_ENTER, fd, count, 0, 0, None, 0))
    return got if got >= 0 else -ctypes.get_errno()


def copy_bytes(dst: int, src: int, length: int) -> None:
    """Copy a frame or a part of one; never touches a byte outside `length`."""
    ctypes.memmove(dst, src, length)


# --- overloads ----------------------------------------------------------------------


def _compiles_to(python: Any, native: Any, arity: int) -> None:
    """Let jitted code that calls `python` run `native` instead."""
    bodies: dict[int, Callable[..., Any]] = {
        0: lambda: lambda: native(),
        1: lambda _a: lambda _a: native(_a),
        2: lambda _a, _b: lambda _a, _b: native(_a, _b),
        3: lambda _a, _b, _c: lambda _a, _b, _c: native(_a, _b, _c),
    }
    overload(python, strict=False)(bodies[arity])


for _python, _native, _arity in (
    (load_u8, _load_u8, 1),
    (load_u16, _load_u16, 1),
    (load_u32, _load_u32, 1),
    (load_u64, _load_u64, 1),
    (load_acquire_u16, _load_acquire_u16, 1),
    (load_acquire_u32, _load_acquire_u32, 1),
    (load_acquire_u64, _load_acquire_u64, 1),
    (load_any_u64, _load_any_u64, 1),
    (load_any_u16, _load_any_u16, 1),
    (store_u8, _store_u8, 2),
    (store_u16, _store_u16, 2),
    (store_u32, _store_u32, 2),
    (store_u64, _store_u64, 2),
    (store_release_u16, _store_release_u16, 2),
    (store_release_u32, _store_release_u32, 2),
    (store_release_u64, _store_release_u64, 2),
    (store_any_u64, _store_any_u64, 2),
    (store_any_u32, _store_any_u32, 2),
    (store_any_u16, _store_any_u16, 2),
    (move_8, _move_8, 2),
    (move_16, _move_16, 2),
    (move_32, _move_32, 2),
    (move_64, _move_64, 2),
    (fence, _fence, 0),
    (swap_if_u32, _swap_if_u32, 3),
    (swap_if_u64, _swap_if_u64, 3),
    (add_u64, _add, 2),
    (or_u8, _or, 2),
    (rdtsc, _rdtsc, 0),
    (pause, _pause, 0),
    (prefetch_read, _prefetch_read, 1),
    (prefetch_write, _prefetch_write, 1),
):
    _compiles_to(_python, _native, _arity)


@overload(memcpy, strict=False)
def _memcpy(dst: Any, src: Any, length: Any) -> Any:
    def body(dst: int, src: int, length: int) -> None:
        _c_memcpy(dst, src, length)

    return body


@overload(sched_yield, strict=False)
def _sched_yield() -> Any:
    def body() -> None:
        _c_sched_yield()

    return body


@overload(eventfd_signal, strict=False)
def _eventfd_signal(fd: Any) -> Any:
    def body(fd: int) -> bool:
        return _c_eventfd_write(fd, 1) < 0 and _load_u32(_c_errno()) == _EINTR

    return body


@overload(read_fd, strict=False)
def _read_fd(fd: Any, addr: Any, length: Any) -> Any:
    def body(fd: int, addr: int, length: int) -> int:
        got = _c_read(fd, addr, length)
        return got if got >= 0 else -_load_u32(_c_errno())

    return body


@overload(writev_fd, strict=False)
def _writev_fd(fd: Any, iovecs: Any, count: Any) -> Any:
    def body(fd: int, iovecs: int, count: int) -> int:
        got = _c_writev(fd, iovecs, count)
        return got if got >= 0 else -_load_u32(_c_errno())

    return body


@overload(sendmmsg_fd, strict=False)
def _sendmmsg_fd(fd: Any, messages: Any, count: Any) -> Any:
    def body(fd: int, messages: int, count: int) -> int:
        got = _c_sendmmsg(fd, messages, count, _MSG_DONTWAIT)
        return got if got >= 0 else -_load_u32(_c_errno())

    return body


@overload(wake_sender, strict=False)
def _wake_sender(fd: Any) -> Any:
    def body(fd: int) -> int:
        got = _c_send(fd, 0, 0, _MSG_DONTWAIT)
        return got if got >= 0 else -_load_u32(_c_errno())

    return body


@overload(wake_receiver, strict=False)
def _wake_receiver(fd: Any) -> Any:
    def body(fd: int) -> int:
        got = _c_recv(fd, 0, 0, _MSG_DONTWAIT)
        return got if got >= 0 else -_load_u32(_c_errno())

    return body


@overload(wait_epoll, strict=False)
def _wait_epoll(fd: Any, events: Any, room: Any, timeout_ms: Any) -> Any:
    def body(fd: int, events: int, room: int, timeout_ms: int) -> int:
        got = _c_epoll_wait(fd, events, room, timeout_ms)
        return got if got >= 0 else -_load_u32(_c_errno())

    return body


@overload(monotonic_ns, strict=False)
def _monotonic_ns(timespec: Any) -> Any:
    def body(timespec: int) -> int:
        _c_clock_gettime(_CLOCK_MONOTONIC, timespec)
        return _load_u64(timespec) * 10**9 + _load_u64(timespec + 8)

    return body


@overload(set_alarm, strict=False)
def _set_alarm(timer: Any) -> Any:
    def body(timer: int) -> None:
        _c_setitimer(_ITIMER_REAL, timer, 0)

    return body


@overload(uring_enter, strict=False)
def _uring_enter(fd: Any, count: Any) -> Any:
    def body(fd: int, count: int) -> int:
        got = _c_syscall_6(_IO_URING_ENTER, fd, count, 0, 0, 0, 0)
        return got if got >= 0 else -_load_u32(_c_errno())

    return body


# Up to here vectors beat libc's memcpy, which has to find out the size first.
_SMALL_COPY: Final = 512


# Inlined: what a call keeps on the stack is in the way of a copy, see `chain.fill`.
@overload(copy_bytes, strict=False, jit_options={"forceinline": True})
def _copy_bytes(dst: Any, src: Any, length: Any) -> Any:
    def body(dst: int, src: int, length: int) -> None:
        if length > _SMALL_COPY:
            _c_memcpy(dst, src, length)
        elif length >= 64:
            # Whole blocks from the front, then one that ends with the last byte and
            # may overlap the block before it.
            last = length - 64
            at = 0
            while at < last:
                _move_64(dst + at, src + at)
                at += 64
            _move_64(dst + last, src + last)
        elif length >= 32:
            _move_32(dst, src)
            _move_32(dst + length - 32, src + length - 32)
        elif length >= 16:
            _move_16(dst, src)
            _move_16(dst + length - 16, src + length - 16)
        elif length >= 8:
            _move_8(dst, src)
            _move_8(dst + length - 8, src + length - 8)
        else:
            for at in range(length):
                _store_u8(dst + at, _load_u8(src + at))

    return body
