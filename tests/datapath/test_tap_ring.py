"""A tap's rings in a worker's turn, on packet pipes that keep frames apart like a tap.

A tap is one descriptor for both ways; here it is a pipe's end, so one port receives and
another one transmits.
"""

import os
import struct

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from ports.base import KIND_TAP, RING_RUNNING, RINGS_PER_PORT, RX
from ports.vhost.features import RECEIVER, SENDER
from tests.datapath.bench import A, B
from tests.datapath.rings import DEFAULT, GPA, NEXT, frame_to, mac
from tests.datapath.test_offload import (
    CAPABLE,
    PAYLOAD,
    received,
    receiver,
    super_frame,
)
from vswitch.datapath import loop

TAP = 5
HEADER = bytes(12)


@pytest.fixture
def make_pipe():
    ends = []

    def make():
        ends.extend(os.pipe2(os.O_DIRECT | os.O_NONBLOCK))
        return ends[-2:]

    yield make
    for end in ends:
        os.close(end)


@pytest.fixture
def pipe(make_pipe):
    return make_pipe()


def tap(bench, *fds, owners=(0,)):
    """Make port TAP a tap that is up, with a queue for each owner."""
    port = bench.plane.shared.ports[TAP]
    port["offloads"] = RECEIVER
    port["kind"], port["up"], port["pairs"] = KIND_TAP, 1, len(fds)
    first = TAP * RINGS_PER_PORT
    for pair, (fd, owner) in enumerate(zip(fds, owners, strict=True)):
        for ring in bench.plane.shared.rings[first + 2 * pair :][:2]:
            ring["state"], ring["port"], ring["enabled"] = RING_RUNNING, TAP, 1
            ring["owner"], ring["kick_fd"] = owner, fd
            ring["header_len"], ring["features"] = len(HEADER), SENDER


def test_frames_come_in_one_by_one(bench, pair, pipe):
    tap(bench, pipe[0])
    frames = [frame_to(A, 7, length) for length in (60, 61, 1514)]
    for frame in frames:
        os.write(pipe[1], HEADER + frame)
    assert bench.turn() == 3
    a, _ = pair
    got = [a.buffer(head, length)[12:] for head, length in a.rx.reap()]
    assert got == frames
    tally = bench.tally(TAP)
    assert (tally["rx_frames"], tally["rx_bytes"]) == (3, 60 + 61 + 1514)


def test_what_is_shorter_than_a_header_is_counted(bench, pair, pipe):
    tap(bench, pipe[0])
    os.write(pipe[1], HEADER + bytes(13))
    os.write(pipe[1], HEADER + frame_to(A, 7, 14))
    assert bench.turn() == 2
    assert bench.drops(TAP) == {"rx_drop_too_short": 1}
    assert len(pair[0].rx.reap()) == 1


def test_a_frame_goes_out_as_it_is(bench, pair, pipe):
    tap(bench, pipe[1])
    a, _ = pair
    frame = frame_to(9, A, 300)
    a.send(frame)
    bench.turn()
    assert os.read(pipe[0], 4096) == HEADER + frame
    assert bench.tally(TAP) == {"tx_frames": 1, "tx_bytes": 300}


@pytest.mark.parametrize(
    ("worker", "pair"),
    [
        pytest.param(0, 1, id="its own"),
        pytest.param(3, 0, id="its own, taken over"),
        pytest.param(1, 1, id="any"),
        pytest.param(2, 0, id="any"),
    ],
)
def test_a_worker_transmits_by_its_own_queue_or_any(bench, make_pipe, worker, pair):
    pipes = [make_pipe(), make_pipe()]
    tap(bench, *(write for _, write in pipes), owners=(3, 0))
    a = bench.guest(A)
    bench.plane.shared.rings[A * RINGS_PER_PORT + RX]["owner"] = worker
    frame = frame_to(9, A)
    a.send(frame)
    bench.turn(worker=worker)
    assert os.read(pipes[pair][0], 4096) == HEADER + frame
    with pytest.raises(BlockingIOError):
        os.read(pipes[1 - pair][0], 4096)


def test_a_frame_in_pieces_goes_out_in_one(bench, pair, pipe):
    tap(bench, pipe[1])
    a, _ = pair
    frame = frame_to(9, A, 300)
    pieces = (bytes(12) + frame[:5], frame[5:200], frame[200:])
    for i, piece in enumerate(pieces):
        a.write(0x20000 + 1024 * i, piece)
        flags = NEXT if i < 2 else 0
        a.tx.describe(i, GPA + 0x20000 + 1024 * i, len(piece), flags, i + 1)
    a.tx.offer(0)
    bench.turn()
    assert os.read(pipe[0], 4096) == HEADER + frame


def test_a_taps_frames_wake_the_worker_without_being_asked(bench, pipe):
    tap(bench, pipe[0])
    os.write(pipe[1], HEADER + frame_to(B, 7))
    polled = loop.polled_rings(bench.plane.shared, 0)
    assert len(polled) == 1
    assert loop.ask_for_kicks(bench.plane.ctx, 0, polled) == 0
    loop.stop_kicks(bench.plane.ctx, 0, polled)
    assert bench.round() == 1


def test_a_super_frame_goes_out_with_its_header(bench, pipe):
    tap(bench, pipe[1])
    a = bench.guest(A, features=DEFAULT | SENDER)
    data, head = super_frame("v4", payload=PAYLOAD[:3000])
    data = mac(9) + data[6:]
    a.tx.describe(0, a.put(0x20000, head + data), len(head + data))
    a.tx.offer(0)
    bench.turn()
    hdr_len = struct.pack("<H", 54)
    assert os.read(pipe[0], 8192) == head[:2] + hdr_len + head[4:] + data


@pytest.mark.parametrize("able", [True, False])
def test_the_kernels_super_frames_come_in_as_the_receiver_can(bench, pipe, able):
    tap(bench, pipe[0])
    b = receiver(bench, B, CAPABLE if able else DEFAULT)
    data, head = super_frame("v6", payload=PAYLOAD[:3500])
    os.write(pipe[1], head + data)
    bench.turn()
    frames = [frame for _, frame in received(b)]
    payload = b"".join(bytes(Ether(frame)[TCP].payload) for frame in frames)
    assert (len(frames), payload) == (1 if able else 3, PAYLOAD[:3500])
