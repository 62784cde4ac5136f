"""A guest's memory: one memfd, mapped once, told to the switch as one or more regions.

In our process the file is one contiguous mapping. The regions are slices of it with
their own places in guest-physical space, as a real machine has them around the hole
below 4 GiB. With `gap` 0 the slices also touch in guest-physical space, so a buffer may
cross from one to the next: the device may have mapped them far apart.

What is allocated is never freed; a guest lays its rings and buffers out once.
"""

import mmap
import os
from typing import Final, NamedTuple

import numpy as np

from ports.vhost.messages import MemoryRegion, MemTable
from vswitch.guest.errors import GuestError

PAGE: Final = mmap.PAGESIZE
_FIRST_GPA: Final = 1 << 30
HOLE: Final = 1 << 32


Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class Place(NamedTuple):
    """The same bytes, here and in the guest's eyes."""

    addr: int
    gpa: int


class GuestMemory:
    """Memory shared with the switch."""

    def __init__(self, size: int, regions: int = 1, gap: int = HOLE) -> None:
        """Make `size` bytes (rounded up to whole pages a region) of zeroes."""
        share = -(-size // (regions * PAGE)) * PAGE
        self.size = share * regions
        self.fd = os.memfd_create("vswitch-guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)
        self._map = mmap.mmap(self.fd, self.size)
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.addr = int(self.bytes.ctypes.data)
        self._share, self._gap = share, gap
        self._used = [0] * (1 if gap == 0 else regions)
        self.table = MemTable(
            tuple(
                MemoryRegion(
                    gpa=_FIRST_GPA + n * (share + gap),
                    size=share,
                    frontend_va=self.addr + n * share,
                    mmap_offset=n * share,
                )
                for n in range(regions)
            )
        )

    def allocate(self, length: int, align: int = 64) -> Place:
        """Take the next `length` zeroed bytes out of the emptiest part.

        Raises:
            GuestError: There is not as much left in one piece.
        """
        part = self._used.index(min(self._used))
        room = self.size if self._gap == 0 else self._share
        begin = -(-self._used[part] // align) * align
        if begin + length > room:
            raise GuestError(
                f"cannot place {length} bytes in guest memory: "
                f"{room - begin} are left (give the guest a larger memory_size)"
            )
        self._used[part] = begin + length
        offset = part * self._share + begin
        return Place(self.addr + offset, self.gpa_of(offset))

    def gpa_of(self, offset: int) -> int:
        """Guest-physical address of a byte of the file."""
        return _FIRST_GPA + offset + offset // self._share * self._gap

    def view(
        self, addr: int, length: int
    ) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        """The bytes at one of our addresses, as an array."""
        begin = addr - self.addr
        return self.bytes[begin : begin + length]

    def close(self) -> None:
        """Give the memory back once nobody holds an array of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            # The mapping goes with the last array that shows it.
            del self.bytes, self._map
