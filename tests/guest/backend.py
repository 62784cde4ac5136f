"""A back-end in a thread that echoes each frame: messages by `struct`, naive rings.

It answers as the vhost-user spec says and notes every request, so that tests can look at
what the front-end said and in which order.
"""

import mmap
import os
import select
import socket
import struct
import threading

from tests import naive
from tests.guest.naive_packed import RING_PACKED, PackedRing

FEATURES = sum(1 << bit for bit in (15, 22, 28, 29, 30, 32, 34, 35))
PROTOCOL_FEATURES = 1 << 30
PROTOCOL = 1 << 0 | 1 << 3  # MQ, REPLY_ACK
GET_FEATURES, SET_FEATURES, SET_MEM_TABLE = 1, 2, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL = 12, 13
GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 17, 18


class EchoBackend(threading.Thread):
    """Serves one connected socket until it closes."""

    def __init__(self, sock, offered=FEATURES, protocol=PROTOCOL, refuse=()):
        super().__init__(daemon=True)
        self.sock, self.offered, self.protocol = sock, offered, protocol
        self.refuse = refuse
        self.log = []  # (request, payload)
        self.features = 0
        self.memory = None
        self.setup = {}  # index -> what is known of the ring
        self.rings = {}
        self.devices = {}
        self.error = None
        self.kicked = 0

    def run(self):
        try:
            while self._step():
                pass
        except Exception as error:  # noqa: BLE001 the test looks at it
            self.error = error
        finally:
            self._forget()
            self.sock.close()

    def _forget(self):
        self.rings, self.devices, self.memory = {}, {}, None
        for ring in self.setup.values():
            for name in ("kick", "call"):
                if name in ring:
                    os.close(ring.pop(name))

    def finish(self):
        self.join(60)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error

    def _step(self):
        kicks = {self.setup[i]["kick"] for i in self.rings}
        ready, _, _ = select.select([self.sock, *kicks], [], [], 60)
        assert ready, "nothing came for 60 s"
        for fd in kicks & set(ready):
            os.eventfd_read(fd)
            self.kicked += 1
        if self.sock in ready and not self._message():
            return False
        self._serve()
        return True

    def _serve(self):
        for tx in [i for i in self.rings if i % 2 and i - 1 in self.rings]:
            enabled = self.setup[tx].get("on") and self.setup[tx - 1].get("on")
            if self.features & PROTOCOL_FEATURES and not enabled:
                continue
            rings = self.rings[tx - 1], self.rings[tx]
            if tx not in self.devices:
                self.devices[tx] = naive.Device(*rings, self.features)
            while not self._turn(self.devices[tx], tx):
                pass

    def _turn(self, device, tx):
        """Move what can be moved; True if nothing was added meanwhile."""
        device.waiting += device.collect()
        device.deliver()
        for ring, index in ((device.rx, tx - 1), (device.tx, tx)):
            if ring.next_used != ring.signalled and ring.publish():
                os.eventfd_write(self.setup[index]["call"], 1)
        # Both, whatever the first says: each asks for kicks.
        return all([ring.is_quiet() for ring in (device.rx, device.tx)])  # noqa: C419

    def _message(self):
        head, fds, _, _ = socket.recv_fds(self.sock, 12, 8)
        if not head:
            return False
        request, flags, size = struct.unpack("=III", head)
        assert flags in (1, 9)
        data = self.sock.recv(size, socket.MSG_WAITALL) if size else b""
        self.log.append((request, data))
        reply = self._handle(request, data, fds)
        if reply is None and flags & 8:
            reply = struct.pack("=Q", request in self.refuse)
        if reply is not None:
            self.sock.sendall(struct.pack("=III", request, 5, len(reply)) + reply)
        return True

    def _handle(self, request, data, fds):
        reply = None
        if request == GET_FEATURES:
            reply = struct.pack("=Q", self.offered)
        elif request == GET_PROTOCOL_FEATURES:
            reply = struct.pack("=Q", self.protocol)
        elif request == GET_QUEUE_NUM:
            reply = struct.pack("=Q", 4)
        elif request == SET_FEATURES:
            (self.features,) = struct.unpack("=Q", data)
        elif request == SET_MEM_TABLE:
            self._map(data, fds)
        elif request == GET_VRING_BASE:
            index, _ = struct.unpack("=II", data)
            reply = struct.pack("=II", index, self._base(self.rings.pop(index)))
            self.devices.pop(index | 1, None)
            del self.setup[index]["base"]  # the next one starts it again
        elif request in (SET_VRING_KICK, SET_VRING_CALL):
            (word,) = struct.unpack("=Q", data)
            self._known(word & 0xFF, kick_or_call(request), *fds)
        elif request == SET_VRING_ADDR:
            index, _, desc, used, avail, _ = struct.unpack("=IIQQQQ", data)
            self._known(index, "areas", (desc, avail, used))
        elif request in (SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE):
            index, value = struct.unpack("=II", data)
            names = {SET_VRING_NUM: "num", SET_VRING_BASE: "base"}
            self._known(index, names.get(request, "on"), value)
        return reply

    def _map(self, data, fds):
        (count,) = struct.unpack_from("=I", data)
        regions = []
        for n, fd in zip(range(count), fds, strict=True):
            gpa, size, va, offset = struct.unpack_from("=QQQQ", data, 8 + 32 * n)
            regions.append((gpa, va, memoryview(mmap.mmap(fd, size, offset=offset))))
            os.close(fd)
        self.memory = naive.Memory(regions)

    def _known(self, index, name, value):
        ring = self.setup.setdefault(index, {})
        if name in ("kick", "call") and name in ring:
            os.close(ring[name])
        ring[name] = value
        needed = {"kick", "call", "num", "areas", "base"}
        if index in self.rings or not needed <= set(ring) or not self.memory:
            return
        areas = [self.memory.gpa_of(va) for va in ring["areas"]]
        arguments = (self.memory, ring["num"], *areas, self.features)
        if self.features & RING_PACKED:
            self.rings[index] = PackedRing(*arguments, ring["base"] & 0xFFFF)
            assert ring["base"] >> 16 == ring["base"] & 0xFFFF
        else:
            self.rings[index] = naive.Ring(*arguments)

    def _base(self, ring):
        if self.features & RING_PACKED:
            return ring.next_used << 16 | ring.next_avail
        return ring.next_avail


def kick_or_call(request):
    return "kick" if request == SET_VRING_KICK else "call"
