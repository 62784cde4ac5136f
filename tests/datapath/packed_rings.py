"""A packed virtqueue laid out by hand, driver side, from virtio 1.2 §2.8 alone."""

import os
import struct

import numpy as np

from ports.base import KIND_VHOST_USER, MAX_REGIONS, NO_FD, RING_STARTING
from ports.vhost.virtio import (
    F_INDIRECT_DESC,
    F_MRG_RXBUF,
    F_RING_PACKED,
    F_VERSION_1,
)

MEMORY = 1 << 20
GPA = 0x1_0000_0000
RINGS_PER_PORT = 16
NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15
DEFAULT = F_VERSION_1 | F_MRG_RXBUF | F_INDIRECT_DESC | F_RING_PACKED
LAP = 1 << 15


class PackedSide:
    """One virtqueue: what its driver writes, and what came back."""

    def __init__(self, guest, number, offset, start):
        self.guest, self.size = guest, guest.size
        self.desc, self.driver, self.device = offset, offset + 0x8000, offset + 0x8010
        self.next, self.lap = start & ~LAP, start >> 15
        self.seen, self.seen_lap = self.next, self.lap
        self.lengths = {}  # id: slots of its chain
        # As if everything up to `start` had been offered and used before.
        for index in range(self.size):
            lap = self.lap if index < self.next else 1 - self.lap
            flags = (AVAIL | USED) * lap
            guest.write(offset + 16 * index, struct.pack("<QIHH", 0, 0, 0, flags))
        self._attach(number, start)

    def _attach(self, number, start):
        guest = self.guest
        row = guest.slot * RINGS_PER_PORT + number
        self.record = guest.plane.shared.rings[row]
        base = guest.memory.ctypes.data
        for name, value in {
            "state": RING_STARTING,
            "enabled": 1,
            "owner": 0,
            "port": guest.slot,
            "number": row,
            "packed": 1,
            "size": self.size,
            "header_len": 12,
            "features": guest.features,
            "desc": base + self.desc,
            "avail": base + self.driver,
            "used": base + self.device,
            "next_avail": start,
            "next_used": start,
            "signalled_used": start,
            "kick_fd": NO_FD,
            "call_fd": guest.call_fd,
            "err_fd": NO_FD,
        }.items():
            self.record[name] = value

    @property
    def position(self):
        return self.next | self.lap << 15

    def offer(self, chain_id, *parts):
        """Offer one chain of (gpa, length, flags)."""
        first, first_flags = self.next, 0
        for at, (gpa, length, flags) in enumerate(parts):
            more = NEXT if at + 1 < len(parts) else 0
            whole = flags | more | (AVAIL if self.lap else USED)
            slot = self.desc + 16 * self.next
            self.guest.write(slot, struct.pack("<QIH", gpa, length, chain_id))
            if at:
                self.guest.write(slot + 14, struct.pack("<H", whole))
            else:
                first_flags = whole
            self._step()
        self.lengths[chain_id] = len(parts)
        # The chain's first flags last: only now it is there.
        self.guest.write(self.desc + 16 * first + 14, struct.pack("<H", first_flags))

    def _step(self):
        self.next += 1
        if self.next == self.size:
            self.next, self.lap = 0, 1 - self.lap

    def reap(self):
        """(id, len, WRITE or 0) of each chain that came back since the last time."""
        back = []
        while True:
            raw = self.guest.read(self.desc + 16 * self.seen, 16)
            _, length, chain_id, flags = struct.unpack("<QIHH", raw)
            if (
                bool(flags & AVAIL) != self.seen_lap
                or bool(flags & USED) != self.seen_lap
            ):
                return back
            back.append((chain_id, length, flags & WRITE))
            self.seen += self.lengths.pop(chain_id)
            if self.seen >= self.size:
                self.seen -= self.size
                self.seen_lap = 1 - self.seen_lap

    def set_driver_event(self, flags, off_wrap=0):
        self.guest.write(self.driver, struct.pack("<HH", off_wrap, flags))

    def device_event(self):
        """off_wrap and flags of the device's event area."""
        return struct.unpack("<HH", self.guest.read(self.device, 4))


class PackedGuest:
    """Port `slot` of a plane, up, with both rings starting near a wrap."""

    def __init__(self, plane, slot, features=DEFAULT, size=16, start=None):
        start = max(size - 2, 0) | LAP if start is None else start
        self.plane, self.slot, self.size, self.features = plane, slot, size, features
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.memory = np.zeros(MEMORY, np.uint8)
        row = slot * 2 * MAX_REGIONS
        region = plane.shared.regions[row]
        region["gpa"], region["size"] = GPA, MEMORY
        region["addr"] = self.memory.ctypes.data
        port = plane.shared.ports[slot]
        port["kind"], port["up"], port["pairs"] = KIND_VHOST_USER, 1, 1
        port["regions"] = row << 8 | 1
        self.rx = PackedSide(self, 0, 0, start)
        self.tx = PackedSide(self, 1, 0x10000, start)

    def close(self):
        os.close(self.call_fd)

    def write(self, offset, data):
        self.memory[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def read(self, offset, length):
        return bytes(self.memory[offset : offset + length])

    def put(self, offset, data):
        self.write(offset, data)
        return GPA + offset

    def send(self, frame, chain_id=0, offset=0x20000):
        data = bytes(12) + frame
        self.tx.offer(chain_id, (self.put(offset, data), len(data), 0))

    def post(self, count, length=2048, base=0x40000):
        for i in range(count):
            self.rx.offer(i, (GPA + base + i * length, length, WRITE))

    def buffer(self, index, length, size=2048, base=0x40000):
        return self.read(base + index * size, length)

    def calls(self):
        try:
            return os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0
