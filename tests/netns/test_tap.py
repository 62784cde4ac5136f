"""Taps as uplinks: real ones, in a network namespace, with a switch inside it."""

import hashlib
import os
import random
import signal
import socket
import struct
import threading
import time

import pytest

from tests.netns.checks import (
    WOKEN_S,
    assert_at_rest,
    assert_passes_both_ways,
    stopped,
    without,
)
from tests.netns.uplink import (
    GUEST_MAC,
    MULTI_QUEUE,
    TAP,
    TUN,
    VNET_HDR,
    WIRE_MAC,
    frame,
    hold,
    numbered,
)
from tests.switch import RefusedError, dropped, wait_for
from vswitch.guest import Shape, netstack
from vswitch.guest.netstack import NetStack

pytestmark = pytest.mark.netns

BURST = 1000
EDGES = 10_000
EDGES_AT_ONCE = (1,) * 30 + (2, 3, 80)
PIECES = Shape(pieces=5)
# A worker that was not woken looks by itself after a second.


# --- the interface's life ---


def test_a_tap_is_made_and_goes_with_its_port(bench, switch, namespace):
    bench.tap("made0")
    assert "UP" in namespace.link("made0")["flags"]
    switch.ask("del_port", name="made0")
    assert namespace.link("made0") is None


def test_a_tap_goes_with_the_switch(start, namespace):
    switch = start()
    switch.add_port("made1", "tap:made1")
    assert namespace.link("made1")
    assert switch.end() == 0
    assert namespace.link("made1") is None


@pytest.mark.parametrize("option", ["", " multi_queue", " vnet_hdr"], ids=repr)
def test_a_tap_that_was_there_is_used_and_stays(bench, switch, namespace, option):
    bench.interface("there0", f"tuntap add there0 mode tap{option}")
    bench.tap("there0")
    assert_passes_both_ways(bench.guest("vm"), bench.wire("there0"))
    switch.ask("del_port", name="there0")
    assert namespace.link("there0")


def test_a_tap_stays_when_the_switch_ends(start, bench, namespace):
    bench.interface("there1", "tuntap add there1 mode tap")
    switch = start()
    switch.add_port("there1", "tap:there1")
    assert switch.end() == 0
    assert namespace.link("there1")


def test_the_same_tap_can_be_added_and_removed_again_and_again(bench, switch):
    guest = bench.guest("vm")
    for _ in range(5):
        bench.tap("again0")
        assert_passes_both_ways(guest, bench.wire("again0"))
        switch.ask("del_port", name="again0")


def test_the_link_is_followed_down_and_up(bench, switch, namespace):
    bench.tap("link0")
    guest, wire = bench.guest("vm"), bench.wire("link0")
    assert_passes_both_ways(guest, wire)
    namespace.ip("link set link0 down")
    port = switch.wait_for_port("link0", lambda port: port["state"] == "down")
    assert port["reason"] == "interface link0 is down (ip link set link0 up)"
    sent = switch.counters("link0")["tx_frames"]
    guest.send_all(numbered(WIRE_MAC, GUEST_MAC, 10))
    guest.wait_sent()
    wait_for(lambda: switch.counters("link0")["tx_drop_link_down"] == 10, "10 drops")
    assert switch.counters("link0")["tx_frames"] == sent
    namespace.ip("link set link0 up")
    port = switch.wait_for_port("link0", lambda port: port["state"] == "up")
    assert port["reason"] == "interface link0 is up"
    # The socket heard that its interface went down.
    assert_passes_both_ways(guest, bench.wire("link0"))


def test_the_link_is_followed_after_more_events_than_the_kernel_keeps(
    bench, switch, namespace
):
    bench.tap("flood0")
    bench.interface("noise0", "link add name noise0 type bridge")
    try:
        os.kill(switch.pid, signal.SIGSTOP)
        toggle = "link set noise0 up\nlink set noise0 down\n" * 1000
        namespace.run("sh", "-c", f"ip -batch - <<'.'\n{toggle}.")
        namespace.ip("link set flood0 down")
    finally:
        os.kill(switch.pid, signal.SIGCONT)
    switch.wait_for_log("interface flood0: looking anew: ENOBUFS")
    switch.wait_for_state("flood0", "down")
    namespace.ip("link set flood0 up")
    switch.wait_for_state("flood0", "up")


