"""A guest's memory and rings laid out by hand, to say exactly what a driver wrote.

Written from the spec with `struct`, knowing nothing of the device side.
"""

import os
import struct

import numpy as np

from ports.base import KIND_VHOST_USER, MAX_REGIONS, NO_FD, RING_STARTING
from ports.vhost.virtio import F_INDIRECT_DESC, F_MRG_RXBUF, F_VERSION_1

MEMORY = 1 << 20
GPA = 0x1_0000_0000
RINGS_PER_PORT = 16
NEXT, WRITE, INDIRECT = 1, 2, 4
DEFAULT = F_VERSION_1 | F_MRG_RXBUF | F_INDIRECT_DESC
START = 65530  # every test crosses the wrap


class Side:
    """One virtqueue: descriptor writes, offers, and what came back."""

    def __init__(self, guest, number, offset):
        self.guest, self.size = guest, guest.size
        self.desc = offset
        self.avail = offset + 16 * self.size
        self.used = self.avail + (6 + 2 * self.size + 63) // 64 * 64
        self.offered = self.seen = START
        guest.write(self.avail, struct.pack("<HH", 0, START))
        guest.write(self.used, struct.pack("<HH", 0, START))
        self._attach(number)

    def _attach(self, number):
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
            "size": self.size,
            "header_len": guest.header_len,
            "features": guest.features,
            "desc": base + self.desc,
            "avail": base + self.avail,
            "used": base + self.used,
            "kick_fd": NO_FD,
            "call_fd": guest.call_fd,
            "err_fd": NO_FD,
        }.items():
            self.record[name] = value

    def describe(self, index, gpa, length, flags=0, following=0):
        entry = struct.pack("<QIHH", gpa, length, flags, following)
        self.guest.write(self.desc + 16 * index, entry)

    def offer(self, *heads):
        for head in heads:
            slot = self.avail + 4 + 2 * (self.offered % self.size)
            self.guest.write(slot, struct.pack("<H", head))
            self.offered = (self.offered + 1) & 0xFFFF
        self.guest.write(self.avail + 2, struct.pack("<H", self.offered))

    def reap(self):
        """(id, len) of every chain that came back since the last time."""
        (idx,) = struct.unpack("<H", self.guest.read(self.used + 2, 2))
        back = []
        while self.seen != idx:
            slot = self.used + 4 + 8 * (self.seen % self.size)
            back.append(struct.unpack("<II", self.guest.read(slot, 8)))
            self.seen = (self.seen + 1) & 0xFFFF
        return back

    def set_used_event(self, value):
        self.guest.write(self.avail + 4 + 2 * self.size, struct.pack("<H", value))


class Guest:
    """Port `slot` of a plane, up, with both rings starting."""

    gpa = GPA

    def __init__(
        self, plane, slot, features=DEFAULT, size=16, header_len=12, memory=None
    ):
        self.plane, self.slot, self.size = plane, slot, size
        self.features, self.header_len = features, header_len
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.memory = np.zeros(MEMORY, np.uint8) if memory is None else memory
        row = slot * 2 * MAX_REGIONS
        region = plane.shared.regions[row]
        region["gpa"], region["size"] = self.gpa, len(self.memory)
        region["addr"] = self.memory.ctypes.data
        port = plane.shared.ports[slot]
        port["kind"], port["up"], port["pairs"] = KIND_VHOST_USER, 1, 1
        port["regions"] = row << 8 | 1
        self.rx = Side(self, 0, 0)
        self.tx = Side(self, 1, 0x10000)

    def close(self):
        os.close(self.call_fd)

    def write(self, offset, data):
        self.memory[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def read(self, offset, length):
        return bytes(self.memory[offset : offset + length])

    def put(self, offset, data):
        """Write `data` into guest memory; its guest-physical address."""
        self.write(offset, data)
        return self.gpa + offset

    def send(self, frame, index=0, offset=0x20000):
        """Offer one frame in the plainest shape."""
        data = bytes(self.header_len) + frame
        self.tx.describe(index, self.put(offset, data), len(data))
        self.tx.offer(index)

    def post(self, count, length=2048, base=0x40000):
        """Offer `count` receive buffers of `length` bytes, heads 0 to count - 1."""
        for i in range(count):
            self.rx.describe(i, self.gpa + base + i * length, length, WRITE)
        self.rx.offer(*range(count))

    def buffer(self, index, length, size=2048, base=0x40000):
        return self.read(base + index * size, length)

    def calls(self):
        try:
            return os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0


def mac(number):
    return bytes((0x52, 0x54, 0, 0, 0, number))


def frame_to(dst, src, length=64, fill=None):
    payload = fill if fill is not None else bytes(i % 251 for i in range(length - 14))
    return mac(dst) + mac(src) + b"\x88\xb5" + payload
