"""vhost-net behind one queue of a tap: the kernel as the device of virtqueues of ours.

Control half; `vhost_net_data` has the other. The kernel's vhost thread moves frames
between the queue and the rings in our memory, so neither way takes a system call as long
as both sides are busy. It works in the memory of whoever became its owner and ends with
that: therefore the manager owns it, and a worker's death is none of its business.

    open    rings and buffers in a memory file, mapped here and in every worker
            -> owner, features, memory table, vrings, back end: from then on it runs
    close   back end away: it has stopped; then the descriptor and the memory

linux/vhost.h; virtio 1.2 §2.7.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from ports.base import NO_FD
from ports.errors import PortError, explain
from ports.host import Host, Mapping
from ports.vhost.virtio import F_EVENT_IDX, F_MRG_RXBUF, F_VERSION_1
from ports.vhost_net_memory import (
    LENGTH,
    RECEIVE,
    SLOTS,
    TRANSMIT,
    prepare,
)

_DEVICE: Final = "/dev/vhost-net"
_ZERO_COPY: Final = Path("/sys/module/vhost_net/parameters/experimental_zcopytx")
_PAGE: Final = 4096

_GET_FEATURES: Final = 0x8008AF00
_SET_FEATURES: Final = 0x4008AF00
_SET_OWNER: Final = 0xAF01
_SET_MEM_TABLE: Final = 0x4008AF03
_SET_VRING_NUM: Final = 0x4008AF10
_SET_VRING_ADDR: Final = 0x4028AF11
_SET_VRING_BASE: Final = 0x4008AF12
_SET_VRING_KICK: Final = 0x4008AF20
_SET_VRING_CALL: Final = 0x4008AF21
_SET_BACKEND: Final = 0x4008AF30

# By the kernel's numbers, which are those of a guest's queues.
_VRINGS: Final = (RECEIVE, TRANSMIT)
_EVENTFD_FLAGS: Final = os.EFD_CLOEXEC | os.EFD_NONBLOCK

# The tap takes and gives a virtio-net header of 12 bytes by itself: the kernel's vhost
# is not to add one (VHOST_NET_F_VIRTIO_NET_HDR).
_FEATURES: Final = {
    F_VERSION_1: "VERSION_1",
    F_MRG_RXBUF: "MRG_RXBUF",
    F_EVENT_IDX: "EVENT_IDX",
}

_CAUSES: Final = {
    errno.ENOENT: f"there is no {_DEVICE} (modprobe vhost_net)",
    errno.ENODEV: f"there is no driver behind {_DEVICE} (modprobe vhost_net)",
    errno.EACCES: f"we may not open {_DEVICE} (run as root, or join its group)",
    errno.EPERM: f"we may not open {_DEVICE} (allow it in the container)",
    errno.ENOMEM: "no memory for it (free some)",
}


def missing(_: int = NO_FD) -> str:
    """What this machine lacks for it, and what to do; nothing if it can be had."""
    try:
        os.close(_open_device())
    except PortError as error:
        return str(error)
    return ""


class VhostNet:
    """One queue of a tap with the kernel's vhost thread behind it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._fd = NO_FD
        self._memory: mmap.mmap | None = None
        self._mapping: Mapping | None = None
        self._numbers: list[int] = []  # of the eventfds, of both rings, in workers

    def fileno(self) -> int:
        """The descriptor that the kernel's thread lives by."""
        return self._fd

    async def open(self, tap: int) -> None:
        """Let the kernel serve a tap's queue; its descriptor stays the caller's.

        Nobody else may read or write the queue from now on.

        Raises:
            PortError: It cannot be had, and why.
        """
        self._fd = _open_device()
        eventfds = [os.eventfd(0, _EVENTFD_FLAGS) for _ in range(2 * len(_VRINGS))]
        try:
            memory, self._mapping = await self._share_memory()
            self._numbers = await self._host.install(eventfds)
            _set_up(self._fd, memory, self._mapping.addr, eventfds)
            for index in range(len(_VRINGS)):
                fcntl.ioctl(self._fd, _SET_BACKEND, struct.pack("Ii", index, tap))
        except OSError as error:
            raise _refusal(error) from error
        finally:
            for fd in eventfds:
                os.close(fd)

    def describe(self, rx: np.void, tx: np.void) -> None:
        """Tell a pair of rings, which are stopped, where everything is."""
        if self._mapping is None:
            message = "it is not open"
            raise AssertionError(message)
        for n, (ring, area) in enumerate(((rx, RECEIVE), (tx, TRANSMIT))):
            for part in ("desc", "avail", "used"):
                ring[part] = self._mapping.addr + getattr(area, part)
            ring["size"], ring["next_used"] = SLOTS, 0
            ring["kick_fd"], ring["call_fd"] = self._numbers[2 * n : 2 * n + 2]

    async def close(self) -> None:
        """Stop the kernel, then give the memory back; no worker may use its rings."""
        if self._fd != NO_FD:
            os.close(self._fd)
            self._fd = NO_FD
        await self._host.uninstall(self._numbers)
        self._numbers = []
        if self._mapping:
            await self._host.unmap([self._mapping])
            self._mapping = None
        if self._memory:
            self._memory.close()
            self._memory = None

    async def _share_memory(self) -> tuple[mmap.mmap, Mapping]:
        """Map new memory here and in every worker, and write what it begins with."""
        fd = os.memfd_create("vswitch-vhost-net", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, LENGTH)
            self._memory = mmap.mmap(fd, LENGTH)
            mapping = await self._host.map(fd, LENGTH, 0, _PAGE)
        finally:
            os.close(fd)
        prepare(self._memory, mapping.addr)
        return self._memory, mapping