def test_an_interface_that_is_deleted_leaves_a_port_that_is_down(
    bench, switch, namespace
):
    bench.tap("lost0")
    guest = bench.guest("vm")
    assert_passes_both_ways(guest, bench.wire("lost0"))
    namespace.ip("link delete lost0")
    port = switch.wait_for_port("lost0", lambda port: port["state"] == "down")
    assert "gone" in port["reason"]
    assert "vswitch del-port lost0" in port["reason"]
    guest.send_all(numbered(WIRE_MAC, GUEST_MAC, 10))
    guest.wait_sent()
    wait_for(lambda: switch.counters("lost0")["tx_drop_link_down"] == 10, "10 drops")
    worker = assert_at_rest(switch)
    switch.ask("del_port", name="lost0")
    bench.tap("lost0")
    assert_passes_both_ways(guest, bench.wire("lost0"))
    assert switch.workers("active")[0]["pid"] == worker["pid"]


def test_an_interface_may_move_to_another_namespace(
    bench, switch, namespace, other_namespace
):
    bench.tap("move0")
    namespace.ip(f"link set move0 netns {other_namespace.pid}")
    other_namespace.ip("link set move0 up")
    port = switch.wait_for_port("move0", lambda port: "another" in port["reason"])
    assert port["state"] == "up"
    wire = bench.wire("move0", other_namespace)
    assert_passes_both_ways(bench.guest("vm"), wire)


# --- what cannot be used ---


@pytest.mark.parametrize(
    "make",
    ["link add name odd0 type bridge", "tuntap add odd0 mode tun"],
    ids=["bridge", "tun"],
)
def test_an_interface_that_is_no_tap_is_refused(bench, switch, make):
    bench.interface("odd0", make)
    text = "port odd0: cannot attach to tap odd0: EINVAL: it exists and is not a tap"
    with pytest.raises(RefusedError, match=text):
        switch.add_port("odd0", "tap:odd0")


def test_the_loopback_is_no_tap(switch):
    with pytest.raises(RefusedError, match="EINVAL: it exists and is not a tap"):
        switch.add_port("odd1", "tap:lo")


@pytest.mark.parametrize("flags", [TAP, TAP | MULTI_QUEUE], ids=["tap", "many queues"])
def test_a_tap_that_another_program_has_is_refused(bench, switch, flags):
    bench.hold("taken0", flags)
    text = "cannot attach to tap taken0: EBUSY: another program is attached to it"
    with pytest.raises(RefusedError, match=text):
        switch.add_port("taken0", "tap:taken0")


def test_a_tun_that_another_program_has_is_no_tap(bench, switch):
    bench.hold("taken1", TUN)
    with pytest.raises(RefusedError, match="it exists and is not a tap"):
        switch.add_port("taken1", "tap:taken1")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a" * 16, "a name has 1 to 15 bytes"),
        ("\N{SNOWMAN}" * 6, "a name has 1 to 15 bytes"),
        ("tap%d", "a character the kernel refuses"),
        ("tap 0", "a character the kernel refuses"),
        ("tap:0", "a character the kernel refuses"),
        ("tap\0", "a character of it cannot be printed"),
        ("a/b", "a character the kernel refuses"),
        ("..", "a character the kernel refuses"),
    ],
)
def test_a_name_that_no_interface_can_have_is_refused(switch, namespace, name, text):
    before = namespace.ip("-oneline link show")
    with pytest.raises(RefusedError, match=text):
        switch.add_port("odd", f"tap:{name}")
    assert namespace.ip("-oneline link show") == before


def test_without_the_right_only_taps_that_are_ready_can_be_used(
    start, make_bench, namespace
):
    switch = start(prefix=without("net_admin"))
    bench = make_bench(switch)
    text = "cannot make tap right0: EPERM: we have no CAP_NET_ADMIN"
    with pytest.raises(RefusedError, match=text):
        switch.add_port("right0", "tap:right0")
    bench.interface("right0", "tuntap add right0 mode tap")
    text = r"cannot set right0 up: EPERM: .*CAP_NET_ADMIN \(ip link set right0 up\)"
    with pytest.raises(RefusedError, match=text):
        switch.add_port("right0", "tap:right0")
    namespace.ip("link set right0 up")
    bench.tap("right0")
    assert_passes_both_ways(bench.guest("vm"), bench.wire("right0"))
    bench.interface("theirs0", "tuntap add theirs0 mode tap user 12345")
    with pytest.raises(RefusedError, match="attach to tap theirs0: EPERM"):
        switch.add_port("theirs0", "tap:theirs0")


