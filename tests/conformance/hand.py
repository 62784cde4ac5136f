"""Guests whose rings are written by hand, on ports of a running switch.

The rings are those of the data path's tests; here they lie in a memfd and are told to
the switch by a front-end, as a real guest's are.
"""

import mmap
import os
import struct
from typing import NamedTuple

import numpy as np

from ports.vhost.messages import MemoryRegion, MemTable, Request, VringFd
from tests.datapath import packed_rings, rings
from tests.switch import wait_for
from vswitch.guest.frontend import DEFAULT_ORDER, Frontend, RingSetup, eventfd

PROTOCOL_FEATURES = 1 << 30
RX, TX = 0, 1  # the guest's virtqueues


class Ends(NamedTuple):
    """The event descriptors of one ring."""

    kick: int
    call: int
    err: int


class _Wired:
    """What a ring of a hand-made guest has beside its driver's half."""

    def _attach(self, number, start=None):
        self.index = number
        self.ends = self.guest.ends[number]

    def kick(self):
        os.eventfd_write(self.ends.kick, 1)

    def calls(self):
        """How often we were called since the last time."""
        return _read(self.ends.call)

    def errors(self):
        """How often the ring was reported broken."""
        return _read(self.ends.err)

    def wait_back(self, count=1):
        """Wait until `count` chains came back; what `reap` says of them."""
        back = []

        def reaped():
            back.extend(self.reap())
            return len(back) >= count

        wait_for(reaped, lambda: f"{count} chains, there are {back}")
        return back


def _read(fd):
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


class HandSide(_Wired, rings.Side):
    """One split virtqueue."""

    def offer(self, *heads):
        super().offer(*heads)
        self.kick()

    def jump(self, by):
        """Claim `by` more heads than were written."""
        self.offered = (self.offered + by) & 0xFFFF
        self.guest.write(self.avail + 2, struct.pack("<H", self.offered))
        self.kick()

    def used_idx(self):
        """As it is twice in a row: of its two bytes one may be read before a store."""
        last, now = None, self._read_used_idx()
        while now != last:
            last, now = now, self._read_used_idx()
        return now

    def _read_used_idx(self):
        return struct.unpack("<H", self.guest.read(self.used + 2, 2))[0]

    def addresses(self):
        return self.desc, self.avail, self.used


class PackedHandSide(_Wired, packed_rings.PackedSide):
    """One packed virtqueue."""

    def offer(self, chain_id, *parts):
        super().offer(chain_id, *parts)
        self.kick()

    def addresses(self):
        return self.desc, self.driver, self.device


class _Attached:
    """A guest's memory and its front-end."""

    def _set_up(self, path, features, size, va, gpa, memory):
        self.path, self.size, self.features = path, size, features
        self.length = memory
        self.fd = os.memfd_create("by-hand", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, memory)
        self.memory = np.frombuffer(mmap.mmap(self.fd, memory), np.uint8)
        self.va = int(self.memory.ctypes.data) if va is None else va
        self.table = MemTable((MemoryRegion(gpa, memory, self.va, 0),))
        self.ends = [Ends(eventfd(), eventfd(), eventfd()) for _ in (RX, TX)]
        self.frontend = None

    @property
    def sides(self):
        return self.rx, self.tx

    def connect(self, **options):
        self.frontend = Frontend.connect(self.path, **options)
        return self.frontend

    def open(self, order=DEFAULT_ORDER):
        """Attach as QEMU does."""
        self.connect().negotiate(self.features)
        self.tell_memory()
        self.start(order)

    def tell_memory(self, table=None):
        table = table or self.table
        self.frontend.set_memory(table, [self.fd] * len(table.regions))

    def start(self, order=DEFAULT_ORDER, bases=None):
        """Start both rings, where they stand or where `bases` claim that they do."""
        for side, base in zip(self.sides, bases or self.positions(), strict=True):
            err = VringFd(side.index, has_fd=True)
            self.frontend.request(Request.SET_VRING_ERR, err, [side.ends.err])
            self.frontend.start_ring(self.setup(side, base), order)

    def setup(self, side, base):
        desc, avail, used = (self.va + offset for offset in side.addresses())
        return RingSetup(
            index=side.index,
            size=self.size,
            base=base,
            desc=desc,
            avail=avail,
            used=used,
            kick_fd=side.ends.kick,
            call_fd=side.ends.call,
        )

    def stop(self):
        """Stop both rings; what GET_VRING_BASE says of each."""
        return [self.frontend.stop_ring(side.index) for side in self.sides]

    def hang_up(self):
        if self.frontend is not None:
            self.frontend.close()
            self.frontend = None

    def close(self):
        """Hang up and close what is ours."""
        self.hang_up()
        if self.fd >= 0:
            for fd in (*self.ends[RX], *self.ends[TX]):
                os.close(fd)
            os.close(self.fd)
            self.fd = -1


class HandGuest(_Attached, rings.Guest):
    """A guest with split rings."""

    def __init__(
        self,
        path,
        *,
        features=rings.DEFAULT | PROTOCOL_FEATURES,
        size=16,
        header_len=12,
        va=None,
        gpa=rings.GPA,
        memory=rings.MEMORY,
    ):
        self.gpa, self.header_len = gpa, header_len
        self._set_up(path, features, size, va, gpa, memory)
        self.lay_out()

    def lay_out(self):
        """Empty rings, as a driver makes them at a reset."""
        self.rx, self.tx = HandSide(self, RX, 0), HandSide(self, TX, 0x10000)

    def positions(self):
        return [side.used_idx() for side in self.sides]


class PackedHandGuest(_Attached, packed_rings.PackedGuest):
    """A guest with packed rings; they start at a position of the caller's."""

    def __init__(
        self,
        path,
        *,
        features=packed_rings.DEFAULT | PROTOCOL_FEATURES,
        size=16,
        begin=packed_rings.LAP,
        memory=packed_rings.MEMORY,
    ):
        self.begin = begin
        self._set_up(path, features, size, None, packed_rings.GPA, memory)
        self.rx = PackedHandSide(self, RX, 0, begin)
        self.tx = PackedHandSide(self, TX, 0x10000, begin)

    def positions(self):
        return [self.begin, self.begin]
