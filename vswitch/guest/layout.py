"""Where a guest's rings and buffers lie in its memory, and in which shapes.

`Shape` is how a frame is cut into descriptors. A real guest uses one or two; the odd
ones (one byte a descriptor, everything indirect) are for testing the device.
"""

from typing import Final, NamedTuple

import numpy as np

from ports.native import Record, Records
from ports.vhost.virtio import (
    AVAIL_IDX,
    AVAIL_RING,
    DESC_SIZE,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_MRG_RXBUF,
    F_VERSION_1,
    NET_HDR_LEN,
    NET_HDR_LEN_LEGACY,
    USED_IDX,
    avail_len,
    used_len,
)
from vswitch.guest.errors import GuestError
from vswitch.guest.memory import PAGE, Bytes, GuestMemory

_LINE: Final = 64
_CANARY: Final = 0xA5


class Shape(NamedTuple):
    """How a frame with its header is spread over descriptors."""

    pieces: int = 1
    header_apart: bool = False
    indirect: bool = False

    @property
    def entries(self) -> int:
        """Descriptors of the longest chain."""
        return self.pieces + self.header_apart


class RingShape(NamedTuple):
    """Size and shape of one virtqueue."""

    size: int
    buffer_len: int
    shape: Shape

    @property
    def chain(self) -> int:
        """Entries of the descriptor table that one slot takes."""
        return 1 if self.shape.indirect else self.shape.entries

    @property
    def slots(self) -> int:
        """How many frames can be in the ring at once."""
        return self.size // self.chain

    @property
    def stride(self) -> int:
        """Bytes from one buffer to the next.

        An odd number of cache lines, at least one more than needed: buffers at a power
        of two would all fall into the same few cache sets, and the spare bytes show
        whether the device wrote past an end.
        """
        return (-(-self.buffer_len // _LINE) + 1 | 1) * _LINE

    @property
    def bytes(self) -> int:
        """Guest memory that the ring and its buffers take, generously."""
        tables = DESC_SIZE * self.shape.entries * self.size
        areas = DESC_SIZE * self.size + avail_len(self.size) + used_len(self.size)
        return self.stride * self.slots + tables + areas + 4 * PAGE


class Layout:
    """One virtqueue laid out in guest memory, and its driver's record."""

    def __init__(
        self, memory: GuestMemory, plan: RingShape, features: int, ring: Record
    ) -> None:
        """Fill in `ring`, a row of DRIVER_RING, which has to outlive this."""
        if plan.shape.indirect and not features & F_INDIRECT_DESC:
            raise GuestError(
                "cannot use indirect descriptors: the switch did not offer them"
            )
        self.plan, self.ring, self._memory = plan, ring, memory
        self._free = np.zeros(plan.slots, np.uint16)
        self._busy = np.zeros(plan.slots, np.uint8)
        size = plan.size
        desc = memory.allocate(DESC_SIZE * size, 16)
        avail = memory.allocate(avail_len(size), _LINE)
        used = memory.allocate(used_len(size), PAGE)
        entries = plan.shape.entries if plan.shape.indirect else 0
        tables = memory.allocate(DESC_SIZE * entries * plan.slots)
        buffers = memory.allocate(plan.stride * plan.slots)
        modern = features & (F_VERSION_1 | F_MRG_RXBUF)
        for name, value in {
            "desc": desc.addr,
            "avail": avail.addr,
            "used": used.addr,
            "size": size,
            "event_idx": int(features & F_EVENT_IDX != 0),
            "mergeable": int(features & F_MRG_RXBUF != 0),
            "header_len": NET_HDR_LEN if modern else NET_HDR_LEN_LEGACY,
            "buffers": buffers.addr,
            "buffers_gpa": buffers.gpa,
            "buffer_len": plan.buffer_len,
            "stride": plan.stride,
            "slots": plan.slots,
            "chain": plan.chain,
            "pieces": plan.shape.pieces,
            "header_apart": int(plan.shape.header_apart),
            "indirect": int(plan.shape.indirect),
            "tables": tables.addr,
            "tables_gpa": tables.gpa,
            "free": self._free.ctypes.data,
            "busy": self._busy.ctypes.data,
        }.items():
            ring[name] = value
        self.clear(0)

    def clear(self, start: int) -> None:
        """Empty the ring, both indexes at `start`, as a driver does at a reset."""
        ring = self.ring
        size = self.plan.size
        for area, length in (
            ("desc", DESC_SIZE * size),
            ("avail", avail_len(size)),
            ("used", used_len(size)),
        ):
            self._memory.view(int(ring[area]), length)[:] = 0
        for area, offset in (("avail", AVAIL_IDX), ("used", USED_IDX)):
            word = self._memory.view(int(ring[area]) + offset, 2)
            word[:] = np.frombuffer(start.to_bytes(2, "little"), np.uint8)
        for name in ("avail_idx", "published", "used_idx"):
            ring[name] = start
        self.all_free(start)
        self.buffers[:] = 0
        self.buffers[:, self.plan.buffer_len :] = _CANARY

    def all_free(self, position: int) -> None:
        """Nothing is out; the slot for `position` is taken first."""
        slots = self.plan.slots
        self._free[:] = (np.arange(slots) + position) % slots
        self._busy[:] = 0
        self.ring["free_head"], self.ring["free_tail"] = 0, slots

    @property
    def outstanding(self) -> int:
        """Chains that the device has."""
        return self.plan.slots - int(self.ring["free_tail"] - self.ring["free_head"])

    def device_position(self) -> int:
        """The used index, which is how far the device has come."""
        word = self._memory.view(int(self.ring["used"]) + USED_IDX, 2)
        return int.from_bytes(word.tobytes(), "little")

    @property
    def avail_entries(self) -> "np.ndarray[tuple[int], np.dtype[np.uint16]]":
        """The available ring's heads, by position."""
        addr = int(self.ring["avail"]) + AVAIL_RING
        return self._memory.view(addr, 2 * self.plan.size).view(np.uint16)

    @property
    def buffers(self) -> Records:
        """All buffers with what follows them, one a row."""
        plan = self.plan
        flat: Bytes = self._memory.view(
            int(self.ring["buffers"]), plan.stride * plan.slots
        )
        return flat.reshape(plan.slots, plan.stride)

    def overrun(self) -> int:
        """How many buffers the device wrote past the end of."""
        behind = self.buffers[:, self.plan.buffer_len :]
        return int(np.count_nonzero((behind != _CANARY).any(axis=1)))
