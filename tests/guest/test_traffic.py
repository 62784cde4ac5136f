"""Numbered streams, over the echoing back-end: what a guest sends, it receives."""

import numpy as np
import pytest

from vswitch.guest import DEFAULT_FEATURES, GuestError, stream
from vswitch.guest.traffic import (
    Generator,
    Sink,
    Totals,
    hammer,
    latency,
    run,
    spread,
)

PACKED, IN_ORDER = 1 << 34, 1 << 35


FORMATS = pytest.mark.parametrize(
    "ring",
    [
        {"queue_size": 64},
        {"queue_size": 64, "features": DEFAULT_FEATURES | IN_ORDER},
        {"queue_size": 60, "packed": True},
        {"queue_size": 60, "features": DEFAULT_FEATURES | PACKED | IN_ORDER},
    ],
    ids=["split", "split in order", "packed", "packed in order"],
)


def stream_through(generator, sink, count):
    return run([generator], [sink], seconds=30, linger=10, enough=count)


@pytest.fixture
def counter():
    """A sink's record for arrivals made up by hand, and its flows."""
    flows = np.zeros(2, stream.FLOW)
    sink = np.zeros(1, stream.SINK)[0]
    sink["flows"], sink["n_flows"] = flows.ctypes.data, len(flows)
    return sink, flows


def arrive(sink, *numbers, flow=0):
    for number in numbers:
        stream._arrived(sink, stream._word(flow, number))


def counts(flow):
    names = ("received", "lost", "longest_gap", "reordered", "duplicates")
    return tuple(int(flow[name]) for name in names)


def test_numbers_in_order_are_clean(counter):
    sink, flows = counter
    arrive(sink, *range(10))
    assert counts(flows[0]) == (10, 0, 0, 0, 0)


def test_a_gap_is_lost(counter):
    sink, flows = counter
    arrive(sink, 0, 1, 5, 7)
    assert counts(flows[0]) == (4, 4, 3, 0, 0)


def test_what_comes_late_was_not_lost_but_reordered(counter):
    sink, flows = counter
    arrive(sink, 0, 5, 3, 1, 4, 2)
    assert counts(flows[0]) == (6, 0, 4, 4, 0)


def test_what_comes_again_is_a_duplicate(counter):
    sink, flows = counter
    arrive(sink, 0, 0, 3, 1, 1, 3)
    assert counts(flows[0]) == (3, 1, 2, 1, 3)


def test_flows_are_counted_apart(counter):
    sink, flows = counter
    arrive(sink, 0, 1)
    arrive(sink, 0, 1, 2, flow=1)
    arrive(sink, 2)
    arrive(sink, 0, flow=2)
    assert int(sink["foreign"]) == 1
    assert counts(flows[0]) == counts(flows[1]) == (3, 0, 0, 0, 0)


@FORMATS
@pytest.mark.parametrize("start", [0, 65000])
def test_built_frames_of_all_lengths_pass_unharmed(attach, start, ring):
    guest = attach(start_index=start, **ring)
    generator = Generator(guest, guest, (28, 1514), raw=False, verify=True, frames=300)
    totals = stream_through(generator, Sink(guest, raw=False, verify=True), 300)
    assert totals.clean
    assert (totals.sent, totals.received) == (300, 300)
    assert totals.bytes == generator.record["bytes"]
    assert guest.faults() == {}


@FORMATS
@pytest.mark.parametrize("start", [0, 65000])
def test_raw_frames_pass_and_the_rings_stay_usable(attach, start, ring):
    guest = attach(start_index=start, **ring)
    guest.send_all(bytes(60))
    assert guest.receive(timeout=5.0) == [bytes(60)]
    guest.wait_sent()
    for _ in range(2):
        generator = Generator(guest, guest, frames=1000)
        totals = stream_through(generator, Sink(guest), 1000)
        assert totals.clean
        assert (totals.received, totals.bytes) == (1000, 64000)
    guest.send_all(bytes(60))
    assert guest.receive(timeout=5.0) == [bytes(60)]
    assert guest.faults() == {}


@pytest.mark.parametrize("raw", [True, False])
def test_many_addresses_take_turns(attach, raw):
    guest = attach(queue_size=64)
    generator = Generator(
        guest, "02:00:00:09:ab:cd", addresses=256, raw=raw, frames=300
    )
    got = []
    while len(got) < 300:
        generator.record["limit"] = len(got) + 60
        run([generator], [], seconds=30, linger=0)
        got += guest.receive(timeout=5.0, at_least=60)
    assert [frame[:6] for frame in got] == (spread("02:00:00:09:ab:cd", 256) * 2)[:300]
    assert len(set(spread("02:00:00:09:ab:cd", 256))) == 256


def test_one_address_is_the_address_itself():
    assert spread("02:00:00:09:ab:cd", 1) == [bytes.fromhex("02000009abcd")]


@pytest.mark.parametrize("count", [0, 3, 1 << 17])
def test_other_numbers_of_addresses_are_refused(attach, count):
    guest = attach(queue_size=64)
    with pytest.raises(GuestError, match="power of two"):
        Generator(guest, guest, addresses=count)


