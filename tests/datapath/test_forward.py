"""Where frames go: a learning switch, and a count for everything that it drops."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ports.base import RING_STOPPED
from ports.burst import BAD_CHAIN, BAD_HEADER, TOO_LONG, TOO_SHORT
from ports.views import frame_at
from tests import naive
from tests.datapath.bench import A, B, Bench, C, D
from tests.datapath.conftest import make_plane
from tests.datapath.rings import Side, frame_to, mac
from vswitch.datapath import fdb, forward

BROADCAST = b"\xff" * 6
LLDP = b"\x01\x80\xc2\x00\x00\x0e"


def send_all(guest, frames):
    """Offer frames so that they lie in one burst."""
    for i, frame in enumerate(frames):
        guest.send(frame, index=i, offset=0x20000 + 256 * i)


def received(guest):
    """The frames that arrived, which are posted again."""
    frames = []
    for head, length in guest.rx.reap():
        frames.append(guest.buffer(head, length)[12:])
        guest.rx.offer(head)
    return frames


# --- a switch ---


def test_a_known_address_gets_frames_alone(bench, pair):
    a, b = pair
    c = bench.guest(C)
    c.post(4)
    b.send(frame_to(A, B))  # unknown yet: flooded
    bench.turn()
    a.send(frame_to(B, A))
    bench.turn()
    assert len(c.rx.reap()) == 1
    assert len(a.rx.reap()) == len(b.rx.reap()) == 1
    assert bench.plane.tally(A)["rx_forwarded"] == 1
    assert bench.plane.tally(B)["rx_flooded"] == 1


def test_a_broadcast_reaches_every_other_port_once(bench, pair):
    a, b = pair
    c = bench.guest(C)
    c.post(4)
    a.send(BROADCAST + mac(A) + b"\x08\x06" + bytes(46))
    bench.turn()
    assert [len(g.rx.reap()) for g in (a, b, c)] == [0, 1, 1]


def test_order_holds_between_flooded_and_known_frames(bench, pair):
    a, b = pair
    b.send(frame_to(A, B))
    bench.turn()
    received(a)
    to = [mac(B) if i % 2 else BROADCAST for i in range(6)]
    frames = [dst + mac(A) + bytes([i]) * 60 for i, dst in enumerate(to)]
    send_all(a, frames)
    bench.round()
    assert received(b) == frames


STATIONS = st.sampled_from(
    [*(mac(n) for n in range(1, 6)), bytes(6), BROADCAST, b"\x33\x33" + bytes(4)]
)
BURSTS = st.lists(
    st.tuples(
        st.sampled_from([A, B, C, D]),
        st.lists(st.tuples(STATIONS, STATIONS), min_size=1, max_size=6),
    ),
    max_size=6,
)


class World:
    """Four guests that stay, on a switch that forgets."""

    def __init__(self):
        self.bench = Bench(make_plane())
        self.guests = {slot: self.bench.guest(slot) for slot in (A, B, C, D)}
        for guest in self.guests.values():
            guest.post(8)
        self.bench.round()

    def forget(self):
        shared = self.bench.plane.shared
        for table in (shared.fdb, shared.counters):
            table[:] = 0
        shared.ports["addresses"] = 0


@pytest.fixture(scope="module")
def world():
    world = World()
    yield world
    world.bench.close()


@given(bursts=BURSTS)
def test_it_forwards_like_a_naive_switch(world, bursts):
    world.forget()
    model, expected_words, copies = naive.Switch(list(world.guests)), [], []
    for number, (ingress, pairs) in enumerate(bursts):
        frames = [
            dst + src + bytes([number, i]) * 25 for i, (dst, src) in enumerate(pairs)
        ]
        expected = {slot: [] for slot in world.guests}
        for frame in frames:
            egresses, word = model.forward(ingress, frame)
            expected_words.append((ingress, word))
            for egress in egresses:
                expected[egress].append(frame)
                copies.append(egress)
        send_all(world.guests[ingress], frames)
        world.bench.round()
        assert {s: received(g) for s, g in world.guests.items()} == expected
        assert len(world.guests[ingress].tx.reap()) == len(frames)
    for slot in world.guests:
        words = [word for ingress, word in expected_words if ingress == slot]
        tally = world.bench.tally(slot)
        assert {k: n for k, n in tally.items() if k in words or "_drop_" in k} == {
            word: words.count(word) for word in words
        }
        assert tally.get("rx_frames", 0) == len(words)
        assert tally.get("tx_frames", 0) == copies.count(slot)


@given(bursts=BURSTS, room=st.integers(0, 4))
def test_every_copy_is_sent_or_counted_as_dropped(world, bursts, room):
    world.forget()
    guest = world.guests[D]
    kept, model, copies, reaped = 8 - room, naive.Switch(list(world.guests)), 0, 0
    # The buffers that D keeps to itself are offered again at the end.
    guest.rx.offered = (guest.rx.offered - kept) & 0xFFFF
    guest.rx.offer()
    for ingress, pairs in bursts:
        frames = [dst + src + bytes(50) for dst, src in pairs]
        copies += sum(D in model.forward(ingress, frame)[0] for frame in frames)
        send_all(world.guests[ingress], frames)
        world.bench.round()
        for slot in (A, B, C):
            received(world.guests[slot])
    tally = world.bench.tally(D)
    reaped = guest.rx.reap()
    assert tally.get("tx_frames", 0) == len(reaped) == min(copies, room)
    assert tally.get("tx_drop_ring_full", 0) == copies - len(reaped)
    world.bench.check_ledger()
    guest.rx.offered = (guest.rx.offered + kept) & 0xFFFF
    guest.rx.offer(*(head for head, _ in reaped))


# --- addresses ---


def test_a_hairpin_is_dropped(bench, pair):
    a, _ = pair
    a.send(frame_to(9, A))
    bench.turn()
    a.send(frame_to(A, 9))
    bench.turn()
    assert bench.drops(A) == {"rx_drop_hairpin": 1}


@pytest.mark.parametrize("src", [bytes(6), b"\x01\x00\x5e\x00\x00\x01", BROADCAST])
def test_a_source_that_no_station_has_is_dropped(bench, pair, src):
    a, b = pair
    a.send(mac(B) + src + bytes(50))
    bench.turn()
    assert bench.drops(A) == {"rx_drop_bad_source": 1}
    assert b.rx.reap() == []
    assert bench.plane.shared.ports[A]["addresses"] == 0


@pytest.mark.parametrize("forwarded", [0, 1])
def test_reserved_addresses_pass_if_the_switch_says_so(bench, pair, forwarded):
    a, b = pair
    bench.plane.shared.header[0]["forward_reserved"] = forwarded
    a.send(LLDP + mac(A) + bytes(50))
    bench.turn()
    assert len(b.rx.reap()) == forwarded
    assert bench.drops(A) == ({} if forwarded else {"rx_drop_reserved": 1})


def test_a_frame_to_address_zero_at_the_head_of_a_burst_is_flooded(bench, pair):
    # It matched what no address had been looked up as, and went to port -2.
    a, b = pair
    frames = [bytes(6) + mac(A) + bytes([i]) * 50 for i in range(3)]
    send_all(a, frames)
    bench.round()
    assert received(b) == frames
    assert bench.tally(A)["rx_flooded"] == 3


def test_address_zero_is_not_found_in_an_empty_place(bench, pair):
    # It matched the first place without an entry, whose port reads as the first slot.
    a, b = pair
    first = bench.guest(0)
    first.post(4)
    send_all(a, [frame_to(9, A), bytes(6) + mac(A) + bytes(50)])
    bench.round()
    assert [len(received(guest)) for guest in (first, b)] == [2, 2]


def test_an_address_that_moves_within_a_burst_is_looked_up_again(bench, pair):
    a, b = pair
    b.send(frame_to(A, 9))
    bench.turn()
    received(a)
    # The station 9 moved to A: what follows must not leave to where it was.
    send_all(a, [frame_to(9, A), frame_to(9, 9), frame_to(9, A)])
    bench.round()
    assert received(b) == [frame_to(9, A)]
    assert bench.drops(A) == {"rx_drop_hairpin": 2}


def test_a_burst_brings_eight_new_addresses_at_most(bench, pair):
    a, _ = pair
    stations = range(0x20, 0x20 + 12)
    for learned in (8, 12, 12):
        send_all(a, [frame_to(B, station) for station in stations])
        bench.round()
        assert bench.tally(A)["fdb_learned"] == learned
        a.tx.reap()
    assert bench.tally(A)["fdb_refused"] == 4


def test_a_port_at_its_limit_of_addresses_is_flooded_to(bench, pair):
    a, b = pair
    c = bench.guest(C)
    c.post(8)
    bench.plane.shared.ports[A]["max_addresses"] = 2
    send_all(a, [frame_to(99, station) for station in (11, 12, 13)])
    bench.round()
    received(b)
    received(c)
    send_all(b, [frame_to(station, B) for station in (11, 12, 13)])
    bench.round()
    assert bench.tally(A)["fdb_refused"] == 1
    assert [len(received(guest)) for guest in (a, c)] == [3, 1]


def test_a_static_address_is_not_learned_elsewhere(bench, pair):
    a, b = pair
    c = bench.guest(C)
    c.post(8)
    fdb.set_static(bench.plane.ctx, int.from_bytes(mac(9), "little"), B)
    c.send(frame_to(A, 9))
    bench.turn()
    received(b)
    a.send(frame_to(9, A))
    bench.turn()
    assert len(received(b)) == 1
    assert received(c) == []


def test_an_address_is_forgotten_when_it_has_aged(bench, pair):
    a, b = pair
    c = bench.guest(C)
    c.post(8)
    b.send(frame_to(A, B))
    bench.turn(now_s=0)
    received(c)
    a.send(frame_to(B, A))
    bench.turn(now_s=299)
    assert received(c) == []
    a.send(frame_to(B, A))
    bench.turn(now_s=300)
    assert received(c) == [frame_to(B, A)]


# --- ports and rings that are not ready ---


def test_a_port_that_is_not_up_gets_nothing(bench, pair):
    a, b = pair
    b.send(frame_to(A, B))
    bench.turn()
    bench.plane.shared.ports[B]["up"] = 0
    a.send(frame_to(B, A))
    a.send(BROADCAST + mac(A) + bytes(50), index=1, offset=0x21000)
    bench.turn()
    assert b.rx.reap() == []
    assert bench.drops(B) == {"tx_drop_not_ready": 1}


@pytest.mark.parametrize(("field", "value"), [("state", RING_STOPPED), ("enabled", 0)])
def test_a_receive_queue_that_does_not_run_gets_nothing(bench, pair, field, value):
    a, b = pair
    bench.turn()
    b.rx.record[field] = value
    a.send(frame_to(B, A))
    bench.turn()
    assert b.rx.reap() == []
    assert bench.drops(B) == {"tx_drop_not_ready": 1}


def test_a_disabled_transmit_queue_is_drained_and_discarded(bench, pair):
    a, b = pair
    a.tx.record["enabled"] = 0
    send_all(a, [frame_to(B, A), bytes(13)])
    bench.turn()
    assert a.tx.reap() == [(0, 0), (1, 0)]
    assert b.rx.reap() == []
    assert bench.drops(A) == {"rx_drop_disabled": 2}
    assert bench.plane.shared.ports[A]["addresses"] == 0


# --- several queues, several workers ---


@pytest.fixture
def wide(bench, pair):
    """Guest A with a second queue pair."""
    a, _ = pair
    bench.plane.shared.ports[A]["pairs"] = 2
    return a, Side(a, 2, 0x14000), Side(a, 3, 0x18000)


def test_two_rings_of_a_port_are_one_port(bench, pair, wide):
    a, b = pair
    _, _, second = wide
    a.send(frame_to(B, A), offset=0x30000)
    first, a.tx = a.tx, second
    send_all(a, [frame_to(A, 7), BROADCAST + mac(7) + bytes(50)])
    bench.round()
    assert (len(first.reap()), len(second.reap())) == (1, 2)
    assert received(a) == []
    assert len(received(b)) == 2
    assert bench.tally(A)["rx_drop_hairpin"] == 1


def test_the_flow_chooses_the_pair_whichever_worker_has_it(bench, pair, wide):
    a, b = pair
    queues = a.rx, wide[1]
    a.rx = wide[1]
    a.post(4, base=0x50000)
    counts = []
    for worker in (0, 3):
        b.tx.record["owner"] = worker
        b.send(frame_to(A, B))
        assert bench.turn(worker=worker) == 1
        counts.append([len(queue.reap()) for queue in queues])
    assert counts[0] == counts[1]
    assert sum(counts[0]) == 1


def test_a_shared_ring_is_left_unlocked(bench, pair):
    a, b = pair
    b.rx.record["shared"] = 1
    a.send(frame_to(B, A))
    bench.turn()
    assert len(received(b)) == 1
    assert b.rx.record["lock"] == 0


def test_frames_for_a_ring_that_somebody_holds_are_dropped(bench, pair):
    a, b = pair
    b.rx.record["shared"], b.rx.record["lock"] = 1, 5
    a.send(frame_to(B, A))
    bench.turn()
    assert bench.drops(B) == {"tx_drop_lock_busy": 1}
    assert b.rx.record["lock"] == 5


# --- what `take` found malformed ---


@pytest.mark.parametrize(
    ("verdict", "name"),
    [
        (BAD_CHAIN, "rx_drop_bad_chain"),
        (TOO_SHORT, "rx_drop_too_short"),
        (TOO_LONG, "rx_drop_too_long"),
        (BAD_HEADER, "rx_drop_bad_header"),
    ],
)
def test_each_malformed_frame_has_its_count(bench, pair, verdict, name):
    a, _ = pair
    ctx = bench.plane.ctx
    for i in range(3):
        frame_at(int(ctx["burst"]), i)["length"] = verdict
    assert forward.decide(ctx, 0, a.tx.record, 3, 0) == (0, 0)
    assert bench.tally(A) == {"rx_frames": 3, name: 3}
