"""The data half of a tap port, on a socket that keeps frames apart as a tap does."""

import socket

import numpy as np
import pytest

from ports import tap_data
from ports.base import PORT, RING
from ports.burst import BURST_SIZE, CONTEXT, TOO_SHORT, make_scratch
from ports.counters import COUNTERS, NAMES
from ports.vhost.virtio import NET_HDR_LEN

HEADER = bytes(NET_HDR_LEN)


class Bench:
    """A port, a worker's scratch memory, and the far side of the tap."""

    def __init__(self):
        ours, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.near = ours
        for sock in (self.near, self.far):
            sock.setblocking(False)
        self.scratch = make_scratch()
        self.ctx = np.zeros(1, CONTEXT)[0]
        for name, array in self.scratch.items():
            self.ctx[name] = array.ctypes.data
        self.port, self.ring = np.zeros(1, PORT)[0], np.zeros(1, RING)[0]
        self.port["max_frame"], self.ring["kick_fd"] = 65553, ours.fileno()
        self.tally = np.zeros(1, COUNTERS)[0]

    def transmit(self, frames):
        """Offer frames, each in one piece; how many arrived."""
        self.bytes = [np.frombuffer(frame, np.uint8) for frame in frames]
        for row, data in zip(self.scratch["burst"], self.bytes, strict=False):
            row["addr"], row["length"] = data.ctypes.data, data.size
            row["eth"], row["segments"] = data.ctypes.data, 1
        self.scratch["picked"][: len(frames)] = range(len(frames))
        return self.transmit_picked(len(frames))

    def transmit_picked(self, n):
        return tap_data.transmit(self.ring, self.port, self.ctx, n, self.tally)

    def receive(self):
        return tap_data.receive(self.ring, self.ctx)

    def counted(self):
        return {name: int(self.tally[name]) for name in NAMES if self.tally[name]}

    def received(self, n):
        """The bytes of the first frames of the burst."""
        slots = self.scratch["tap_slots"]
        found = []
        for row in self.scratch["burst"][:n]:
            at = int(row["addr"]) - slots.ctypes.data
            found.append(slots[at : at + int(row["length"])].tobytes())
        return found

    def close(self):
        self.near.close()
        self.far.close()


@pytest.fixture
def bench():
    it = Bench()
    yield it
    it.close()


def test_a_burst_is_read_up_to_its_size(bench):
    frames = [bytes([n]) * (14 + n) for n in range(BURST_SIZE + 3)]
    for frame in frames:
        bench.far.send(HEADER + frame)
    assert bench.receive() == BURST_SIZE
    assert bench.received(BURST_SIZE) == frames[:BURST_SIZE]
    assert bench.receive() == 3
    assert bench.received(3) == frames[BURST_SIZE:]
    assert bench.receive() == 0


def test_less_than_a_header_is_marked(bench):
    bench.far.send(HEADER + bytes(13))
    assert bench.receive() == 1
    assert int(bench.scratch["burst"][0]["length"]) == TOO_SHORT


def test_frames_are_written_in_order_and_counted(bench):
    frames = [bytes([n]) * 60 for n in range(5)]
    assert bench.transmit(frames) == 5
    assert [bench.far.recv(2048) for _ in frames] == [HEADER + f for f in frames]
    assert bench.counted() == {"tx_frames": 5, "tx_bytes": 300}


def test_a_frame_in_pieces_is_written_as_one(bench):
    pieces = [np.frombuffer(bytes([n]) * (10 + n), np.uint8) for n in range(4)]
    for row, piece in zip(bench.scratch["segments"][64:], pieces, strict=False):
        row["addr"], row["len"] = piece.ctypes.data, piece.size
    frame = bench.scratch["burst"][0]
    frame["length"] = sum(piece.size for piece in pieces)
    frame["segments"], frame["first_segment"] = len(pieces), 64
    head = np.frombuffer(b"".join(piece.tobytes() for piece in pieces), np.uint8)
    frame["eth"] = head.ctypes.data
    bench.scratch["picked"][0] = 0
    assert bench.transmit_picked(1) == 1
    whole = HEADER + b"".join(piece.tobytes() for piece in pieces)
    assert bench.far.recv(2048) == whole


def test_what_a_full_queue_refuses_is_counted_as_that(bench):
    bench.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    arrived = bench.transmit([bytes(1514)] * BURST_SIZE)
    assert 0 < arrived < BURST_SIZE
    assert bench.counted() == {
        "tx_frames": arrived,
        "tx_bytes": 1514 * arrived,
        "tx_drop_ring_full": BURST_SIZE - arrived,
    }


def test_what_nobody_takes_any_more_is_counted_as_a_link_that_is_down(bench):
    bench.ring["kick_fd"] = bench.near.detach()
    socket.close(int(bench.ring["kick_fd"]))
    assert bench.transmit([bytes(60)] * 3) == 0
    assert bench.counted() == {"tx_drop_link_down": 3}


def test_a_frame_beyond_the_port_s_limit_is_counted_as_that(bench):
    bench.port["max_frame"] = 1514
    assert bench.transmit([bytes(1514), bytes(1515)]) == 1
    assert bench.counted() == {
        "tx_frames": 1,
        "tx_bytes": 1514,
        "tx_drop_too_long": 1,
    }