def _open_device() -> int:
    """Open vhost-net, if it can do what we need; its descriptor.

    Raises:
        PortError: It cannot, or we cannot.
    """
    fd = NO_FD
    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        (offered,) = struct.unpack("Q", fcntl.ioctl(fd, _GET_FEATURES, bytes(8)))
        _check(offered)
    except OSError as error:
        raise _refusal(error) from error
    except PortError:
        os.close(fd)
        raise
    return fd


def _check(offered: int) -> None:
    lacking = [name for bit, name in _FEATURES.items() if not offered & bit]
    if lacking:
        found = f"the kernel's has no {', '.join(lacking)}"
        raise PortError(f"{found} (use a newer kernel)")
    with contextlib.suppress(OSError):
        if _ZERO_COPY.read_text().strip() != "0":
            found = "the kernel's sends without a copy, and so out of order"
            remedy = "options vhost_net experimental_zcopytx=0 in /etc/modprobe.d"
            raise PortError(f"{found} ({remedy})")


def _set_up(fd: int, memory: mmap.mmap, addr: int, eventfds: Sequence[int]) -> None:
    """Tell the kernel of our memory, which workers have at `addr`, and of the rings."""
    ours = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(fd, _SET_OWNER)
    fcntl.ioctl(fd, _SET_FEATURES, struct.pack("Q", sum(_FEATURES)))
    table = struct.pack("II4Q", 1, 0, addr, LENGTH, ours, 0)
    fcntl.ioctl(fd, _SET_MEM_TABLE, table)
    for index, area in enumerate(_VRINGS):
        signal, wake = eventfds[2 * index : 2 * index + 2]
        parts = (ours + offset for offset in (area.desc, area.used, area.avail))
        for request, argument in (
            (_SET_VRING_NUM, struct.pack("II", index, SLOTS)),
            (_SET_VRING_BASE, struct.pack("II", index, 0)),
            (_SET_VRING_ADDR, struct.pack("II4Q", index, 0, *parts, 0)),
            (_SET_VRING_CALL, struct.pack("Ii", index, signal)),
            (_SET_VRING_KICK, struct.pack("Ii", index, wake)),
        ):
            fcntl.ioctl(fd, request, argument)


def _refusal(error: OSError) -> PortError:
    return PortError(explain(error, _CAUSES))
