"""Guests on a plane with the built-in driver, and what the device must do to them.

Driver side: `vswitch.guest`. Device side: the real data path. Between them a model that
knows which chain the device has at which position, and so every byte that it may write.
"""

import os
import struct
from collections import deque
from dataclasses import dataclass

import numpy as np

from ports.base import (
    KIND_VHOST_USER,
    MAX_REGIONS,
    NO_FD,
    RING_STARTING,
    RING_STOPPED,
    RINGS_PER_PORT,
)
from ports.vhost.virtio import F_RING_PACKED
from tests.datapath.rings import mac
from vswitch.datapath import loop
from vswitch.guest import ring as driver
from vswitch.guest.layout import Layout, RingShape, Shape
from vswitch.guest.memory import GuestMemory

RX, TX = 0, 1  # the guest's queues
TX_BUFFER = 1612
LAP = 1 << 15
CANARY = 0xC5


@dataclass(frozen=True)
class Config:
    """What a guest negotiates and how it lays its rings out."""

    features: int
    size: int
    rx_buffer: int
    rx_shape: Shape
    tx_shape: Shape
    start: int
    regions: int
    posted: int  # receive buffers to begin with


class DrivenRing:
    """One virtqueue: the driver's record, the device's record, and the model."""

    def __init__(self, guest, number):
        config = guest.config
        self.guest, self.plane, self.memory = guest, guest.plane, guest.memory
        self.packed = bool(config.features & F_RING_PACKED)
        self.ring = np.zeros(1, driver.DRIVER_RING)[0]
        buffer_len, shape = (
            (config.rx_buffer, config.rx_shape)
            if number == RX
            else (TX_BUFFER, config.tx_shape)
        )
        plan = RingShape(config.size, buffer_len, shape)
        self.layout = Layout(
            self.memory, plan, config.features, self.ring, receives=number == RX
        )
        self.layout.clear(config.start)
        self.size, self.slots = plan.size, plan.slots
        for name in ("kick_fd", "call_fd"):
            self.ring[name] = os.eventfd(0, os.EFD_NONBLOCK)
        self.row = guest.slot * RINGS_PER_PORT + number
        self.record = self.plane.shared.rings[self.row]
        for name, value in {
            "enabled": 1,
            "owner": 0,
            "port": guest.slot,
            "number": self.row,
            "packed": int(self.packed),
            "size": plan.size,
            "header_len": int(self.ring["header_len"]),
            "features": config.features,
            "kick_fd": int(self.ring["kick_fd"]),
            "call_fd": int(self.ring["call_fd"]),
            "err_fd": NO_FD,
            **{area: int(self.ring[area]) for area in ("desc", "avail", "used")},
        }.items():
            self.record[name] = value
        # The model. Chains are used in the order in which they were offered.
        self.offered = deque()  # (slot, descriptors)
        self.used = deque()  # slots that the driver has not looked at
        self.next_slot = int(self.layout._free[0])
        self.position = config.start  # the device's; packed: descriptors, split: chains
        self.asked = False  # for a call
        self.running = False
        self.start(self.base)

    @property
    def base(self):
        """The device's position as vhost-user has it, the low half."""
        if not self.packed:
            return self.position & 0xFFFF
        laps, index = divmod(self.position, self.size)
        return index | LAP * (laps % 2 == 0)

    def start(self, base):
        self.record["next_avail"] = self.record["signalled_used"] = base
        self.record["state"] = RING_STARTING
        loop.start_rings(self.plane.ctx, 0)
        self.running = True

    def stop(self):
        self.record["state"] = RING_STOPPED
        self.running = False
        assert int(self.record["next_used"]) == self.base

    def close(self):
        self.stop()
        for name in ("kick_fd", "call_fd"):
            os.close(int(self.ring[name]))

    # --- what the driver did ---

    def note_offered(self, count):
        for _ in range(count):
            self._note(self.next_slot)
            self.next_slot = (self.next_slot + 1) % self.slots

    def note_offered_again(self, count):
        for _ in range(count):
            self._note(self.used.popleft())

    def _note(self, slot):
        descriptors = int(self.layout._out[slot])
        assert descriptors > 0
        self.offered.append((slot, descriptors))

    # --- what the device has to do ---

    def use(self):
        """The oldest chain goes back; its slot."""
        slot, descriptors = self.offered.popleft()
        self.used.append(slot)
        self.position += descriptors if self.packed else 1
        return slot

    def offered_positions(self):
        """Where each chain that the device has will be found again, in order."""
        at, positions = self.position, []
        for _, descriptors in self.offered:
            positions.append(at)
            at += descriptors if self.packed else 1
        return positions

    def may_write(self, positions, gone):
        """(offset, bytes) of the ring that the device may write to use `gone` chains.

        `positions` are those of all chains that it had; what entries of a used ring
        hold beyond its index is nobody's business.
        """
        yield self._offset("used"), 4  # flags and index, or the device's events
        if self.packed:
            for position in positions[:gone]:
                yield self._offset("desc") + 16 * (position % self.size), 16
            return
        for position in positions:
            yield self._offset("used") + 4 + 8 * (position % self.size), 8
        yield self._offset("used") + 4 + 8 * self.size, 2  # avail_event

    def _offset(self, area):
        return int(self.ring[area]) - self.memory.addr

    def buffer_offset(self, slot):
        return driver.buffer_of(self.ring, slot) - self.memory.addr


