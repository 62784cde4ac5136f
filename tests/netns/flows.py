"""Streams and datagrams of the kernel's own between two namespaces, checked at the end.

Both run until told to stop, or until the `with` ends.
"""

import hashlib
import random
import select
import socket
import struct
import threading

_DATA = random.Random(1).randbytes(1 << 20)
_WAIT_S = 60
_PAUSE_S = 0.0005


class Connection:
    """TCP both ways at once; what came is compared by its hash with what was sent."""

    def __init__(self, near, far, address, port):
        with far.inside():
            listener = socket.create_server((address, port))
        with listener:
            listener.settimeout(_WAIT_S)
            with near.inside():
                one = socket.create_connection((address, port), _WAIT_S)
            other, _ = listener.accept()
        self.ends = (one, other)
        for end in self.ends:
            end.settimeout(_WAIT_S)
        self._ways = []

    def start(self):
        self._ways = [_Way(*self.ends), _Way(*self.ends[::-1])]

    @property
    def received(self):
        """Bytes that have come so far, each way."""
        return [way.received for way in self._ways]

    def stop(self):
        """End both ways; each brought just what was sent."""
        for way in self._ways:
            way.stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for end in self.ends:
            end.close()


class _Way:
    def __init__(self, source, target):
        self._source, self._target = source, target
        self._stopped = threading.Event()
        self._sent, self._came = hashlib.sha256(), hashlib.sha256()
        self._trouble = []
        self.received = 0
        self._threads = [
            threading.Thread(target=self._run, args=(work,), daemon=True)
            for work in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, work):
        try:
            work()
        except OSError as error:
            self._trouble.append(error)

    def _send(self):
        chance = random.Random(self._source.fileno())
        while not self._stopped.is_set():
            begin = chance.randrange(len(_DATA) - 1)
            data = _DATA[begin : begin + chance.randrange(1, 1 << 17)]
            self._source.sendall(data)
            self._sent.update(data)
        self._source.shutdown(socket.SHUT_WR)

    def _receive(self):
        while data := self._target.recv(1 << 17):
            self._came.update(data)
            self.received += len(data)

    def stop(self):
        self._stopped.set()
        for thread in self._threads:
            thread.join(_WAIT_S)
            assert not thread.is_alive(), f"stuck after {self.received} bytes"
        assert self._trouble == []
        assert self.received > 0
        assert self._came.hexdigest() == self._sent.hexdigest()


class Datagrams:
    """Numbered datagrams of several flows that should not overtake each other."""

    def __init__(self, near, far, addresses, port, flows):
        here, there = addresses
        self._target = (there, port)
        self._receiver = _udp(far, self._target)
        self._senders = [_udp(near, (here, 0)) for _ in range(flows)]
        self._stopped = threading.Event()
        self._sending = threading.Thread(target=self._send, daemon=True)
        self._sending.start()
        self.last = {}  # flow: number of its last datagram
        self.received = 0
        self.overtaken = []

    def _send(self):
        number = 0
        while not self._stopped.wait(_PAUSE_S):
            number += 1
            for sender in self._senders:
                sender.sendto(struct.pack("!Q", number), self._target)

    def look(self):
        """Look at what has come; how many have until now."""
        while select.select([self._receiver], [], [], 0)[0]:
            data, flow = self._receiver.recvfrom(64)
            (number,) = struct.unpack("!Q", data)
            if number <= self.last.get(flow, 0):
                self.overtaken.append((flow, self.last[flow], number))
            self.last[flow] = number
            self.received += 1
        return self.received

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._sending.join()
        for sock in (self._receiver, *self._senders):
            sock.close()


def _udp(namespace, address):
    with namespace.inside():
        it = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    it.bind(address)
    return it
