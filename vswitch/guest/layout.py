"""Where a guest's rings and buffers lie in its memory, and in which shapes.

`Shape` is how a frame is cut into descriptors. A real guest uses one or two; the odd
ones (one byte a descriptor, everything indirect) are for testing the device.
"""

from typing import Final, NamedTuple

import numpy as np

from ports.native import Record, Records
from ports.vhost.virtio import (
    DESC_F_WRITE,
    DESC_SIZE,
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_MRG_RXBUF,
    F_RING_PACKED,
    F_VERSION_1,
    NET_HDR_LEN,
    NET_HDR_LEN_LEGACY,
    avail_len,
    used_len,
)
from vswitch.guest import ring as driver
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
        """Guest memory that a ring of either format and its buffers take, generously."""
        tables = DESC_SIZE * self.shape.entries * self.size
        areas = DESC_SIZE * self.size + avail_len(self.size) + used_len(self.size)
        return self.stride * self.slots + tables + areas + 4 * PAGE


class Layout:
    """One virtqueue laid out in guest memory, and its driver's record."""

    def __init__(
        self,
        memory: GuestMemory,
        plan: RingShape,
        features: int,
        ring: Record,
        *,
        receives: bool,
    ) -> None:
        """Fill in `ring`, a row of DRIVER_RING, which has to outlive this.

        Raises:
            GuestError: The ring cannot be had with these features.
        """
        _check(plan, features)
        self.plan, self.ring, self._memory = plan, ring, memory
        capacity = 1 << (plan.slots - 1).bit_length()
        self._free, self._order, self._out = np.zeros((3, capacity), np.uint16)
        self._done = np.zeros(capacity, np.uint64)
        ring["packed"] = features & F_RING_PACKED != 0
        ring["size"] = plan.size
        desc, avail, used = (
            memory.allocate(length, align)
            for length, align in zip(
                driver.area_lengths(ring), (_LINE, _LINE, PAGE), strict=True
            )
        )
        entries = plan.shape.entries if plan.shape.indirect else 0
        tables = memory.allocate(DESC_SIZE * entries * plan.slots)
        buffers = memory.allocate(plan.stride * plan.slots)
        modern = features & (F_VERSION_1 | F_MRG_RXBUF | F_RING_PACKED)
        for name, value in {
            "desc": desc.addr,
            "avail": avail.addr,
            "used": used.addr,
            "event_idx": int(features & F_EVENT_IDX != 0),
            "in_order": int(features & F_IN_ORDER != 0),
            "mergeable": int(features & F_MRG_RXBUF != 0),
            "header_len": NET_HDR_LEN if modern else NET_HDR_LEN_LEGACY,
            "write": DESC_F_WRITE if receives else 0,
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
            "out": self._out.ctypes.data,
            "queue_mask": capacity - 1,
            "free": self._free.ctypes.data,
            "order": self._order.ctypes.data,
            "done": self._done.ctypes.data,
        }.items():
            ring[name] = value
        self.clear(0)

    def clear(self, start: int) -> None:
        """Empty the ring, as a driver does at a reset.

        Both sides stand where they are after `start` descriptors; that is the index
        itself of a split ring.
        """
        ring = self.ring
        areas = ("desc", "avail", "used")
        for area, length in zip(areas, driver.area_lengths(ring), strict=True):
            self._memory.view(int(ring[area]), length)[:] = 0
        driver.begin(ring, start)
        self.all_free()
        self.buffers[:] = 0
        self.buffers[:, self.plan.buffer_len :] = _CANARY

    def all_free(self) -> None:
        """Nothing is out; the slot of the next position is taken first."""
        slots, ring = self.plan.slots, self.ring
        self._free[:slots] = (np.arange(slots) + int(ring["avail_idx"])) % slots
        self._out[:] = 0
        for queue in ("free", "order", "done"):
            ring[f"{queue}_head"] = ring[f"{queue}_tail"] = 0
        ring["free_tail"] = slots

    @property
    def outstanding(self) -> int:
        """Chains that are not free: the device has them, or nobody looked at them yet."""
        return self.plan.slots - int(self.ring["free_tail"] - self.ring["free_head"])

    def device_position(self) -> int:
        """How far the device has come, as SET_VRING_BASE has it.

        Split: the used index. Packed: index and lap, in both halves, and only while
        nobody else uses the ring.
        """
        return driver.device_position(self.ring)

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


def _check(plan: RingShape, features: int) -> None:
    if plan.shape.indirect and not features & F_INDIRECT_DESC:
        raise GuestError(
            "cannot use indirect descriptors: the switch did not offer them"
        )
    if plan.size & (plan.size - 1) and not features & F_RING_PACKED:
        raise GuestError(
            f"cannot use split rings of {plan.size} descriptors: it is not a power of "
            "two (use packed=True or another queue_size)"
        )
    if not plan.slots:
        raise GuestError(
            f"cannot use rings of {plan.size} descriptors: a frame takes {plan.chain} "
            "(use a larger queue_size)"
        )
