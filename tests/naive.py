"""The device side of virtio-net and the switch, written as plainly as possible.

What the real ones do with bursts, records and one copy, this does with `struct`, byte
strings, a deque and a dict, straight from the spec. It is slow and obviously right.
"""

import struct
from collections import deque

NEXT, WRITE, INDIRECT = 1, 2, 4
MRG_RXBUF, EVENT_IDX, VERSION_1 = 1 << 15, 1 << 29, 1 << 32


class Memory:
    """Guest memory by guest-physical address; regions as (gpa, va, bytes-like)."""

    def __init__(self, regions):
        self.regions = regions

    def _find(self, gpa):
        for start, _, data in self.regions:
            if start <= gpa < start + len(data):
                return data, gpa - start
        raise AssertionError(f"guest-physical address {gpa:#x} is in no region")

    def gpa_of(self, va):
        for gpa, start, data in self.regions:
            if start <= va < start + len(data):
                return gpa + va - start
        raise AssertionError(f"address {va:#x} is in no region")

    def read(self, gpa, length):
        out = b""
        while len(out) < length:
            data, at = self._find(gpa + len(out))
            out += bytes(data[at : at + length - len(out)])
        return out

    def write(self, gpa, content):
        done = 0
        while done < len(content):
            data, at = self._find(gpa + done)
            part = content[done : done + len(data) - at]
            data[at : at + len(part)] = part
            done += len(part)

    def u16(self, gpa):
        return struct.unpack("<H", self.read(gpa, 2))[0]

    def put_u16(self, gpa, value):
        self.write(gpa, struct.pack("<H", value & 0xFFFF))


class Chain:
    def __init__(self, head):
        self.head, self.readable, self.writable = head, [], []

    @property
    def room(self):
        return sum(length for _, length in self.writable)


class Ring:
    """One split virtqueue (virtio 1.2 §2.7), addresses guest-physical."""

    def __init__(self, memory, size, desc, avail, used, features=0):
        self.memory, self.size, self.features = memory, size, features
        self.desc, self.avail, self.used = desc, avail, used
        self.next_avail = self.next_used = memory.u16(used + 2)
        self.seen = self.next_avail
        self.signalled = None

    def pending(self):
        self.seen = self.memory.u16(self.avail + 2)
        return (self.seen - self.next_avail) & 0xFFFF

    def take(self):
        slot = self.avail + 4 + 2 * (self.next_avail % self.size)
        self.next_avail = (self.next_avail + 1) & 0xFFFF
        chain = Chain(self.memory.u16(slot))
        self._walk(chain, self.desc, chain.head, self.size)
        return chain

    def _walk(self, chain, table, index, limit):
        for _ in range(limit):
            assert index < limit
            entry = self.memory.read(table + 16 * index, 16)
            gpa, length, flags, index = struct.unpack("<QIHH", entry)
            if flags & INDIRECT:
                assert not flags & NEXT
                assert length % 16 == 0
                assert length
                self._walk(chain, gpa, 0, length // 16)
                return
            assert length
            (chain.writable if flags & WRITE else chain.readable).append((gpa, length))
            if not flags & NEXT:
                return
        raise AssertionError("the chain does not end")

    def give(self, head, written):
        slot = self.used + 4 + 8 * (self.next_used % self.size)
        self.memory.write(slot, struct.pack("<II", head, written))
        self.next_used = (self.next_used + 1) & 0xFFFF

    def publish(self):
        """Show the used entries; True if the driver wants a call."""
        self.memory.put_u16(self.used + 2, self.next_used)
        old, self.signalled = self.signalled, self.next_used
        if not self.features & EVENT_IDX:
            wanted = not self.memory.u16(self.avail) & 1
        elif old is None:
            wanted = True
        else:
            event = self.memory.u16(self.avail + 4 + 2 * self.size)
            # Obvious: was the entry with number `event` among those just shown?
            shown = [(old + i) & 0xFFFF for i in range((self.next_used - old) & 0xFFFF)]
            wanted = event in shown
        return wanted

    def is_quiet(self):
        """Ask to be kicked for more than we saw; False: more is there already."""
        if self.features & EVENT_IDX:
            self.memory.put_u16(self.used + 4 + 8 * self.size, self.seen)
        else:
            self.memory.put_u16(self.used, 0)
        return self.memory.u16(self.avail + 2) == self.seen


class Device:
    """A network device: frames from the guest, a queue of frames for it."""

    def __init__(self, rx, tx, features):
        self.rx, self.tx, self.features = rx, tx, features  # the guest's words
        modern = features & (VERSION_1 | MRG_RXBUF)
        self.header_len = 12 if modern else 10
        self.waiting = deque()

    def collect(self):
        """Frames that the guest has offered for transmission."""
        frames = []
        while self.tx.pending():
            chain = self.tx.take()
            assert not chain.writable
            data = b"".join(self.tx.memory.read(*part) for part in chain.readable)
            assert data[: self.header_len] == bytes(self.header_len)
            frames.append(data[self.header_len :])
            self.tx.give(chain.head, 0)
        return frames

    def deliver(self):
        """Put waiting frames into receive buffers as far as those go; how many."""
        done = 0
        self.rx.pending()
        while self.waiting and self._put(self.waiting[0]):
            self.waiting.popleft()
            done += 1
        return done

    def _put(self, frame):
        need = self.header_len + len(frame)
        mergeable = self.features & MRG_RXBUF
        before = self.rx.next_avail
        chains = []
        while sum(chain.room for chain in chains) < need:
            if not self.rx.pending() or (chains and not mergeable):
                self.rx.next_avail = before
                return False
            chains.append(self.rx.take())
            assert not chains[-1].readable
        header = bytes(10) + struct.pack("<H", len(chains))
        data = header[: self.header_len] + frame
        for chain in chains:
            written = min(chain.room, len(data))
            for gpa, length in chain.writable:
                self.rx.memory.write(gpa, data[:length])
                data = data[length:]
            self.rx.give(chain.head, written)
        return True


class Switch:
    """A learning bridge (IEEE 802.1Q §8.7, §8.8) without ageing, in a dict."""

    def __init__(self, ports):
        self.ports, self.table = ports, {}

    def forward(self, ingress, frame):
        """The ports that get a copy, and the word that the frame is counted under."""
        dst, src = frame[:6], frame[6:12]
        if src == bytes(6) or src[0] & 1:
            return [], "rx_drop_bad_source"
        self.table[src] = ingress
        egress = None if dst[0] & 1 else self.table.get(dst)
        if egress is None:
            return [port for port in self.ports if port != ingress], "rx_flooded"
        if egress == ingress:
            return [], "rx_drop_hairpin"
        return [egress], "rx_forwarded"