# --- frames ---


def assert_every_length_passes(guest, wire, lengths):
    for at in range(0, len(lengths), 64):
        part = lengths[at : at + 64]
        up = [frame(WIRE_MAC, GUEST_MAC, length, length) for length in part]
        guest.send_all(up)
        assert wire.receive(len(up)) == up
        down = [frame(GUEST_MAC, WIRE_MAC, length, length) for length in part]
        for one in down:
            wire.send(one)
        assert guest.receive(timeout=10, at_least=len(down)) == down


def test_frames_of_every_length_pass_unharmed(bench, switch):
    bench.tap("size0")
    guest, wire = bench.guest("vm"), bench.wire("size0")
    lengths = range(14, 1515)
    assert_every_length_passes(guest, wire, lengths)
    counted = switch.counters("size0")
    assert counted["rx_frames"] == counted["tx_frames"] == len(lengths)
    assert counted["rx_bytes"] == counted["tx_bytes"] == sum(lengths)
    assert dropped(counted, "rx") == dropped(counted, "tx") == 0


def test_jumbo_frames_pass_up_to_the_interface_s_mtu(bench, namespace):
    bench.tap("jumbo0")
    namespace.ip("link set jumbo0 mtu 9216")
    guest, wire = bench.guest("vm", tx_buffer_len=16384), bench.wire("jumbo0")
    lengths = [*range(1515, 9000, 333), *range(9000, 9231)]
    assert_every_length_passes(guest, wire, lengths)


def test_frames_in_many_pieces_reach_a_tap_unharmed(bench):
    bench.tap("piece0")
    guest = bench.guest("vm", shape=PIECES)
    assert_every_length_passes(guest, bench.wire("piece0"), range(14, 1515, 7))


def test_a_burst_out_of_a_tap_arrives_or_is_counted(bench, switch, namespace):
    bench.tap("burst0")
    guest, wire = bench.guest("vm"), bench.wire("burst0")
    assert_passes_both_ways(guest, wire)
    frames = numbered(GUEST_MAC, WIRE_MAC, BURST)
    taken = wire.send_counted(frames)
    # The kernel counts what the interface's own queue had no room for.
    lost = namespace.link("burst0")["stats64"]["tx"]["dropped"]
    arrived = guest.receive(timeout=10, at_least=taken - lost)
    assert len(arrived) == taken - lost
    assert [f for f in frames if f in set(arrived)] == arrived  # in order, each once
    assert switch.counters("burst0")["rx_frames"] == 1 + len(arrived)


def test_a_burst_into_a_tap_arrives(bench):
    bench.tap("burst1")
    guest, wire = bench.guest("vm"), bench.wire("burst1")
    assert_passes_both_ways(guest, wire)
    frames = numbered(WIRE_MAC, GUEST_MAC, BURST)
    guest.send_all(frames)
    assert wire.receive(BURST) == frames