@FORMATS
def test_each_frame_that_is_due_is_sent_missed_or_late(attach, ring):
    guest = attach(**ring)
    generator = Generator(guest, guest, pace=4000)
    totals = run([generator], [Sink(guest)], seconds=0.5)
    due = totals.sent + totals.missed + totals.late
    assert due == generator.record["due"] // generator.record["pace"]
    # Never ahead; how far behind is up to who else has the processor.
    assert 1000 < due <= totals.seconds * 4000 + 1
    assert totals.sent > 0


def test_what_is_due_while_the_ring_is_full_is_missed(attach):
    guest = attach(queue_size=64)
    generator = Generator(guest, guest, pace=5e6)  # the echo is not as fast by far
    assert run([generator], [Sink(guest)], seconds=0.1).missed > 0
    generator.pace(0)
    assert run([generator], [Sink(guest)], seconds=0.1).missed == 0


@FORMATS
def test_every_eighth_frame_is_timed(attach, ring):
    guest = attach(**ring)
    sink = Sink(guest, timed=True)
    generator = Generator(guest, guest, pace=4000, timed=True, frames=800)
    totals = run([generator], [sink], seconds=30, linger=10, enough=800)
    assert totals.sent == totals.received == 800
    assert int(sink._times.sum()) == 100
    median, most = sink.times_us(50, 100)
    assert 0 < median <= most <= totals.seconds * 1e6 + 10e6
    assert sink.times_us(50) == [0.0]  # each time is told once


def test_a_mix_has_every_length_in_turn(attach):
    guest = attach(queue_size=64)
    generator = Generator(guest, guest, mix=(64, 64, 128, 1000), frames=640)
    sink = Sink(guest, raw=False)  # it compares each length with what the frame says
    totals = stream_through(generator, sink, 640)
    assert totals.clean
    assert totals.bytes == 640 * generator.length == 640 * 314


def test_several_sinks_count_their_own_bytes(attach):
    guests = [attach(queue_size=64) for _ in range(2)]
    generators = [Generator(guest, guest, frames=100) for guest in guests]
    sinks = [Sink(guest) for guest in guests]
    totals = run(generators, sinks, seconds=30, linger=10, enough=200)
    assert (totals.received, totals.bytes) == (200, 12800)


def test_numbers_go_on_from_run_to_run(attach):
    guest = attach(queue_size=64)
    generator, sink = Generator(guest, guest, frames=100), Sink(guest)
    assert stream_through(generator, sink, 100).clean
    generator.record["limit"] = 150
    totals = stream_through(generator, sink, 50)
    assert (totals.sent, totals.received, totals.lost) == (50, 50, 0)


def test_a_damaged_frame_is_counted(attach):
    guest = attach(queue_size=64)
    generator = Generator(guest, guest, 100, raw=False, verify=True, frames=1)
    plain = Generator(guest, guest, 100, raw=False, frames=2)
    plain.record["next"] = 1
    sink = Sink(guest, raw=False, verify=True)
    totals = run([generator, plain], [sink], seconds=30, linger=10, enough=2)
    assert (totals.received, totals.corrupt) == (2, 1)


def test_foreign_frames_are_not_ours(attach):
    guest = attach(queue_size=64)
    ours = Generator(guest, guest, raw=False, frames=1)
    other = Generator(guest, guest, raw=False, frames=2, flow=5)
    sink = Sink(guest, raw=False)
    totals = run([ours, other], [sink], seconds=30, linger=10, enough=3)
    assert (totals.received, totals.foreign) == (1, 2)


def test_single_frames_are_timed(attach):
    guest = attach()
    times = hammer(guest, guest, 20, (0.0, 20.0), timeout=10)
    assert (times.rounds, times.arrived) == (20, 20)
    assert 0 < times.percentile(50) <= times.max_us
    assert latency(guest, guest, 3).arrived == 3


def test_a_frame_that_does_not_come_ends_the_hammering(attach):
    guest = attach()
    guest.stop()
    times = hammer(guest, guest, 50, (0.0, 1.0), timeout=0.01)
    assert (times.arrived, times.max_us) == (0, 0.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"length": 27}, "has 28 to"),
        ({"length": 2037}, "tx_buffer_len"),
        ({"length": (60, 70)}, "raw=False"),
        ({"verify": True}, "raw=False"),
        ({"pace": -1.0}, "-1 frames a second"),
        ({"timed": True, "raw": False}, "raw=True"),
        ({"timed": True, "length": 35}, "36 bytes"),
        ({"mix": (64, 128), "raw": False}, "cannot mix"),
        ({"mix": (64, 9000)}, "tx_buffer_len"),
    ],
)
def test_what_a_generator_cannot_do_is_said(attach, options, text):
    guest = attach()
    with pytest.raises(GuestError, match=text):
        Generator(guest, guest, **options)


def test_rates_of_nothing_are_zero():
    assert (Totals().mpps, Totals().gbps) == (0.0, 0.0)
