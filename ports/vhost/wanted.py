"""The parts of a session's wanted state, and what makes them acceptable.

Numba-free. Every number here comes from a front-end that may be hostile: sums are
checked in full before they are used, and Python's integers do not wrap.

What cannot be judged alone is judged together: ring addresses are accepted while there
is no memory table, and `find_areas` says later whether they lead anywhere.

vhost-user: Memory regions description, Vring address description.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Final, NamedTuple

from ports.base import MAX_REGIONS, NO_FD
from ports.errors import ProtocolError
from ports.vhost import virtio
from ports.vhost.messages import Log, MemoryRegion, VringAddr, VringFd

NOT_SHARED: Final = (
    "the front-end's memory is not shared "
    "(add to QEMU: -object memory-backend-memfd,id=mem,size=SIZE,share=on "
    "-machine memory-backend=mem)"
)

# virtio 1.2 §2.7, by part of a split ring.
_DESC_ALIGN: Final = 16
_AVAIL_ALIGN: Final = 2
_USED_ALIGN: Final = 4

_ADDRESS_SPACE: Final = 1 << 64
_LOGGED_PER_BYTE: Final = 8 * 4096  # bytes of guest memory, a bit for each page


class WantedRegion(NamedTuple):
    """A row of the memory table, and the file behind it."""

    gpa: int
    size: int  # bytes
    frontend_va: int
    mmap_offset: int
    fd: int  # the session's
    device: int  # with `inode`: which file it is, whatever the descriptor's number
    inode: int
    block_size: int  # mappings of the file must be aligned to it; huge pages: theirs

    def same_as(self, other: "WantedRegion") -> bool:
        """Whether both are the same memory, whatever descriptor leads there."""
        return self._replace(fd=NO_FD) == other._replace(fd=NO_FD)


class Place(NamedTuple):
    """A position in guest memory: row of the memory table, bytes from its start."""

    region: int
    offset: int


class RingAreas(NamedTuple):
    """Where the three parts of a ring are, each contiguous within one region.

    Packed: the ring, the driver's event area, the device's.
    """

    desc: Place
    avail: Place
    used: Place


@dataclass(slots=True)
class WantedRing:
    """One virtqueue as the front-end wants it. Read it; only the session writes it."""

    index: int
    num: int = 0  # entries; 0: not given
    addr: VringAddr | None = None
    base: int | None = None  # advice only, see the module's head
    started: bool = False  # kick seen and not stopped since
    kick_fd: int = NO_FD  # NO_FD in a started ring: there are no kicks, look for work
    call_fd: int = NO_FD
    err_fd: int = NO_FD
    enable: bool | None = None  # what VRING_ENABLE last said

    # Derived after each message.
    enabled: bool = False  # independent of `runnable`
    logged: bool = False  # what is written to the ring is to be marked in the log
    areas: RingAreas | None = None  # None: addresses, size or memory missing or bad
    runnable: bool = False
    problem: str = ""  # why what was given cannot work


def find_areas(
    ring: WantedRing, memory: Sequence[WantedRegion], *, packed: bool
) -> tuple[RingAreas | None, str]:
    """Where the ring's parts are, or None and what is wrong; nothing while unknown."""
    if ring.addr is None or not ring.num or not memory:
        return None, ""
    if packed:
        events = virtio.EVENT_LEN, virtio.EVENT_LEN
        if (ring.base or 0) & virtio.PACKED_INDEX >= ring.num:
            text = f"position {ring.base:#x} outside its {ring.num} entries"
            return None, f"ring {ring.index}: {text}"
    elif ring.num & (ring.num - 1):
        return None, f"ring {ring.index}: size {ring.num}, not a power of two"
    else:
        events = virtio.avail_len(ring.num), virtio.used_len(ring.num)
    parts = (
        ("descriptor table", ring.addr.desc, ring.num * virtio.DESC_SIZE),
        ("available ring", ring.addr.avail, events[0]),
        ("used ring", ring.addr.used, events[1]),
    )
    for (name, start, length), (other, other_start, other_length) in combinations(
        parts, 2
    ):
        if _overlap(start, length, other_start, other_length):
            return None, f"ring {ring.index}: {name} and {other} overlap"
    places = []
    for name, start, length in parts:
        place = translate(memory, start, length)
        if place is None:
            text = f"{name} at {start:#x}, {length} bytes, outside guest memory"
            return None, f"ring {ring.index}: {text}"
        places.append(place)
    return RingAreas(*places), ""


def translate(
    memory: Sequence[WantedRegion], frontend_va: int, length: int
) -> Place | None:
    """Where `length` bytes at an address of the front-end's are, if in one region.

    Only for set-up: descriptors hold guest-physical addresses.
    """
    for row, region in enumerate(memory):
        offset = frontend_va - region.frontend_va
        if 0 <= offset < region.size and length <= region.size - offset:
            return Place(row, offset)
    return None


