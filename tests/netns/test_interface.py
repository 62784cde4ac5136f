"""What holds for an interface as an uplink, however its frames come and go.

One end of a veth, whose other end is in a second namespace.
"""

import threading
import time

import pytest

from tests.netns.checks import (
    WOKEN_S,
    Traffic,
    assert_a_burst_at_most,
    assert_at_rest,
    assert_every_length_passes,
    assert_passes_both_ways,
    program,
    send_and_kill,
    wait_for_sleep,
)
from tests.netns.uplink import GUEST_MAC, WIRE_MAC, frame, number_of, numbered
from tests.switch import RefusedError, dropped, wait_for

pytestmark = pytest.mark.netns

# What `show` says besides of one that is up.
KINDS = {"eth": "", "xdp": " (native XDP, copy mode)"}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# --- its life ---


def test_an_interface_is_used_and_stays_as_it_was(bench, switch, namespace, far, kind):
    bench.cable("life0", far)
    before = namespace.link("life0")
    for _ in range(3):
        bench.uplink(kind, "life0")
        assert namespace.link("life0")["promiscuity"] == 1
        assert bool(program(namespace, "life0")) == (kind == "xdp")
        assert_passes_both_ways(bench.guest("vm"), bench.wire("life0", far))
        for name in ("life0", "vm"):
            switch.ask("del_port", name=name)
        after = namespace.link("life0")
        for counts in (before, after):
            counts.pop("stats64", None)
        assert after == before


def test_an_interface_stays_as_it_was_when_the_switch_is_killed(
    start, bench, namespace, far, kind
):
    bench.cable("life1", far)
    switch = start()
    switch.add_port("life1", f"{kind}:life1")
    assert namespace.link("life1")["promiscuity"] == 1
    assert bool(program(namespace, "life1")) == (kind == "xdp")
    switch.kill_with_keeper()
    wait_for(lambda: not program(namespace, "life1"), "the program's end")
    wait_for(lambda: namespace.link("life1")["promiscuity"] == 0, "the workers' end")


def test_an_interface_that_is_missing_after_a_kill_is_shown_and_waited_for(
    start, bench, namespace, far, kind
):
    bench.cable("life2", far)
    switch = start("--spares", 0)
    switch.add_port("life2", f"{kind}:life2")
    switch.kill_with_keeper()
    namespace.ip("link delete life2")
    switch.start()
    port = switch.port("life2")
    assert (port["kind"], port["state"], port["mode"]) == (kind, "down", "")
    why = "cannot use interface life2: there is none (choose one of: ip link show)"
    assert port["reason"] == f"{why}; it is tried again"
    bench.cable("life2", far)
    switch.wait_for_state("life2", "up")


def test_the_link_is_followed_down_and_up(plugged, switch, namespace, kind):
    guest, wire = plugged("link0")
    assert_passes_both_ways(guest, wire)
    namespace.ip("link set link0 down")
    port = switch.wait_for_port("link0", lambda port: port["state"] == "down")
    assert port["reason"] == "interface link0 is down (ip link set link0 up)"
    guest.send_all(numbered(WIRE_MAC, GUEST_MAC, 10))
    guest.wait_sent()
    wait_for(lambda: switch.counters("link0")["tx_drop_link_down"] == 10, "10 drops")
    assert_at_rest(switch)
    namespace.ip("link set link0 up")
    port = switch.wait_for_port("link0", lambda port: port["state"] == "up")
    assert port["reason"] == f"interface link0 is up{KINDS[kind]}"
    assert_passes_both_ways(guest, wire)


def test_the_carrier_is_followed(bench, plugged, switch, far, kind):
    guest, wire = plugged("link1")
    assert_passes_both_ways(guest, wire)
    far.ip("link set link1 down")
    port = switch.wait_for_port("link1", lambda port: port["state"] == "down")
    reason = (
        "interface link1 is without a carrier (look at its cable, or set its peer up)"
    )
    assert port["reason"] == reason
    if kind == "xdp":  # with eth it is the kernel that drops it, and says nothing
        guest.send_all(frame(WIRE_MAC, GUEST_MAC))
        wait_for(lambda: switch.counters("link1")["tx_drop_link_down"] == 1, "a drop")
    far.ip("link set link1 up")
    switch.wait_for_state("link1", "up")
    # The socket heard that its interface went down.
    assert_passes_both_ways(guest, bench.wire("link1", far))


