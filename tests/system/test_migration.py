"""A guest's memory is copied while the switch writes into it, as migration does.

The copier is the test: it fetches and clears the log of written pages again and again,
copies those pages, and once the rings are stopped copies the rest. Whatever the switch
wrote and did not log would be missing then.
"""

import mmap
import os
import threading

import numpy as np
import pytest

from ports import native
from ports.vhost.messages import U64, Log, Request, VringAddr
from ports.vhost.virtio import F_LOG_ALL
from tests.switch import wait_for
from vswitch.guest.frontend import Frontend

PAGE = 4096
FRAMES = 1024


@native.jit
def fetch(log, words, fetched):
    """Take the log's bits, word by word, and leave none."""
    for word in range(words):
        at = log + 8 * word
        bits = native.load_u64(at)
        while native.swap_if_u64(at, bits, 0) != bits:
            bits = native.load_u64(at)
        native.store_u64(fetched + 8 * word, bits)


class Copier:
    """Copies a guest's memory elsewhere while it is written to."""

    def __init__(self, guest):
        self.guest = guest
        (self.region,) = guest.memory.table.regions
        self.first = self.region.gpa // PAGE
        self.length = (self.first + self.region.size // PAGE) // 8 // 8 * 8 + 8
        self.fd = os.memfd_create("log")
        os.ftruncate(self.fd, self.length)
        self.log = np.frombuffer(mmap.mmap(self.fd, self.length), np.uint8)
        self.fetched = np.zeros(self.length // 8, np.int64)
        self.copy = guest.memory.bytes.copy()
        self.rounds = 0
        self.pages = 0

    def begin(self):
        frontend = self.guest.frontend
        log = Log(self.length, 0)
        assert frontend.request(Request.SET_LOG_BASE, log, [self.fd]) == log
        self.log_all(F_LOG_ALL)
        self.copy[:] = self.guest.memory.bytes

    def log_all(self, bit):
        """Switch logging as QEMU does: all of the device, then ring by ring."""
        frontend = self.guest.frontend
        frontend.request(Request.SET_FEATURES, U64(frontend.features | bit))
        for index, ring in enumerate(self.guest.rings):
            desc, used, avail = (int(ring[part]) for part in ("desc", "used", "avail"))
            log = self.region.gpa + used - self.guest.memory.addr
            flags = int(bit != 0)
            areas = VringAddr(index, flags, desc, used, avail, log)
            frontend.request(Request.SET_VRING_ADDR, areas)

    def round(self):
        fetch(self.log.ctypes.data, self.length // 8, self.fetched.ctypes.data)
        bits = np.unpackbits(self.fetched.view(np.uint8), bitorder="little")
        assert not bits[: self.first].any()
        pages = np.flatnonzero(bits[self.first :])
        memory = self.guest.memory.bytes.reshape(-1, PAGE)
        self.copy.reshape(-1, PAGE)[pages] = memory[pages]
        self.rounds += 1
        self.pages += len(pages)

    def close(self):
        os.close(self.fd)


@pytest.fixture
def copier():
    made = []

    def make(guest):
        made.append(Copier(guest))
        return made[-1]

    yield make
    for it in made:
        it.close()


def frames(guest, target, count, size):
    head = target.mac + guest.mac + b"\x88\xb5"
    return [head + bytes([n % 255 + 1] * (size - 14)) for n in range(count)]


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("size", [64, 1500, 9000])
def test_no_written_page_is_missed_while_the_log_is_cleared(net, copier, packed, size):
    # Nobody but the switch writes to the receiver: its buffers are posted already.
    a = net.guest("a", tx_buffer_len=16384)
    b = net.guest("b", queue_size=FRAMES, packed=packed)
    net.pin(a, b)
    copying = copier(b)
    copying.begin()
    done = threading.Event()

    def copy():
        while not done.is_set():
            copying.round()

    copying.round()  # compiled here, if need be
    thread = threading.Thread(target=copy)
    thread.start()
    buffers = -(-(size + 12) // 2048)
    sent = FRAMES // buffers
    for n in range(0, sent, 16):
        seen = copying.rounds
        a.send_all(frames(a, b, min(16, sent - n), size))
        wait_for(lambda seen=seen: copying.rounds > seen, "the copier to go round")
    a.wait_sent()
    done.set()
    thread.join()
    b.stop()
    copying.round()
    assert copying.pages > sent * size // PAGE
    assert net.switch.counters("b")["tx_frames"] == sent
    assert np.array_equal(copying.copy, b.memory.bytes)


def test_nothing_is_logged_after_the_migration_was_cancelled(net, copier):
    a, b = net.guest("a"), net.guest("b")
    net.pin(a, b)
    copying = copier(b)
    copying.begin()
    a.send_all(frames(a, b, 1, 64))
    a.wait_sent()
    assert copying.log.any()
    copying.log_all(0)
    copying.log[:] = 0
    a.send_all(frames(a, b, 8, 64))
    assert len(b.receive(at_least=9)) == 9
    assert not copying.log.any()


def test_a_log_may_be_replaced_by_another(net, copier):
    a, b = net.guest("a"), net.guest("b")
    net.pin(a, b)
    first, second = copier(b), copier(b)
    first.begin()
    b.frontend.request(Request.SET_LOG_BASE, Log(second.length, 0), [second.fd])
    first.log[:] = 0
    a.send_all(frames(a, b, 8, 64))
    assert len(b.receive(at_least=8)) == 8
    assert not first.log.any()
    assert second.log.any()


def test_a_guest_that_arrives_is_announced_to_everybody(net):
    a, b = net.guest("a"), net.guest("b")
    net.pin(a)
    # As at a migration's target, before its driver is up.
    frontend = Frontend.connect(net.add_port("c"))
    frontend.negotiate(0, set_features=False)
    mac = bytes.fromhex("525400abcdef")
    for _ in range(2):
        frontend.request(Request.SEND_RARP, U64(int.from_bytes(mac, "little")))
    for guest in (a, b):
        heard = guest.receive(at_least=2)
        assert len(heard) == 2
        for frame in heard:
            assert frame[:12] == b"\xff" * 6 + mac
            # Reverse ARP request of the station about itself, RFC 903.
            assert frame[12:22].hex() == "80350001080006040003"
            assert frame[22:42] == (mac + bytes(4)) * 2
            assert len(frame) == 60
    entries = net.switch.ask("fdb_show")
    assert [e["ifname"] for e in entries if e["mac"] == mac.hex(":")] == ["c"]
    frontend.close()
