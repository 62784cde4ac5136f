"""The kernel's vhost-net as its driver sees it: memory, two rings, a thread that moves.

Written from virtio 1.2 §2.7 and §5.1.6 with `struct`, knowing nothing of the driver.
"""

import mmap
import os
import struct

import numpy as np

from ports import vhost_net_memory as memory
from ports.base import KIND_VHOST_NET, RING_RUNNING
from ports.vhost.features import RECEIVER, SENDER

HEADER_LEN = 12
# As after some use, and a lap before an index that is 0 again.
START_RX = 65536 - memory.SLOTS
START_TX = 65530


class Vring:
    """One ring from the device's side."""

    def __init__(self, net, area, size, start):
        self.net, self.area, self.size = net, area, size
        self.seen = start  # of avail.idx
        net.write(area.used + 2, struct.pack("<H", start))
        offered = (self.avail_idx() + start) & 0xFFFF
        net.write(area.avail + 2, struct.pack("<H", offered))
        self.signal = os.eventfd(0, os.EFD_NONBLOCK)
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)
        self.sleep()

    def avail_idx(self):
        return self.net.word("<H", self.area.avail + 2)

    def waiting(self):
        """Chains that were offered and not looked at."""
        return (self.avail_idx() - self.seen) & 0xFFFF

    def peek(self, ahead=0):
        """(head, address, length, flags) of a chain, all in one descriptor."""
        place = (self.seen + ahead) % self.size
        head = self.net.word("<H", self.area.avail + 4 + 2 * place)
        addr, length, flags, _ = self.net.word("<QIHH", self.area.desc + 16 * head)
        assert not flags & 1
        return head, addr - self.net.addr, length, flags

    def use(self, elements):
        """Publish (head, length) of chains; the driver is signalled if it asked."""
        old = self.net.word("<H", self.area.used + 2)
        for n, (head, length) in enumerate(elements):
            place = (old + n) % self.size
            at = self.area.used + 4 + 8 * place
            self.net.write(at, struct.pack("<II", head, length))
        new = (old + len(elements)) & 0xFFFF
        self.net.write(self.area.used + 2, struct.pack("<H", new))
        event = self.net.word("<H", self.area.avail + 4 + 2 * self.size)
        if (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF:
            os.eventfd_write(self.signal, 1)

    def sleep(self):
        """Ask to be woken by the next chain."""
        at = self.area.used + 4 + 8 * self.size
        self.net.write(at, struct.pack("<H", self.seen))


class VhostNet:
    """Both rings, in memory that the driver prepared."""

    def __init__(self):
        self.memory = mmap.mmap(-1, memory.LENGTH)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        self.addr = self.bytes.ctypes.data
        memory.prepare(self.memory, self.addr)
        self.rx = Vring(self, memory.RECEIVE, memory.SLOTS, START_RX)
        self.tx = Vring(self, memory.TRANSMIT, memory.SLOTS, START_TX)

    def close(self):
        for ring in (self.rx, self.tx):
            os.close(ring.signal)
            os.close(ring.wake)

    def word(self, layout, at):
        values = struct.unpack_from(layout, self.memory, at)
        return values if len(values) > 1 else values[0]

    def write(self, at, data):
        self.memory[at : at + len(data)] = data

    def read(self, addr, length):
        """Bytes at an address."""
        at = addr - self.addr
        assert 0 <= at <= at + length <= len(self.memory)
        return self.memory[at : at + length]

    def addr_of(self, ring, slot):
        """Offset of a slot."""
        return self.word("<Q", ring.area.desc + 16 * slot) - self.addr

    def attach(self, port, rx, tx):
        """Be what a port's records lead to; its rings run."""
        port["kind"], port["up"], port["pairs"] = KIND_VHOST_NET, 1, 1
        port["offloads"] = RECEIVER
        for ring, side in ((rx, self.rx), (tx, self.tx)):
            for part in ("desc", "avail", "used"):
                ring[part] = self.addr + getattr(side.area, part)
            ring["size"], ring["next_used"] = side.size, side.seen
            ring["kick_fd"], ring["call_fd"] = side.signal, side.wake
            ring["header_len"], ring["features"] = HEADER_LEN, SENDER
            ring["state"], ring["enabled"] = RING_RUNNING, 1

    # --- what the thread does ---

    def deliver(self, frame, header=bytes(HEADER_LEN)):
        """Fill offered buffers with a frame; False if there are not enough."""
        ring = self.rx
        data = bytearray(header + frame)
        elements = []
        begin = 0
        while begin < len(data):
            if len(elements) == ring.waiting():
                return False
            head, at, length, flags = ring.peek(len(elements))
            assert flags == 2
            part = min(length, len(data) - begin)
            elements.append((head, part, at, begin))
            begin += part
        data[10:12] = struct.pack("<H", len(elements))
        for _, part, at, begin in elements:
            self.write(at, bytes(data[begin : begin + part]))
        ring.seen = (ring.seen + len(elements)) & 0xFFFF
        ring.use([(head, part) for head, part, _, _ in elements])
        return True

    def send(self, most=1 << 16):
        """Take up to `most` frames, in order; (header, frame) of each."""
        ring, sent, elements = self.tx, [], []
        while ring.waiting() and len(sent) < most:
            head, at, length, flags = ring.peek()
            assert flags == 0
            data = self.memory[at : at + length]
            sent.append((data[:HEADER_LEN], data[HEADER_LEN:]))
            elements.append((head, 0))
            ring.seen = (ring.seen + 1) & 0xFFFF
        ring.use(elements)
        return sent


def count(fd):
    """How often an eventfd was written since the last time."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
