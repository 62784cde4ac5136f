"""Programs in the kernel: the bpf system call, as far as an xdp port needs it.

What is made here is a descriptor, and gone when its last one is closed: maps, programs,
and the link that ties a program to an interface. A manager that is killed leaves nothing.

linux/bpf.h; bpf(2); Documentation/bpf/btf.rst.
"""

import ctypes
import functools
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_SYSCALL: Final = 321  # of x86-64
_MAP_CREATE: Final = 0
_MAP_LOOKUP: Final = 1
_MAP_UPDATE: Final = 2
_PROG_LOAD: Final = 5
_LINK_CREATE: Final = 28
_PROG_TYPE_XDP: Final = 6
_ATTACH_XDP: Final = 37
_LICENSE: Final = b"Dual MIT/GPL\0"

# Kinds of maps.
ARRAY: Final = 2
SOCKETS: Final = 17  # AF_XDP

_libc: Final = ctypes.CDLL(None, use_errno=True)

Line = tuple[int, int, int, int | str, int]  # code, target, source, offset, immediate


def make_map(kind: int, value_len: int, entries: int) -> int:
    """Make a map with 32-bit keys; its descriptor. Raises OSError."""
    return _bpf(_MAP_CREATE, struct.pack("4I", kind, 4, value_len, entries))


def write(map_fd: int, key: int, value: int) -> None:
    """Set a 32-bit value. Raises OSError."""
    _access(_MAP_UPDATE, map_fd, key, ctypes.c_uint32(value))


def read(map_fd: int, key: int) -> int:
    """A 64-bit value. Raises OSError."""
    value = ctypes.c_uint64()
    _access(_MAP_LOOKUP, map_fd, key, value)
    return value.value


def load(lines: Sequence[Line | str], flags: int, ifindex: int) -> int:
    """Load an XDP program, made for one interface if `ifindex` is not 0.

    Returns:
        Its descriptor.

    Raises:
        OSError: We lack the right, or the kernel something that it uses.
    """
    code = ctypes.create_string_buffer(assemble(lines))
    license_text = ctypes.create_string_buffer(_LICENSE)
    attributes = struct.pack(
        "2I2Q2IQ2I16sI",
        *(_PROG_TYPE_XDP, (len(code) - 1) // 8),
        *(ctypes.addressof(code), ctypes.addressof(license_text)),
        *(0, 0, 0, 0, flags, b"vswitch", ifindex),
    )
    return _bpf(_PROG_LOAD, attributes)


def link(program: int, ifindex: int, mode: int) -> int:
    """Have an interface run a program until the descriptor that this returns is closed.

    Raises:
        OSError: EBUSY or EEXIST where the interface has one already.
    """
    return _bpf(_LINK_CREATE, struct.pack("4I", program, ifindex, _ATTACH_XDP, mode))


def assemble(lines: Sequence[Line | str]) -> bytes:
    """Instructions as the kernel reads them; a text is a label that offsets may name."""
    places: dict[int | str, int] = {}
    instructions: list[Line] = []
    for line in lines:
        if isinstance(line, str):
            places[line] = len(instructions)
        else:
            instructions.append(line)
    return b"".join(
        struct.pack(
            "<BBhi",
            code,
            target | source << 4,
            places[to] - at - 1 if isinstance(to, str) else to,
            value,
        )
        for at, (code, target, source, to, value) in enumerate(instructions)
    )


# --- rights ---

_STATUS: Final = Path("/proc/self/status")
_RIGHTS: Final = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_BPF": 39}
_SYS_ADMIN: Final = 21


def missing_rights() -> str:
    """Which capabilities we lack of those that an XDP program and its sockets take.

    Where we have all of them, it is the user namespace that they hold in.
    """
    words = _STATUS.read_text().partition("CapEff:")[2].split()
    have = int(words[0], 16)
    lacking = [name for name, bit in _RIGHTS.items() if not have >> bit & 1]
    if have >> _SYS_ADMIN & 1:  # has been enough since before there was CAP_BPF
        lacking = [name for name in lacking if name != "CAP_BPF"]
    return " and no ".join(lacking) or "capabilities outside of our user namespace"


# --- kernel functions by name ---

_BTF: Final = Path("/sys/kernel/btf/vmlinux")
_BTF_HEADER: Final = "<HBBIIIII"
_KIND_FUNC: Final = 12
# Bytes behind a type's own 12, and those for each of its members; by kind.
_BEHIND: Final = {1: 4, 3: 12, 14: 4, 17: 4}
_EACH: Final = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}


@functools.cache
def function_id(name: str) -> int:
    """Number of a function of the kernel that programs may call; 0: it has none.

    Takes a tenth of a second where there is one.
    """
    try:
        btf = _BTF.read_bytes()
    except OSError:  # a kernel without
        return 0
    return find_function(btf, name)


def find_function(btf: bytes, name: str) -> int:
    """Number of a function in type information, or 0."""
    _, _, _, header, types, types_len, texts, _ = struct.unpack_from(_BTF_HEADER, btf)
    found = btf.find(b"\0" + name.encode() + b"\0", header + texts)
    if found < 0:
        return 0
    wanted = found + 1 - header - texts
    behind = [_BEHIND.get(kind, 0) for kind in range(32)]
    each = [_EACH.get(kind, 0) for kind in range(32)]
    at, number = header + types, 0
    end = at + types_len
    read_type = struct.Struct("<II").unpack_from
    while at < end:
        number += 1
        text, information = read_type(btf, at)
        kind = information >> 24 & 0x1F
        if text == wanted and kind == _KIND_FUNC:
            return number
        at += 12 + behind[kind] + each[kind] * (information & 0xFFFF)
    return 0


# --- the call ---


def _access(
    command: int, map_fd: int, key: int, value: ctypes.c_uint32 | ctypes.c_uint64
) -> None:
    index = ctypes.c_uint32(key)
    places = (ctypes.addressof(index), ctypes.addressof(value))
    _bpf(command, struct.pack("I4x3Q", map_fd, *places, 0))


def _bpf(command: int, attributes: bytes) -> int:
    memory = ctypes.create_string_buffer(attributes, len(attributes))
    got = int(_libc.syscall(_SYSCALL, command, memory, len(attributes)))
    if got < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return got