class DrivenGuest:
    """Port `slot` of a plane, up, with one pair of rings."""

    def __init__(self, plane, slot, config):
        self.plane, self.slot, self.config = plane, slot, config
        plans = (
            RingShape(config.size, config.rx_buffer, config.rx_shape),
            RingShape(config.size, TX_BUFFER, config.tx_shape),
        )
        self.memory = GuestMemory(sum(plan.bytes for plan in plans), config.regions, 0)
        self.memory.bytes[:] = CANARY
        row = slot * 2 * MAX_REGIONS
        for n, region in enumerate(self.memory.table.regions):
            record = plane.shared.regions[row + n]
            record["gpa"], record["size"] = region.gpa, region.size
            record["addr"] = region.frontend_va
        port = plane.shared.ports[slot]
        port["kind"], port["up"], port["pairs"] = KIND_VHOST_USER, 1, 1
        port["regions"] = row << 8 | config.regions
        self.rx, self.tx = DrivenRing(self, RX), DrivenRing(self, TX)
        self.inbox = deque()  # (frame, buffers), delivered and not received

    @property
    def rings(self):
        return self.rx, self.tx

    def close(self):
        for ring in self.rings:
            ring.close()
        self.memory.close()

    def faults(self):
        names = ("bad_used", "bad_len", "bad_header")
        return [int(ring.ring[name]) for ring in self.rings for name in names]

    # --- the driver ---

    def send(self, frames):
        """Offer frames; how many found room."""
        data = np.frombuffer(b"".join(frames), np.uint8)
        lengths = np.array([len(frame) for frame in frames], np.int64)
        offsets = np.cumsum(lengths) - lengths
        addr = int(data.ctypes.data)
        room = self.tx.slots - len(self.tx.offered)
        taken = driver.send_frames(self.tx.ring, addr, offsets, lengths, 0)
        assert taken == min(room, len(frames))
        self.tx.used.clear()
        self.tx.note_offered(taken)
        return taken

    def post(self, count):
        room = self.rx.slots - len(self.rx.offered) - len(self.rx.used)
        posted = driver.post_buffers(self.rx.ring, count)
        assert posted == min(room, count)
        self.rx.note_offered(posted)

    def receive(self, most):
        """Take up to `most` frames out, as they were delivered."""
        room = np.zeros(most * TX_BUFFER, np.uint8)
        offsets, lengths = np.zeros((2, most), np.int64)
        addr = int(room.ctypes.data)
        n = driver.receive_frames(self.rx.ring, addr, room.size, offsets, lengths, 0)
        spans = zip(offsets[:n].tolist(), lengths[:n].tolist(), strict=True)
        wanted = [self.inbox.popleft() for _ in range(min(most, len(self.inbox)))]
        frames = [frame for frame, _ in wanted]
        assert [bytes(room[at : at + length]) for at, length in spans] == frames
        self.rx.note_offered_again(sum(buffers for _, buffers in wanted))

    def reap(self):
        assert driver.reap(self.tx.ring) == len(self.tx.used)
        self.tx.used.clear()

    # --- the device ---

    def deliver(self, frame, memory):
        """What must happen to a frame for this guest, in a copy of its memory."""
        rx, header_len = self.rx, int(self.rx.ring["header_len"])
        whole, need = self.config.rx_buffer, header_len + len(frame)
        buffers = -(-need // whole)
        if not rx.running or buffers > len(rx.offered):
            return False
        if buffers > 1 and not rx.ring["mergeable"]:
            return False
        header = bytes(10) + struct.pack("<H", buffers)
        data = np.frombuffer(header[:header_len] + frame, np.uint8)
        for begin in range(0, need, whole):
            at, part = rx.buffer_offset(rx.use()), data[begin : begin + whole]
            memory[at : at + len(part)] = part
        self.inbox.append((frame, buffers))
        return True


def frame_of(dst, src, length, number):
    """A frame that differs from any other in most of its bytes."""
    body = (np.arange(length) * 7 + number * 13) % 251
    return (mac(dst) + mac(src) + b"\x88\xb5" + body.astype(np.uint8).tobytes())[
        :length
    ]