def check_addresses(addr: VringAddr) -> None:
    """Refuse ring parts that are not aligned; where they lie is not known yet."""
    for name, address, align in (
        ("descriptor table", addr.desc, _DESC_ALIGN),
        ("available ring", addr.avail, _AVAIL_ALIGN),
        ("used ring", addr.used, _USED_ALIGN),
    ):
        if address % align:
            raise ProtocolError(
                f"ring {addr.index}: {name} at {address:#x}, not a multiple of {align}"
            )


def check_num(index: int, num: int, *, packed: bool) -> None:
    """Refuse a size that no ring of the format may have, virtio 1.2 §2.7, §2.8."""
    if not 1 <= num <= virtio.MAX_QUEUE_SIZE:
        text = f"ring {index}: size {num}, not 1 to {virtio.MAX_QUEUE_SIZE}"
        raise ProtocolError(text)
    if num & (num - 1) and not packed:
        raise ProtocolError(f"ring {index}: size {num}, not a power of two")


def check_table(
    regions: Sequence[MemoryRegion], fds: Sequence[int]
) -> list[WantedRegion]:
    """Judge a whole memory table; the descriptors stay the caller's.

    Raises:
        ProtocolError: Rows and descriptors do not match, a row is not backed by its
            file, or two rows overlap.
    """
    if not regions and not fds:
        raise ProtocolError(NOT_SHARED)
    if len(regions) > MAX_REGIONS:
        raise ProtocolError(f"{len(regions)} regions, more than {MAX_REGIONS}")
    if len(regions) != len(fds):
        raise ProtocolError(f"{len(regions)} regions but {len(fds)} descriptors")
    rows = [check_region(region, fd) for region, fd in zip(regions, fds, strict=True)]
    for a, b in combinations(rows, 2):
        check_apart(a, b)
    return rows


def check_apart(a: WantedRegion, b: WantedRegion) -> None:
    """Refuse two rows of one table that share an address."""
    if _overlap(a.gpa, a.size, b.gpa, b.size):
        raise ProtocolError(f"regions at guest {a.gpa:#x} and {b.gpa:#x} overlap")
    if _overlap(a.frontend_va, a.size, b.frontend_va, b.size):
        raise ProtocolError(
            f"regions at front-end {a.frontend_va:#x} and {b.frontend_va:#x} overlap"
        )


def check_log(log: Log, fd: int, memory: Sequence[WantedRegion]) -> WantedRegion:
    """Judge a log of written pages, which has to have a bit for each page of memory.

    The descriptor stays the caller's.
    """
    wanted = max((row.gpa + row.size for row in memory), default=1)
    least = -(-wanted // _LOGGED_PER_BYTE)
    if log.mmap_size < least:
        text = f"log of {log.mmap_size:#x} bytes for memory up to {wanted:#x}"
        raise ProtocolError(f"{text}: {least:#x} are needed")
    region = MemoryRegion(0, log.mmap_size, 0, log.mmap_offset)
    return check_region(region, fd, "log")


def check_region(region: MemoryRegion, fd: int, where: str = "") -> WantedRegion:
    """A row whose every byte exists, in the address spaces and, by now, in the file.

    The file may still be truncated later; who maps it has to survive that.
    """
    where = where or f"region at guest {region.gpa:#x}"
    if not region.size:
        raise ProtocolError(f"{where}: size 0")
    for start in (region.gpa, region.frontend_va):
        if start + region.size > _ADDRESS_SPACE:
            text = f"{where}: {region.size:#x} bytes from {start:#x} wrap around"
            raise ProtocolError(text)
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise ProtocolError(f"{where}: cannot look at its file: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ProtocolError(f"{where}: its descriptor is not a file to be mapped")
    if region.mmap_offset + region.size > status.st_size:
        raise ProtocolError(
            f"{where}: {region.size:#x} bytes at offset {region.mmap_offset:#x} "
            f"of a file of {status.st_size:#x}"
        )
    return WantedRegion(
        region.gpa,
        region.size,
        region.frontend_va,
        region.mmap_offset,
        fd,
        status.st_dev,
        status.st_ino,
        status.st_blksize,
    )


def take_eventfd(payload: VringFd, fds: list[int]) -> int:
    """The descriptor that came with a ring's message, out of `fds`, or NO_FD.

    Workers read and write these, so anything that could make them wait is refused: a
    pipe or a terminal outright, and an eventfd is made non-blocking, or the guest
    could fill it up and so hold a worker that signals it.
    """
    if len(fds) != payload.has_fd:
        raise ProtocolError(
            f"ring {payload.index}: {len(fds)} descriptors, not {int(payload.has_fd)}"
        )
    if not payload.has_fd:
        return NO_FD
    if not _is_eventfd(fds[0]):
        raise ProtocolError(f"ring {payload.index}: descriptor is not an eventfd")
    os.set_blocking(fds[0], False)
    return fds.pop()


def _is_eventfd(fd: int) -> bool:
    try:
        return "eventfd-count:" in Path(f"/proc/self/fdinfo/{fd}").read_text()
    except OSError:
        return False


def _overlap(start: int, length: int, other: int, other_length: int) -> bool:
    return start < other + other_length and other < start + length
