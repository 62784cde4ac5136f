"""Where workers map guest memory and at which numbers they keep descriptors.

Every worker uses the same addresses and numbers, so the shared records hold plain
addresses that any worker can serve any ring with. Pure bookkeeping: nothing is mapped or
opened here.
"""

import bisect
import heapq
from typing import Final

_TIB: Final = 1 << 40
# Clear of executables, heaps and libraries, which live at the ends of the 128 TiB.
_FIRST_ADDR: Final = 16 * _TIB
END_ADDR: Final = 80 * _TIB
_HUGE_PAGE: Final = 1 << 21
MOST_FILES: Final = 65536  # of a process
# Clear of what a worker opens itself.
FIRST_NUMBER: Final = 512


class AddressPlan:
    """First fit in the reserved range."""

    def __init__(self) -> None:
        self._taken: list[tuple[int, int]] = []  # sorted (begin, end)

    def take(self, length: int, alignment: int = _HUGE_PAGE) -> int:
        """Reserve `length` bytes; their address, aligned to a huge page or more.

        Raises:
            MemoryError: 64 TiB of guests are mapped already.
        """
        alignment = max(alignment, _HUGE_PAGE)
        begin = _FIRST_ADDR
        for taken_begin, taken_end in [*self._taken, (END_ADDR, END_ADDR)]:
            begin = -(-begin // alignment) * alignment
            if begin + length <= taken_begin:
                bisect.insort(self._taken, (begin, begin + length))
                return begin
            begin = max(begin, taken_end)
        message = f"no room for {length} bytes of guest memory (remove a port)"
        raise MemoryError(message)

    def occupy(self, begin: int, end: int) -> None:
        """Take a range that is in use already; `give_back` frees it as a whole."""
        bisect.insort(self._taken, (begin, end))

    def give_back(self, addr: int) -> None:
        """Free a reservation; nobody may have it mapped any more."""
        at = bisect.bisect_left(self._taken, (addr, 0))
        if at == len(self._taken) or self._taken[at][0] != addr:
            message = f"{addr:#x} is not reserved"
            raise ValueError(message)
        del self._taken[at]


class NumberPlan:
    """Descriptor numbers, lowest first, below a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: list[int] = []
        self._next = FIRST_NUMBER

    def take(self) -> int:
        """A number that no worker uses.

        Raises:
            OSError: The limit of open files is reached.
        """
        if self._free:
            return heapq.heappop(self._free)
        if self._next >= self._limit:
            message = f"all {self._limit} file descriptors are in use (raise ulimit -n)"
            raise OSError(message)
        self._next += 1
        return self._next - 1

    def occupy(self, begin: int, end: int) -> None:
        """Take a range of numbers that is in use already, before any other was taken."""
        self._free = list(range(self._next, begin))  # sorted, so a heap
        self._next = end

    def give_back(self, number: int) -> None:
        """Free a number; every worker has closed it."""
        heapq.heappush(self._free, number)
