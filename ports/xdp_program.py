"""The program that an xdp port has its interface run: every frame to one of our sockets.

A socket serves one receive queue, and is found in a map by its number. A frame of a queue
that no socket serves is counted and dropped: whoever has the interface has all of it, and
what would pass us by unseen is worse than what is missing and counted.

Where the kernel took a VLAN tag out of the frame, only the program can ask for it (Linux
6.8), and it puts the tag back. The frame comes to us as it was on the wire.

Documentation/bpf/standardization/instruction-set.rst;
Documentation/networking/xdp-rx-metadata.rst.
"""

import contextlib
import errno
import os
from collections.abc import Sequence
from typing import Final

from ports import bpf
from ports.base import MAX_PAIRS, NO_FD
from ports.bpf import Line
from ports.errors import PortError, errno_name

# Where the program runs: XDP_FLAGS_*_MODE, linux/if_link.h.
NATIVE: Final = 1 << 2  # in the driver
GENERIC: Final = 1 << 1  # in the kernel, of whatever a driver delivers

# BPF_F_XDP_*, of BPF_PROG_LOAD.
_HAS_FRAGMENTS: Final = 1 << 5  # frames longer than a page; Linux 5.18
_FOR_DEVICE: Final = 1 << 6  # may ask this interface's driver; Linux 6.3
_RX_VLAN_TAG: Final = "bpf_xdp_metadata_rx_vlan_tag"

# What was found, and what to do; {} is the interface.
_TAKEN: Final = ("another program is attached to it", "end that, or use eth:{}")
_CAUSES: Final = {
    errno.EBUSY: _TAKEN,
    errno.EEXIST: _TAKEN,
    errno.EOPNOTSUPP: ("its driver has no XDP", "use eth:{}"),
    errno.ERANGE: (
        "its peer's MTU is too large for frames as long as its own",
        "set the MTU of {} to its peer's, or use eth:{}",
    ),
    errno.ENOSPC: (
        "it has fewer receive queues than its peer has to transmit by",
        "ethtool -L {}, or use eth:{}",
    ),
}
# Errors that are the same in any mode.
_FINAL: Final = {errno.EBUSY, errno.EEXIST, errno.EPERM, errno.ENODEV}

# Instructions.
_ADD: Final = 0x07
_MOVE: Final = 0xB7
_MOVE_REGISTER: Final = 0xBF
_TO_BIG: Final = 0xDC
_LOAD_U16: Final = 0x69
_LOAD_U32: Final = 0x61
_LOAD_U64_IMMEDIATE: Final = 0x18
_STORE_U16: Final = 0x6B
_STORE_U32: Final = 0x63
_STORE_ZERO_U64: Final = 0x7A
_ADD_ATOMIC_U64: Final = 0xDB
_JUMP_UNLESS: Final = 0x55  # equal to the immediate
_JUMP_IF_GREATER: Final = 0x2D
_CALL: Final = 0x85
_EXIT: Final = 0x95
# What the immediate is, where not a number or a helper's; in place of a register.
_MAP_FD: Final = 1
_MAP_VALUE: Final = 2
_KERNEL_FUNCTION: Final = 2
# Helpers.
_ADJUST_HEAD: Final = 44
_REDIRECT_MAP: Final = 51
# struct xdp_md
_DATA: Final = 0
_DATA_END: Final = 4
_RX_QUEUE: Final = 16
_XDP_ABORTED: Final = 0
_XDP_DROP: Final = 1

# The program's argument is wanted after calls, too.
_KEEP_CONTEXT: Final[Line] = (_MOVE_REGISTER, 6, 1, 0, 0)

_FRAME: Final = 10  # the register that ends the stack
_TPID: Final = -8  # on the stack
_TCI: Final = -4
_TAG: Final = 4
_TAGGED: Final = 18


