"""The device side of a packed virtqueue (virtio 1.2 §2.8), as plainly as possible.

The same methods as `tests.naive.Ring`, so that `tests.naive.Device` can use either.
"""

import struct

from tests.naive import EVENT_IDX, INDIRECT, NEXT, WRITE, Chain

AVAIL, USED = 1 << 7, 1 << 15
RING_PACKED = 1 << 34
ENABLE, DISABLE, DESC = 0, 1, 2
LAP = 1 << 15


class PackedRing:
    """One virtqueue, addresses guest-physical; positions are index | lap << 15."""

    def __init__(self, memory, size, desc, driver, device, features=0, base=LAP):
        self.memory, self.size, self.features = memory, size, features
        self.desc, self.driver, self.device = desc, driver, device
        self.next_avail = self.next_used = base
        self.seen = base
        self.signalled = None
        self._spans = {}  # id: descriptors in the ring
        self._written = []  # used descriptors that are not shown yet

    def after(self, position, count=1):
        index, lap = (position & ~LAP) + count, position & LAP
        if index >= self.size:
            index, lap = index - self.size, lap ^ LAP
        return index | lap

    def _entry(self, position):
        at = self.desc + 16 * (position & ~LAP)
        return struct.unpack("<QIHH", self.memory.read(at, 16))

    def pending(self):
        self.seen = self.next_avail
        for _ in range(self.size):
            self.seen = self.after(self.seen, self._is_offered(self.seen))
        return self.seen != self.next_avail

    def _is_offered(self, position):
        flags, lap = self._entry(position)[3], bool(position & LAP)
        return bool(flags & AVAIL) == lap and bool(flags & USED) != lap

    def take(self):
        chain = Chain(None)
        for count in range(1, self.size + 1):
            assert self._is_offered(self.next_avail)
            gpa, length, chain.head, flags = self._entry(self.next_avail)
            self.next_avail = self.after(self.next_avail)
            if flags & INDIRECT:
                assert (count, flags & NEXT, length % 16) == (1, 0, 0)
                self._walk_table(chain, gpa, length)
            else:
                self._add(chain, gpa, length, flags)
            if not flags & NEXT:
                self._spans[chain.head] = count
                return chain
        raise AssertionError("the chain does not end")

    def _walk_table(self, chain, table, length):
        for at in range(table, table + length, 16):
            gpa, part, chain_id, flags = struct.unpack(
                "<QIHH", self.memory.read(at, 16)
            )
            assert (chain_id, flags & ~WRITE) == (0, 0)
            self._add(chain, gpa, part, flags)

    def _add(self, chain, gpa, length, flags):
        assert length
        if flags & WRITE:
            chain.writable.append((gpa, length))
        else:
            assert not chain.writable
            chain.readable.append((gpa, length))

    def give(self, head, written, skipped=()):
        """Use a chain; with IN_ORDER, `skipped` ones before it come with it."""
        flags = (AVAIL | USED) if self.next_used & LAP else 0
        flags |= WRITE if written else 0
        # Without WRITE the length says nothing.
        length = written or 0xFFFFFFFF
        at = self.desc + 16 * (self.next_used & ~LAP)
        self._written.append((at, struct.pack("<QIH", 0, length, head), flags))
        for chain in (*skipped, head):
            count = self._spans.pop(chain, 1)
            self.next_used = self.after(self.next_used, count)

    def publish(self):
        """Show the used descriptors; True if the driver wants a call."""
        for at, data, _ in self._written:
            self.memory.write(at, data)
        for at, _, flags in reversed(self._written):
            self.memory.put_u16(at + 14, flags)
        self._written = []
        old, self.signalled = self.signalled, self.next_used
        event, flags = struct.unpack("<HH", self.memory.read(self.driver, 4))
        assert flags in (ENABLE, DISABLE, DESC)
        assert flags != DESC or self.features & EVENT_IDX
        if flags != DESC or old is None:
            return flags != DISABLE
        while old != self.next_used:
            if old == event:
                return True
            old = self.after(old)
        return False

    def is_quiet(self):
        """Ask to be kicked for more than we saw; False: more is there already."""
        words = (self.seen, DESC) if self.features & EVENT_IDX else (0, ENABLE)
        self.memory.write(self.device, struct.pack("<HH", *words))
        return not self._is_offered(self.seen)
