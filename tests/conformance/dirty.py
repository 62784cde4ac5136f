"""The front-end's side of migration: a log of pages, fetched while it is written.

A page whose bit was set is copied to a shadow of the guest's memory, as QEMU copies it
to the other side. What a device wrote must be the same in the shadow in the end.
"""

import mmap
import os
import threading

import numpy as np

from ports.native import jit, load_u64, swap_if_u64
from ports.vhost import virtio
from ports.vhost.messages import U64, Log, Request, VringAddr
from vswitch.guest.frontend import RingSetup

PAGE = 4096
GUARD = 0xA5


@jit
def fetch(log, words, out):
    """Take the bits of `words` words, atomically one by one; how many were not 0."""
    found = 0
    for n in range(words):
        addr = log + 8 * n
        bits = load_u64(addr)
        while bits != 0 and swap_if_u64(addr, bits, 0) != bits:
            bits = load_u64(addr)
        out[n] = bits
        found += bits != 0
    return found


class DirtyLog:
    """A log with a bit for each page below `highest`, between two guards in its file."""

    def __init__(self, highest, offset=PAGE):
        self.size = -(-highest // (64 * PAGE)) * 8
        self.offset = offset
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, offset + self.size + PAGE)
        self.file = np.frombuffer(mmap.mmap(self.fd, 0), np.uint8)
        self.bits = self.file[offset : offset + self.size]
        self.file[:] = GUARD
        self.bits[:] = 0
        self._words = np.zeros(self.size // 8, np.int64)

    @property
    def payload(self):
        return Log(self.size, self.offset)

    def fetch(self):
        """Numbers of the pages that were written, which are forgotten here."""
        if not fetch(self.bits.ctypes.data, len(self._words), self._words):
            return []
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")
        return np.flatnonzero(bits).tolist()

    def assert_guards(self):
        before, after = self.file[: self.offset], self.file[self.offset + self.size :]
        assert (before == GUARD).all()
        assert (after == GUARD).all()

    def close(self):
        os.close(self.fd)


def begin(frontend, log, rings):
    """Switch logging on, as QEMU does; `rings` are pairs of set-up and log address."""
    assert frontend.request(Request.SET_LOG_BASE, log.payload, [log.fd]) == log.payload
    frontend.request(Request.SET_FEATURES, U64(frontend.features | virtio.F_LOG_ALL))
    log_rings(frontend, rings, on=True)


def end(frontend, rings):
    """Switch it off again, as QEMU does when a migration is cancelled."""
    frontend.request(Request.SET_FEATURES, U64(frontend.features))
    log_rings(frontend, rings, on=False)


def log_rings(frontend, rings, *, on):
    """Say of each ring whether what is written to it is to be logged."""
    for setup, address in rings:
        areas = VringAddr(
            setup.index, int(on), setup.desc, setup.used, setup.avail, address
        )
        frontend.request(Request.SET_VRING_ADDR, areas)


class Copier:
    """Copies pages to a shadow all the while, on a thread of its own."""

    def __init__(self, log, memory, page_of):
        """`page_of` says where in `memory` a guest's page begins, ."""
        self._log, self._memory, self._page_of = log, memory, page_of
        self.shadow = memory.copy()
        self.rounds = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _run(self):
        while not self._over.is_set():
            self.copy()
        self.copy()

    def copy(self):
        pages = self._log.fetch()
        for page in pages:
            at = self._page_of(page)
            self.shadow[at : at + PAGE] = self._memory[at : at + PAGE]
        self.rounds += bool(pages)


def highest(table):
    return max(region.gpa + region.size for region in table.regions)


def rings_by_hand(guest):
    """The guest's rings, and where it wants them logged: as QEMU does, by `used`."""
    positions = guest.positions()
    return [
        (guest.setup(side, positions[side.index]), guest.table.regions[0].gpa + used)
        for side, (_, _, used) in ((side, side.addresses()) for side in guest.sides)
    ]


def rings_of(guest):
    """The same for a guest of vswitch.guest's."""
    memory = guest.memory
    return [
        (
            RingSetup(
                index,
                *(int(ring[name]) for name in ("size", "used_idx")),
                *(int(ring[name]) for name in ("desc", "avail", "used")),
                kick_fd=-1,
                call_fd=-1,
            ),
            memory.gpa_of(int(ring["used"]) - memory.addr),
        )
        for index, ring in enumerate(guest.rings)
    ]