@pytest.mark.parametrize("idle_us", [0, 20, 100])
def test_a_worker_that_falls_asleep_never_misses_a_frame(start, make_bench, idle_us):
    """An edge between the last read of the tap and epoll_wait must not be lost.

    The pauses put frames before, into and behind the moment of falling asleep; the
    bursts outlast a turn.
    """
    bench = make_bench(start("--idle-us", idle_us))
    bench.tap("edge0")
    guest, wire = bench.guest("vm"), bench.wire("edge0")
    assert_passes_both_ways(guest, wire)
    chance = random.Random(idle_us)
    one = frame(GUEST_MAC, WIRE_MAC)
    for _ in range(EDGES // 3):
        end = time.perf_counter_ns() + chance.randrange(600_000 + 4000 * idle_us)
        while time.perf_counter_ns() < end:
            pass
        count = chance.choice(EDGES_AT_ONCE)
        for _ in range(count):
            wire.send(one)
        begin = time.monotonic()
        assert len(guest.receive(timeout=10, at_least=count)) == count
        assert time.monotonic() - begin < WOKEN_S
    (worker,) = bench.switch.workers("active")
    assert (
        bench.switch.ask("stats")["workers"][str(worker["id"])]["wakeups"] > EDGES // 30
    )


def test_a_queue_that_outlasts_a_turn_is_emptied_before_sleep(
    start, make_bench, namespace
):
    """Its edge is gone after the first turn; with no idle time that was the last."""
    switch = start("--idle-us", 0)
    bench = make_bench(switch)
    bench.tap("long0")
    namespace.ip("link set long0 txqueuelen 10000")
    guest, wire = bench.guest("vm"), bench.wire("long0")
    assert_passes_both_ways(guest, wire)
    (worker,) = switch.workers("active")
    with stopped(switch.pid, worker["pid"]):
        assert wire.send_counted([frame(GUEST_MAC, WIRE_MAC, 1514)] * 9000) == 9000
    switch.wait_for(
        lambda: switch.counters("long0")["rx_frames"] == 9001,
        lambda: switch.counters("long0"),
        timeout=4,
    )
    into = switch.counters("vm")
    arrived = guest.receive(timeout=0, at_least=0, max_frames=9000)
    assert 1 + len(arrived) == into["tx_frames"]
    assert into["tx_frames"] + into["tx_drop_ring_full"] == 9001


def test_a_tap_goes_on_when_its_worker_is_killed(start, make_bench):
    switch = start()
    bench = make_bench(switch)
    bench.tap("heir0")
    guest, wire = bench.guest("vm"), bench.wire("heir0")
    for _ in range(3):
        switch.wait_for_workers(1, 1)
        assert_passes_both_ways(guest, wire)
        (worker,) = switch.workers("active")
        os.kill(worker["pid"], signal.SIGKILL)
        switch.wait_for(
            lambda gone=worker["pid"]: gone not in switch.worker_pids(), "an heir"
        )
        assert_passes_both_ways(guest, wire)


# --- the kernel's network stack ---


def test_the_kernel_and_a_guest_ping_each_other(bench, namespace):
    bench.tap("ping0")
    namespace.ip("address add 10.78.0.254/24 dev ping0")
    with NetStack(bench.guest("vm"), "10.78.0.1") as stack:
        assert None not in stack.ping("10.78.0.254", count=20, timeout=10)
        raw = bench.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        raw.connect(("10.78.0.1", 0))
        for number in range(1, 21):
            payload = os.urandom(56 * number)
            request = [8, 0, 0, os.getpid() & 0xFFFF, number]
            head = struct.pack("!BBHHH", *request)
            request[2] = netstack.checksum(head + payload)
            raw.send(struct.pack("!BBHHH", *request) + payload)
            answer = raw.recv(2048)[20:]
            assert answer[0] == 0
            assert answer[4:] == struct.pack("!HH", *request[3:]) + payload


def test_the_kernel_and_a_guest_exchange_datagrams(bench, namespace):
    bench.tap("udp0")
    namespace.ip("address add 10.78.0.254/24 dev udp0")
    with NetStack(bench.guest("vm"), "10.78.0.1") as stack:
        udp = bench.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("10.78.0.254", 5001))
        payload = os.urandom(1400)
        udp.sendto(struct.pack("!cIII", b"D", 1, 0, 1) + payload, ("10.78.0.1", 5001))
        answer, sender = udp.recvfrom(2048)
        assert sender == ("10.78.0.1", 5001)
        digest = hashlib.sha256(payload).digest()
        assert answer == struct.pack("!cIII", b"A", 1, 1, 1) + digest
        assert stack.received == [payload]


@pytest.mark.parametrize("before", [None, 0x07], ids=["new", "used with offloads"])
def test_two_kernels_talk_tcp_over_two_taps(
    bench, switch, namespace, other_namespace, before
):
    """Whoever used a tap before may have taken unfinished checksums and super-frames."""
    for name in ("tcp1", "tcp2"):
        bench.interface(name, f"tuntap add {name} mode tap")
        if before is not None:
            hold(namespace, name, TAP | VNET_HDR, before).close()
        bench.tap(name)
    namespace.ip(f"link set tcp2 netns {other_namespace.pid}")
    namespace.ip("address add 10.79.0.1/24 dev tcp1")
    other_namespace.ip("address add 10.79.0.2/24 dev tcp2")
    other_namespace.ip("link set tcp2 up")
    data = random.Random(1).randbytes(8 << 20)
    listener = bench.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("10.79.0.1", 80))
    listener.listen()
    client = bench.socket(socket.AF_INET, socket.SOCK_STREAM, namespace=other_namespace)
    client.connect(("10.79.0.1", 80))
    server, _ = listener.accept()
    with server:
        server.settimeout(10)
        sending = threading.Thread(target=client.sendall, args=(data,))
        sending.start()
        received = bytearray()
        while len(received) < len(data):
            received += server.recv(1 << 20)
        sending.join()
    assert received == data
