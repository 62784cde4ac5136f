"""What the driver and the kernel's vhost thread share for one queue of a tap: one file.

Two split rings and a buffer for every entry of each. The kernel uses it at the manager's
addresses, workers at their own; a descriptor holds the workers', which to the kernel are
guest-physical (VHOST_SET_MEM_TABLE). Numba-free.

A descriptor is a slot: its number is the buffer's. All slots of a ring lie one behind the
other without a gap, so what spans several is contiguous, and nothing but lengths is ever
written to a descriptor again.

virtio 1.2 §2.7.
"""

import mmap
from typing import Final, NamedTuple

import numpy as np

from ports.burst import MAX_FRAME
from ports.vhost.virtio import (
    AVAIL_IDX,
    AVAIL_RING,
    DESC,
    DESC_F_WRITE,
    DESC_SIZE,
    NET_HDR_LEN,
    avail_len,
    used_len,
)

# Some thirty super-frames each way, as much as a tap itself keeps of small ones. An odd
# number of cache lines, or slots would compete for the same few sets.
SLOTS: Final = 1024
SLOT_LEN: Final = 33 * 64
# What a frame in the last slot of the transmit ring needs behind it.
_SPARE: Final = NET_HDR_LEN + MAX_FRAME - SLOT_LEN

_PAGE: Final = 4096


class Area(NamedTuple):
    """Where the parts of a ring begin, from the beginning of the file."""

    desc: int
    avail: int
    used: int
    slots: int


def _areas() -> tuple[Area, Area, int]:
    """The receive ring, the transmit ring, and the bytes of both."""
    lengths = DESC_SIZE * SLOTS, avail_len(SLOTS), used_len(SLOTS), SLOTS * SLOT_LEN
    begins, end = [], 0
    for length in lengths + lengths:
        begins.append(end)
        # The two sides write to different parts: no line may hold of both.
        end += -(-length // _PAGE) * _PAGE
    return Area(*begins[:4]), Area(*begins[4:]), end + -(-_SPARE // _PAGE) * _PAGE


RECEIVE, TRANSMIT, LENGTH = _areas()


def prepare(memory: mmap.mmap, addr: int) -> None:
    """Write what the rings begin with; workers have the memory at `addr`.

    Receive: every slot is offered, each at its own place of the available ring, and that
    is how it stays. Transmit: as if slot 0 had been sent, see `vhost_net_data`.
    """
    for area, flags in ((RECEIVE, DESC_F_WRITE), (TRANSMIT, 0)):
        desc = np.ndarray(SLOTS, DESC, memory, area.desc)
        desc["addr"] = addr + area.slots + SLOT_LEN * np.arange(SLOTS)
        desc["len"], desc["flags"] = SLOT_LEN, flags
    np.ndarray(SLOTS, "<u2", memory, RECEIVE.avail + AVAIL_RING)[:] = np.arange(SLOTS)
    np.ndarray(1, "<u2", memory, RECEIVE.avail + AVAIL_IDX)[0] = SLOTS