def test_an_interface_is_deleted_and_made_again_under_traffic(
    bench, plugged, switch, namespace, far, kind
):
    guest, wire = plugged("again0")
    assert_passes_both_ways(guest, wire)
    reason = "interface again0 is gone (it may return)"
    with Traffic(guest):
        for _ in range(3):
            namespace.ip("link delete again0")
            switch.wait_for_port("again0", lambda p: p["reason"] == reason)
            far_end = f"name again0 netns {far.pid}"
            namespace.ip(f"link add again0 type veth peer {far_end}")
            for end in (namespace, far):
                end.ip("link set again0 up")
            switch.wait_for_state("again0", "up")
            assert len(bench.wire("again0", far).receive(10)) == 10
    guest.wait_sent()
    assert guest.receive(timeout=0, at_least=0) == []
    assert_passes_both_ways(guest, bench.wire("again0", far))
    assert namespace.link("again0")["promiscuity"] == 1
    assert bool(program(namespace, "again0")) == (kind == "xdp")


def test_an_interface_may_move_away_and_back(
    bench, plugged, switch, namespace, far, other_namespace
):
    guest, wire = plugged("move0")
    assert_passes_both_ways(guest, wire)
    namespace.ip(f"link set move0 netns {other_namespace.pid}")
    reason = "interface move0 is in another network namespace (it may return)"
    switch.wait_for_port("move0", lambda port: port["reason"] == reason)
    wait_for(lambda: not program(other_namespace, "move0"), "the program's end")
    other_namespace.ip(f"link set move0 netns {namespace.pid}")
    namespace.ip("link set move0 up")
    switch.wait_for_state("move0", "up")
    assert_passes_both_ways(guest, bench.wire("move0", far))


# --- what it cannot be, and what is said ---


def test_the_loopback_is_refused(switch, kind):
    with pytest.raises(RefusedError) as refusal:
        switch.add_port("odd", f"{kind}:lo")
    text = "port odd: cannot use interface lo: it is not Ethernet: it is the loopback"
    assert str(refusal.value) == f"{text} (choose another)"


def test_an_interface_without_addresses_is_not_warned_of(bench, far, kind):
    bench.cable("addr1", far)
    assert bench.uplink(kind, "addr1")["warnings"] == []


# --- frames, sleep and death ---


def test_frames_of_every_length_pass_unharmed(plugged, switch):
    guest, wire = plugged("size0")
    lengths = range(14, 1515)
    assert_every_length_passes(guest, wire, lengths)
    counted = switch.counters("size0")
    assert counted["rx_frames"] == counted["tx_frames"] == len(lengths)
    assert counted["rx_bytes"] == counted["tx_bytes"] == sum(lengths)
    assert dropped(counted, "rx") == dropped(counted, "tx") == 0


def test_a_frame_wakes_a_worker_that_sleeps(plugged, switch):
    guest, wire = plugged("wake0")
    assert_passes_both_ways(guest, wire)
    for _ in range(30):
        wait_for_sleep(switch)
        begin = time.monotonic()
        down = frame(GUEST_MAC, WIRE_MAC)
        wire.send(down)
        assert guest.receive(timeout=10) == [down]
        assert time.monotonic() - begin < WOKEN_S


@pytest.mark.parametrize("inward", [True, False], ids=["in", "out"])
def test_a_worker_s_death_costs_a_burst_at_most(start, make_bench, far, kind, inward):
    switch = start()
    bench = make_bench(switch)
    bench.cable("heir0", far)
    bench.uplink(kind, "heir0")
    guest, wire = bench.guest("vm"), bench.wire("heir0", far)
    sent = 1000
    for _ in range(2):
        switch.wait_for_workers(1, 1)
        assert_passes_both_ways(guest, wire)
        before = [switch.counters(name) for name in ("heir0", "vm")]
        ends = (GUEST_MAC, WIRE_MAC) if inward else (WIRE_MAC, GUEST_MAC)
        send = wire.send if inward else guest.send_all
        frames = numbered(*ends, sent)
        thread = threading.Thread(target=send_and_kill, args=(send, frames, switch))
        thread.start()
        if inward:
            numbers = []
            while numbers[-1:] != [sent - 1]:
                came = guest.receive(timeout=20, max_frames=64)
                numbers += [number_of(one) for one in came]
        else:
            numbers = wire.receive_until(sent - 1)
        thread.join()
        after = [switch.counters(name) for name in ("heir0", "vm")]
        counted = sum(
            new["rx_missed"]
            + dropped(new, "tx")
            - old["rx_missed"]
            - dropped(old, "tx")
            for old, new in zip(before, after, strict=True)
        )
        assert_a_burst_at_most(numbers, sent, counted)
        guest.wait_sent()
