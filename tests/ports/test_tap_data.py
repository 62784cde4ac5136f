"""The data half of a tap port, on a socket that keeps frames apart as a tap does.

Frames to write are as many as a ring of system calls is worth, so that each backend has
its turn.
"""

import itertools
import os
import socket

import numpy as np
import pytest

from ports import tap_data
from ports.base import BACKEND_PLAIN, BACKEND_URING, PORT, RING
from ports.burst import BURST_SIZE, CONTEXT, MAX_SEGMENTS, TOO_SHORT, make_scratch
from ports.counters import COUNTERS, NAMES
from ports.native import load_u32
from ports.uring import Uring
from ports.vhost.virtio import NET_HDR_LEN
from ports.views import uring_at
from tests import requirements

HEADER = bytes(NET_HDR_LEN)


class Bench:
    """A port, a worker's scratch memory, and the far side of the tap."""

    def __init__(self, backend):
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
        self.uring = None
        if backend == BACKEND_URING:
            self.uring = Uring()
            self.ctx["uring"] = self.uring.address
        self.port["backend"] = backend

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

    def requested(self):
        """Writes that the ring was ever used for."""
        if self.uring is None:
            return 0
        return load_u32(int(uring_at(self.uring.address, 0)["request_tail"]))

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
        if self.uring:
            self.uring.close()
        self.near.close()
        self.far.close()


@pytest.fixture(params=[BACKEND_PLAIN, BACKEND_URING], ids=["plain", "io_uring"])
def bench(request):
    if request.param == BACKEND_URING:
        requirements.require_io_uring()
    it = Bench(request.param)
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


def describe_in_pieces(bench, row, data, count):
    """Make row `row` of the burst a frame of so many pieces."""
    whole = np.frombuffer(data, np.uint8)
    first = row * MAX_SEGMENTS
    bounds = [len(data) * k // count for k in range(count + 1)]
    for k, (begin, end) in enumerate(itertools.pairwise(bounds)):
        piece = bench.scratch["segments"][first + k]
        piece["addr"], piece["len"] = whole.ctypes.data + begin, end - begin
    frame = bench.scratch["burst"][row]
    frame["length"], frame["eth"] = len(data), whole.ctypes.data
    frame["segments"], frame["first_segment"] = count, first
    bench.scratch["picked"][row] = row
    return whole


@pytest.mark.parametrize("pieces", [2, 5, MAX_SEGMENTS])
def test_frames_in_pieces_are_written_as_one_each(bench, pieces):
    """Those of the most pieces have no room in one call."""
    count = 40
    frames = [bytes([n]) * 12 + os.urandom(400 + n) for n in range(count)]
    keep = [describe_in_pieces(bench, n, data, pieces) for n, data in enumerate(frames)]
    assert bench.transmit_picked(count) == count
    assert [bench.far.recv(2048) for _ in keep] == [HEADER + f for f in frames]


def test_a_ring_is_used_for_a_burst_that_is_worth_it(bench):
    calls = []
    for count in (3, 4):
        bench.transmit([bytes(60)] * count)
        calls.append(bench.requested())
    assert calls == ([0, 4] if bench.uring else [0, 0])


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
    assert bench.transmit([bytes(60)] * 5) == 0
    assert bench.counted() == {"tx_drop_link_down": 5}


def test_a_frame_beyond_the_port_s_limit_is_counted_as_that(bench):
    bench.port["max_frame"] = 1514
    assert bench.transmit([bytes(1514), bytes(1515)] * 3) == 3
    assert bench.counted() == {
        "tx_frames": 3,
        "tx_bytes": 3 * 1514,
        "tx_drop_too_long": 3,
    }
