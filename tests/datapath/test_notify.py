"""Interrupts and kicks of split rings. virtio 1.2 §2.7.7, §2.7.10."""

import struct

import pytest

from ports.base import NO_FD
from ports.vhost.virtio import F_EVENT_IDX
from tests.datapath.bench import A, B
from tests.datapath.rings import DEFAULT, frame_to
from vswitch.datapath import loop


def test_the_first_completion_calls_and_suppression_is_obeyed(bench):
    a, b = bench.guest(A), bench.guest(B)
    b.post(4)
    a.send(frame_to(B, A))
    bench.turn()
    assert (a.calls(), b.calls()) == (1, 1)
    b.write(b.rx.avail, struct.pack("<H", 1))  # VIRTQ_AVAIL_F_NO_INTERRUPT
    a.send(frame_to(B, A))
    bench.turn()
    assert (a.calls(), b.calls()) == (1, 0)


def test_event_idx_calls_exactly_when_the_used_index_passes(bench):
    features = DEFAULT | F_EVENT_IDX
    a, b = bench.guest(A), bench.guest(B, features=features)
    b.post(16, length=1024)
    called = []
    b.rx.set_used_event((65530 + 7) & 0xFFFF)  # beyond the wrap
    for _i in range(10):
        a.send(frame_to(B, A))
        bench.turn()
        called.append(b.calls())
        a.tx.reap()
    # The first check after a start always calls; then the eighth completion does.
    assert called == [1, 0, 0, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_chain_offered_at_the_edge_of_sleep_is_seen(bench, event_idx):
    features = DEFAULT | (F_EVENT_IDX if event_idx else 0)
    a, b = bench.guest(A, features=features), bench.guest(B)
    b.post(4)
    bench.turn()
    polled = loop.polled_rings(bench.plane.shared, 0)
    assert loop.ask_for_kicks(bench.plane.ctx, 0, polled) == 0
    if event_idx:
        event = a.read(a.tx.used + 4 + 8 * a.size, 2)
        assert struct.unpack("<H", event) == (a.tx.offered,)
    else:
        assert a.read(a.tx.used, 2) == b"\x00\x00"
    a.send(frame_to(B, A))
    assert loop.ask_for_kicks(bench.plane.ctx, 0, polled) == 1
    loop.stop_kicks(bench.plane.ctx, 0, polled)
    assert event_idx or a.read(a.tx.used, 2) == b"\x01\x00"
    bench.turn()
    assert len(b.rx.reap()) == 1


def test_an_interrupt_that_was_taken_away_and_given_back_is_not_lost(bench):
    # While there was no descriptor the index that was told last went stale, and after
    # a lap of 65536 seemed to lie ahead.
    a, b = bench.guest(A), bench.guest(B, features=DEFAULT | F_EVENT_IDX)
    b.post(4)
    a.send(frame_to(B, A))
    bench.turn()
    assert b.calls() == 1
    fd, b.rx.record["call_fd"] = int(b.rx.record["call_fd"]), NO_FD
    a.send(frame_to(B, A))
    bench.turn()
    b.rx.record["call_fd"] = fd
    a.send(frame_to(B, A))
    bench.turn()
    assert b.calls() == 1
