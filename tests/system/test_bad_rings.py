"""Drivers that break the rules of a ring: counted, survived, and nobody else notices."""

import os
import struct

import numpy as np
import pytest

from ports.vhost.messages import Request, VringFd
from ports.vhost.virtio import AVAIL_IDX, AVAIL_RING
from tests.system.net import exchange_both_ways, frame
from vswitch.guest.frontend import eventfd

NEXT, WRITE, INDIRECT = 1, 2, 4
RX, TX = 0, 1  # the guest's queues
SIZE = 64
NOWHERE = 1 << 60


class Hand:
    """Writes to a guest's ring whatever one likes."""

    def __init__(self, guest, index):
        self.guest, self.ring = guest, guest.rings[index]
        self.memory = guest.memory
        self.frame = int(self.ring["buffers_gpa"])  # a good one with its header
        self.spare = self.memory.allocate(4096)
        self.length = 12 + 60
        buffer = int(self.ring["buffers"])
        self._write(buffer, bytes(12) + frame(b"\xff" * 6, guest))

    def _write(self, addr, data):
        self.memory.view(addr, len(data))[:] = np.frombuffer(data, np.uint8)

    def table(self, rows, addr=None):
        """Write descriptors (gpa, length, flags, next) one behind the other."""
        data = b"".join(struct.pack("<QIHH", *row) for row in rows)
        self._write(int(self.ring["desc"]) if addr is None else addr, data)

    def offer(self, *heads, skip=0):
        """Show heads to the device; `skip` more that nobody wrote."""
        index = int(self.ring["avail_idx"])
        for at, head in enumerate(heads):
            slot = int(self.ring["avail"]) + AVAIL_RING + 2 * ((index + at) % SIZE)
            self._write(slot, struct.pack("<H", head))
        index = (index + len(heads) + skip) & 0xFFFF
        self._write(int(self.ring["avail"]) + AVAIL_IDX, struct.pack("<H", index))
        self.ring["avail_idx"] = index
        os.eventfd_write(int(self.ring["kick_fd"]), 1)

    def used(self):
        return int(self.guest.layouts[TX].device_position())


@pytest.fixture
def scene(net):
    """A guest to misbehave, with an err descriptor, and two that talk meanwhile."""
    bad = net.guest("bad", queue_size=SIZE)
    others = net.guest("a"), net.guest("b")
    err = eventfd()
    for index in (RX, TX):
        bad.frontend.request(Request.SET_VRING_ERR, VringFd(index, True), [err])
    exchange_both_ways(*others)
    yield net, bad, others, err
    for guest in others:
        guest.receive(timeout=0)
    exchange_both_ways(*others)
    bad.reset()
    exchange_both_ways(bad, others[0])
    os.close(err)


def chains(hand):
    """Chains that hold no frame, each with how it is counted."""
    good, length = hand.frame, hand.length
    table = hand.spare.gpa
    return {
        "address nowhere": [(NOWHERE, length, 0, 0)],
        "address that wraps": [((1 << 64) - 16, length, 0, 0)],
        "across the end of memory": [
            (hand.memory.gpa_of(0) + hand.memory.size - 8, length, 0, 0)
        ],
        "4 GiB long": [(good, 0xFFFFFFFF, 0, 0)],
        "next out of range": [(good, length, NEXT, SIZE)],
        "next far out of range": [(good, length, NEXT, 0xFFFF)],
        "loop of one": [(good, length, NEXT, 0)],
        "loop of two": [(good, length, NEXT, 1), (good, length, NEXT, 0)],
        "loop of nothing": [(good, 0, NEXT, 1), (good, 0, NEXT, 0)],
        "empty": [(good, 0, 0, 0)],
        "only a header": [(good, 12, 0, 0)],
        "writable": [(good, length, WRITE, 0)],
        "writable pieces": [(good, 12, NEXT | WRITE, 1), (good, 60, WRITE, 0)],
        "indirect, nested": [(table, 16, INDIRECT, 0)],
        "indirect and next": [(table, 16, INDIRECT | NEXT, 1), (good, length, 0, 0)],
        "indirect, odd": [(table, 24, INDIRECT, 0)],
        "indirect, empty": [(table, 0, INDIRECT, 0)],
        "indirect, too long": [(table, 16 * (SIZE + 1), INDIRECT, 0)],
        "indirect nowhere": [(NOWHERE, 16, INDIRECT, 0)],
    }


# Checklist 52, 53, R2, R5, R6, R7.
def test_chains_that_hold_no_frame_are_counted_and_given_back(scene):
    net, bad, others, _ = scene
    hand = Hand(bad, TX)
    hand.table([(hand.spare.gpa, 16, INDIRECT, 0)], hand.spare.addr)  # nested
    expected = 0
    for name, rows in chains(hand).items():
        hand.table(rows)
        before = hand.used()
        hand.offer(0)
        expected += 1
        net.switch.wait_for(lambda at=before: hand.used() == (at + 1) & 0xFFFF, name)
    counters = net.switch.counters("bad")
    assert counters["rx_drop_bad_chain"] + counters["rx_drop_too_long"] == expected
    assert counters["broken_rings"] == 0
    assert others[0].receive(timeout=0) == []


# The fuzzer's menu: garbage instead of a ring.
def test_rings_of_garbage_hurt_nobody(scene):
    _, bad, others, _ = scene
    noise = np.random.default_rng(3)
    for _ in range(60):
        for index in (RX, TX):
            ring = bad.rings[index]
            for area, length in (("desc", 16 * SIZE), ("avail", 2 * SIZE + 6)):
                view = bad.memory.view(int(ring[area]), length)
                view[:] = noise.integers(0, 256, length, np.uint8)
            avail = bad.memory.view(int(ring["avail"]) + AVAIL_IDX, 2)
            position = bad.layouts[index].device_position()
            step = (position + int(noise.integers(0, SIZE + 2))) & 0xFFFF
            avail[:] = np.frombuffer(step.to_bytes(2, "little"), np.uint8)
            os.eventfd_write(int(ring["kick_fd"]), 1)
        others[0].send_all(frame(b"\xff" * 6, others[0]))
        assert len(others[1].receive(timeout=10.0)) == 1
        bad.stop()
        bad._empty_rings()
        bad.start()
    bad.rings["bad_used"] = bad.rings["bad_len"] = bad.rings["bad_header"] = 0