class Program:
    """Our program on an interface; `close` takes it off."""

    def __init__(self, interface: str, ifindex: int, *, fragments: bool) -> None:
        """Prepare. Raises PortError."""
        self.mode = 0
        self.has_tags = False  # it puts VLAN tags back
        self.reason = ""  # why not native
        self._interface = interface
        self._ifindex = ifindex
        self._flags = _HAS_FRAGMENTS if fragments else 0
        self._link = NO_FD
        self._maps: list[int] = []
        self._counted = 0

    def attach(self, modes: Sequence[int]) -> None:
        """Have the interface run the program, in the first mode that it can.

        Raises:
            PortError: We lack the right, the kernel or the driver what it takes, or the
                interface has a program already.
        """
        try:
            self._maps.append(bpf.make_map(bpf.SOCKETS, 4, MAX_PAIRS))
            self._maps.append(bpf.make_map(bpf.ARRAY, 8, 1))
            self._link_in(modes[0])
        except OSError as error:
            self.reason, remedy = self._why(error)
            cannot = (
                f"cannot attach to interface {self._interface}: {errno_name(error)}:"
                f" {self.reason} ({remedy.replace('{}', self._interface)})"
            )
            if error.errno in _FINAL or not self._maps or len(modes) == 1:
                raise PortError(cannot) from error
            try:
                self._link_in(modes[1])
            except OSError:  # the first error tells more
                raise PortError(cannot) from error

    def fileno(self) -> int:
        """The descriptor that the program stays on the interface by."""
        return self._link

    def serve(self, queue: int, sock: int) -> None:
        """Give a queue's frames to a socket. Raises OSError."""
        bpf.write(self._maps[0], queue, sock)

    def count_lost(self) -> int:
        """Frames of queues that nobody serves, since the last call."""
        if self._link == NO_FD:
            return 0
        before, self._counted = self._counted, bpf.read(self._maps[1], 0)
        return self._counted - before

    def close(self) -> None:
        """Take the program off the interface."""
        for fd in (self._link, *self._maps):
            if fd != NO_FD:
                os.close(fd)
        self._link, self._maps = NO_FD, []

    def _link_in(self, mode: int) -> None:
        self.mode = mode
        program = self._load(mode)
        try:
            self._link = bpf.link(program, self._ifindex, mode)
        finally:
            os.close(program)  # the link has it

    def _load(self, mode: int) -> int:
        end = _redirect(*self._maps)
        function = function_for_tags() if mode == NATIVE else 0
        if function:
            lines = [_KEEP_CONTEXT, *_put_back(function), *end]
            with contextlib.suppress(OSError):  # the kernel does not let us
                program = bpf.load(lines, self._flags | _FOR_DEVICE, self._ifindex)
                self.has_tags = True
                return program
        self.has_tags = False
        return bpf.load([_KEEP_CONTEXT, *end], self._flags, 0)

    def _why(self, error: OSError) -> tuple[str, str]:
        """What was found, and what to do."""
        number = error.errno or 0
        if number == errno.EPERM:
            found = f"we have no {bpf.missing_rights()}"
            return found, "run as root, or grant it"
        return _CAUSES.get(number, (os.strerror(number), "use eth:{}"))


def function_for_tags() -> int:
    """Number of the kernel's function for VLAN tags, or 0; slow only the first time."""
    return bpf.function_id(_RX_VLAN_TAG)


def _put_back(function: int) -> Sequence[Line | str]:
    """Ask for a tag that was taken out; make room for it behind the addresses."""
    return [
        (_STORE_ZERO_U64, _FRAME, 0, _TPID, 0),
        (_MOVE_REGISTER, 1, 6, 0, 0),
        (_MOVE_REGISTER, 2, _FRAME, 0, 0),
        (_ADD, 2, 0, 0, _TPID),
        (_MOVE_REGISTER, 3, _FRAME, 0, 0),
        (_ADD, 3, 0, 0, _TCI),
        (_CALL, 0, _KERNEL_FUNCTION, 0, function),
        (_JUMP_UNLESS, 0, 0, "redirect", 0),  # there is none
        (_MOVE_REGISTER, 1, 6, 0, 0),
        (_MOVE, 2, 0, 0, -_TAG),
        (_CALL, 0, 0, 0, _ADJUST_HEAD),
        (_JUMP_UNLESS, 0, 0, "lost", 0),
        (_LOAD_U32, 2, 6, _DATA, 0),
        (_LOAD_U32, 3, 6, _DATA_END, 0),
        (_MOVE_REGISTER, 1, 2, 0, 0),
        (_ADD, 1, 0, 0, _TAGGED),
        (_JUMP_IF_GREATER, 1, 3, "lost", 0),
        *((_LOAD_U32, 3 + n, 2, _TAG + 4 * n, 0) for n in range(3)),
        *((_STORE_U32, 2, 3 + n, 4 * n, 0) for n in range(3)),
        (_LOAD_U16, 4, _FRAME, _TPID, 0),  # as on the wire
        (_STORE_U16, 2, 4, 12, 0),
        (_LOAD_U16, 4, _FRAME, _TCI, 0),
        (_TO_BIG, 4, 0, 0, 16),
        (_STORE_U16, 2, 4, 14, 0),
    ]


def _redirect(sockets: int, lost: int) -> Sequence[Line | str]:
    return [
        "redirect",
        (_LOAD_U32, 2, 6, _RX_QUEUE, 0),
        *_address(1, _MAP_FD, sockets),
        (_MOVE, 3, 0, 0, _XDP_ABORTED),  # where there is no socket
        (_CALL, 0, 0, 0, _REDIRECT_MAP),
        (_JUMP_UNLESS, 0, 0, "end", _XDP_ABORTED),
        "lost",
        *_address(1, _MAP_VALUE, lost),
        (_MOVE, 2, 0, 0, 1),
        (_ADD_ATOMIC_U64, 1, 2, 0, 0),
        (_MOVE, 0, 0, 0, _XDP_DROP),
        "end",
        (_EXIT, 0, 0, 0, 0),
    ]


def _address(register: int, what: int, map_fd: int) -> Sequence[Line]:
    """Two instructions for a 64-bit immediate."""
    return [(_LOAD_U64_IMMEDIATE, register, what, 0, map_fd), (0, 0, 0, 0, 0)]
