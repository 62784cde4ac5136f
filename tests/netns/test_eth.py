"""Interfaces as uplinks: one end of a veth, whose other end is in a second namespace."""

import asyncio
import gc
import os
import re
import shlex
import signal
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from ports import packet_socket
from ports.base import PORT, RING, RING_RUNNING, RINGS_PER_PORT, RX
from ports.eth import EthPort
from ports.host import Mapping
from tests.netns.checks import (
    TAG,
    assert_every_length_passes,
    assert_passes_both_ways,
    by_flow,
    flows,
    stopped,
    vswitch,
    wait_for_sleep,
    without,
    worker_frames,
)
from tests.netns.uplink import (
    GUEST_MAC,
    WIRE_MAC,
    frame,
    numbered,
)
from tests.switch import (
    RefusedError,
    wait_for,
)
from vswitch import shared
from vswitch.guest import Shape

pytestmark = pytest.mark.netns

PIECES = Shape(pieces=5)
SLOTS = 480  # of a ring
TCPV4 = 1  # gso_type


@pytest.fixture
def kind():
    return "eth"


# --- the interface's life ---


def test_an_interface_may_be_down_at_first(bench, switch, namespace, far):
    bench.cable("link2", far)
    namespace.ip("link set link2 down")
    switch.add_port("link2", "eth:link2")
    assert switch.port("link2")["state"] == "down"
    namespace.ip("link set link2 up")
    switch.wait_for_state("link2", "up")
    assert_passes_both_ways(bench.guest("vm"), bench.wire("link2", far))
    switch.ask("del_port", name="link2")


def test_the_interface_s_mtu_is_followed(plugged, switch, namespace, far):
    guest, wire = plugged("mtu0", tx_buffer_len=16384, rx_buffer_len=16384)
    too_long = frame(WIRE_MAC, GUEST_MAC, 1515)
    guest.send_all(too_long)
    wait_for(lambda: switch.counters("mtu0")["tx_drop_too_long"] == 1, "a drop")
    for end in (namespace, far):
        end.ip("link set mtu0 mtu 9216")
    lengths = [*range(1515, 9000, 333), *range(9000, 9231)]
    assert_every_length_passes(guest, wire, lengths)
    guest.send_all(frame(WIRE_MAC, GUEST_MAC, 9231))
    wait_for(lambda: switch.counters("mtu0")["tx_drop_too_long"] == 2, "a drop")
    assert switch.port("mtu0")["state"] == "up"


def test_a_port_whose_interface_is_gone_can_be_removed(plugged, switch, namespace):
    plugged("lost0")
    namespace.ip("link delete lost0")
    switch.wait_for_port("lost0", lambda port: "is gone" in port["reason"])
    switch.ask("del_port", name="lost0")
    assert "lost0" not in [port["name"] for port in switch.ask("show")["ports"]]


# --- what cannot be used ---


def assert_refused(switch, name, text):
    with pytest.raises(RefusedError) as refusal:
        switch.add_port("odd", f"eth:{name}")
    assert str(refusal.value) == f"port odd: {text}"


def test_an_interface_that_is_not_there_is_refused(switch):
    text = "cannot use interface odd0: there is none (choose one of: ip link show)"
    assert_refused(switch, "odd0", text)


def test_an_interface_without_ethernet_is_refused(bench, switch):
    bench.interface("odd1", "tuntap add odd1 mode tun")
    text = "cannot use interface odd1: it is not Ethernet: it carries IP without"
    text += " Ethernet, as tun and WireGuard do (choose another)"
    assert_refused(switch, "odd1", text)


def test_an_interface_of_a_bridge_is_refused(bench, switch, namespace, far):
    bench.interface("odd2", "link add name odd2 type bridge")
    bench.cable("odd3", far)
    namespace.ip("link set odd3 master odd2")
    text = "cannot use interface odd3: it belongs to odd2 already"
    assert_refused(switch, "odd3", f"{text} (ip link set odd3 nomaster)")
    namespace.ip("link set odd3 nomaster")
    bench.uplink("eth", "odd3")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a" * 16, "a name has 1 to 15 bytes (choose another)"),
        ("..", "it has a character the kernel refuses (use letters, digits, - and _)"),
    ],
)
def test_a_name_that_no_interface_can_have_is_refused(switch, name, text):
    assert_refused(switch, name, f"cannot use eth {name!r}: {text}")


def test_an_interface_is_one_port_s_whatever_its_kind(bench, switch, far):
    bench.cable("twice0", far)
    bench.uplink("eth", "twice0")
    for kind in ("eth", "tap"):
        text = "cannot add port odd: eth:twice0 is port twice0"
        with pytest.raises(RefusedError, match=text):
            switch.add_port("odd", f"{kind}:twice0")


def test_without_the_right_nothing_is_attached_to(start, bench, namespace, far):
    bench.cable("right0", far)
    switch = start(prefix=without("net_raw"))
    text = "cannot attach to interface right0: EPERM: we have no CAP_NET_RAW"
    assert_refused(switch, "right0", f"{text} (run as root, or grant the capability)")
    assert namespace.link("right0")["promiscuity"] == 0


def test_that_right_is_enough(start, make_bench, far):
    bench = make_bench(start(prefix=without("net_admin")))
    bench.cable("right1", far)
    bench.uplink("eth", "right1")
    assert_passes_both_ways(bench.guest("vm"), bench.wire("right1", far))


def test_an_interface_that_cannot_be_used_any_more_says_so(
    bench, plugged, switch, namespace, far
):
    """And is used again as soon as it can be."""
    guest, _ = plugged("odd4")
    bench.interface("odd5", "link add name odd5 type bridge")
    namespace.ip("link delete odd4")
    text = f"add odd4 type veth peer name odd4 netns {far.pid}"
    namespace.run(
        "sh", "-c", f"printf 'link {text}\nlink set odd4 master odd5' | ip -b -"
    )
    namespace.ip("link set odd4 up")
    far.ip("link set odd4 up")
    switch.wait_for_port("odd4", lambda port: "belongs to odd5" in port["reason"])
    namespace.ip("link set odd4 nomaster")
    switch.wait_for_state("odd4", "up")
    assert_passes_both_ways(guest, bench.wire("odd4", far))


# --- its addresses ---


def test_addresses_are_warned_of_and_the_commands_move_them(
    bench, switch, namespace, far
):
    bench.cable("addr0", far)
    namespace.ip("address add 10.78.0.254/24 dev addr0")
    namespace.ip("address add 10.79.0.254/24 dev addr0")
    far.ip("address add 10.78.0.1/24 dev addr0")
    said = vswitch(switch, namespace, "add-port", "eth:addr0")
    moves = "; ".join(
        f"ip address del {address} dev addr0 && ip address add {address} dev addr0-host"
        for address in ("10.78.0.254/24", "10.79.0.254/24")
    )
    assert said == (
        "warning: interface addr0 has 10.78.0.254/24, 10.79.0.254/24, where guests"
        " cannot reach this machine (move to a tap port: vswitch add-port"
        f" tap:addr0-host; {moves})\n"
    )
    assert "port addr0: interface addr0 has 10.78.0.254/24" in switch.log
    commands = re.search(r"tap port: (.*)\)", said)[1].split("; ")
    for command in commands:
        for part in command.split(" && "):
            program, *arguments = shlex.split(part)
            if program == "vswitch":
                vswitch(switch, namespace, *arguments)
            else:
                namespace.run(program, *arguments)
    here = bench.socket(socket.AF_INET, socket.SOCK_DGRAM)
    here.bind(("10.78.0.254", 5001))
    there = bench.socket(socket.AF_INET, socket.SOCK_DGRAM, namespace=far)
    there.sendto(b"hello", ("10.78.0.254", 5001))
    data, sender = here.recvfrom(100)
    here.sendto(data, sender)
    assert there.recv(100) == b"hello"
    assert switch.counters("addr0-host")["tx_frames"] > 0
    for name in ("addr0", "addr0-host"):
        switch.ask("del_port", name=name)


# --- frames ---


def test_frames_in_many_pieces_pass_unharmed(plugged):
    guest, wire = plugged("piece0", shape=PIECES)
    assert_every_length_passes(guest, wire, range(14, 1515, 7))


def test_what_this_machine_sends_by_the_interface_is_not_seen(
    bench, plugged, switch, namespace
):
    guest, wire = plugged("own0")
    own = bench.wire("own0", namespace)
    for one in numbered(b"\xff" * 6, WIRE_MAC, 10):
        own.send(one)
    assert len(wire.receive(10)) == 10
    assert_passes_both_ways(guest, wire)
    assert switch.counters("own0")["rx_frames"] == 1


def test_tags_pass_though_the_kernel_takes_them_out(bench, plugged, switch, far):
    guest, _ = plugged("vlan0")
    trunk = bench.trunk("vlan0", far)
    tags = {
        "priority": (0x8100, 0xE000),
        "vlan": (0x8100, 0xA123),
        "service": (0x88A8, 0x0FFE),
    }
    for length in (16, 60, 1506):  # the kernel wants two bytes behind a tag
        plain = frame(WIRE_MAC, GUEST_MAC, length)
        for tpid, tci in tags.values():
            put_in = tpid.to_bytes(2, "big") + tci.to_bytes(2, "big")
            # Twice: within a service tag is another one.
            for inner in (plain, plain[:12] + TAG + plain[12:]):
                guest.send_all(inner[:12] + put_in + inner[12:])
                assert trunk.receive()[1:] == (inner, (tpid, tci))
                back = GUEST_MAC + WIRE_MAC + put_in + inner[12:]
                trunk.send(back)
                assert guest.receive(timeout=10) == [back]
    assert switch.counters("vlan0")["tx_drop_too_long"] == 0


def test_a_tag_is_in_addition_to_the_mtu(bench, plugged, switch, far):
    guest, _ = plugged("vlan1")
    trunk = bench.trunk("vlan1", far)
    longest = frame(WIRE_MAC, GUEST_MAC, 1514)
    guest.send_all(longest[:12] + TAG + longest[12:])
    assert trunk.receive()[1:] == (longest, (0x8100, 0xA123))
    guest.send_all(longest[:12] + TAG + longest[12:] + b"!")
    wait_for(lambda: switch.counters("vlan1")["tx_drop_too_long"] == 1, "a drop")


def test_a_super_frame_whose_checksum_is_whole_is_cut_as_any(
    bench, plugged, switch, far
):
    """As a driver makes it that puts together what comes."""
    guest, _ = plugged("lro0")
    trunk = bench.trunk("lro0", far)
    head = Ether(dst=GUEST_MAC, src=WIRE_MAC) / IP(src="10.78.0.1", dst="10.78.0.2")
    data = os.urandom(10_000)
    whole = bytes(head / TCP(sport=1, dport=2, flags="A") / data)
    trunk.send(whole, struct.pack("<BBHHHH", 0, TCPV4, 0, 1000, 0, 0))
    came = [Ether(one) for one in guest.receive(timeout=10, at_least=10)]
    assert b"".join(one[TCP].load for one in came) == data
    for one in came:
        wanted = Ether(bytes(one))
        del wanted[IP].chksum, wanted[TCP].chksum
        assert bytes(wanted) == bytes(one)
    assert switch.counters("vm")["tx_gso_segments"] == 10


def test_what_finds_the_ring_full_is_counted(plugged, switch):
    guest, wire = plugged("full0")
    assert_passes_both_ways(guest, wire)
    worker = wait_for_sleep(switch)
    with stopped(switch.pid, worker["pid"]):
        for one in numbered(GUEST_MAC, WIRE_MAC, SLOTS + 100):
            wire.send(one)
    arrived = guest.receive(timeout=10, at_least=SLOTS, max_frames=1000)
    assert arrived == numbered(GUEST_MAC, WIRE_MAC, SLOTS)
    wait_for(lambda: switch.counters("full0")["rx_missed"] == 100, "what is missing")
    assert_passes_both_ways(guest, wire)


# --- several workers ---


def owners(switch):
    """The workers that poll the first port's pairs."""
    rings = shared.attach(switch.run_dir).rings[:RINGS_PER_PORT][RX::2]
    return rings["owner"][rings["state"] == RING_RUNNING].tolist()


def test_flows_are_spread_over_workers_and_stay_in_order(two_workers, make_bench, far):
    bench = make_bench(two_workers)
    bench.cable("fan0", far)
    bench.uplink("eth", "fan0")
    assert two_workers.port("fan0")["queues"] == {"enabled": 2, "max": 2}
    assert owners(two_workers) == [0, 1]
    guest, wire = bench.guest("vm"), bench.wire("fan0", far)
    trunk = bench.trunk("fan0", far)
    assert_passes_both_ways(guest, wire)
    before = worker_frames(two_workers)
    trunk.receive()
    sent = list(flows(GUEST_MAC, WIRE_MAC, 16, 25))
    for one in sent:
        trunk.send(one)
    assert by_flow(guest.receive(timeout=10, at_least=400)) == by_flow(sent)
    assert by_flow(sent) == {flow: [*range(25)] for flow in range(16)}
    grown = {n: count - before[n] for n, count in worker_frames(two_workers).items()}
    assert min(grown.values()) > 0
    sent = list(flows(WIRE_MAC, GUEST_MAC, 16, 25))
    guest.send_all(sent)
    came = [trunk.receive()[1] for _ in sent]
    assert by_flow(came) == by_flow(sent)
    counted = two_workers.counters("fan0")
    assert (counted["rx_frames"], counted["tx_frames"]) == (401, 401)


def test_it_has_no_more_sockets_than_it_may(two_workers, make_bench, far):
    bench = make_bench(two_workers)
    bench.cable("few0", far)
    bench.uplink("eth", "few0", queues=1)
    assert two_workers.port("few0")["queues"] == {"enabled": 1, "max": 1}
    assert_passes_both_ways(bench.guest("vm"), bench.wire("few0", far))


def test_flows_stay_spread_while_an_interface_goes_down_and_up(
    two_workers, make_bench, namespace, far
):
    bench = make_bench(two_workers)
    bench.cable("fan1", far)
    bench.uplink("eth", "fan1")
    guest, wire = bench.guest("vm"), bench.wire("fan1", far)
    for _ in range(2):
        assert_passes_both_ways(guest, wire)
        for state in ("down", "up"):
            namespace.ip(f"link set fan1 {state}")
            two_workers.wait_for_state("fan1", state)
    assert two_workers.port("fan1")["queues"] == {"enabled": 2, "max": 2}
    own = bench.wire("fan1", namespace)
    own.send(frame(b"\xff" * 6, WIRE_MAC))
    wire.receive(1)
    assert_passes_both_ways(guest, wire)
    assert guest.receive(timeout=0, at_least=0) == []


def test_either_worker_may_die(two_workers, make_bench, far):
    bench = make_bench(two_workers)
    bench.cable("fan2", far)
    bench.uplink("eth", "fan2")
    guest, trunk = bench.guest("vm"), bench.trunk("fan2", far)
    assert_passes_both_ways(guest, bench.wire("fan2", far))
    trunk.receive()
    for _ in range(2):
        two_workers.wait_for_workers(2, 1)
        pid = two_workers.workers("active")[0]["pid"]
        os.kill(pid, signal.SIGKILL)
        two_workers.wait_for(
            lambda pid=pid: pid not in two_workers.worker_pids(), "end"
        )
        for ends, send, receive in (
            ((GUEST_MAC, WIRE_MAC), trunk.send, lambda: guest.receive(timeout=10)[0]),
            ((WIRE_MAC, GUEST_MAC), guest.send_all, lambda: trunk.receive()[1]),
        ):
            for one in flows(*ends, 8, 1):
                send(one)
                assert receive() == one


# --- kernels that know less ---


def test_a_kernel_that_knows_fewer_options_is_asked_for_less(bench, namespace, far):
    bench.cable("old0", far)
    with namespace.inside(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        assert not packet_socket.take_headers(sock, option=1000)
        packet_socket.ignore_outgoing(sock, option=1000)
        sock.bind(("old0", 3))
        sock.settimeout(10)
        sock.send(bytes(10) + frame(WIRE_MAC, GUEST_MAC))
        came = frame(GUEST_MAC, WIRE_MAC)
        bench.wire("old0", far).send(came)
        assert sock.recv(100) == bytes(10) + came


class FewHost:
    """A switch of two workers, as a port sees it, without any."""

    active = (0, 1)

    def __init__(self):
        self.ports, self.rings = np.zeros(1, PORT), np.zeros(RINGS_PER_PORT, RING)

    async def map(self, fd, length, offset, _alignment):
        return Mapping(1 << 40, length, offset, fd)

    async def unmap(self, mappings):
        pass

    async def sync(self):
        pass


def open_files():
    gc.collect()  # what earlier tests left to it
    return sorted(Path("/proc/self/fd").iterdir())


def test_a_kernel_that_spreads_no_flows_while_down_does_once_up(
    bench, namespace, far, monkeypatch
):
    """As before Linux 6.13."""
    bench.cable("old1", far)
    namespace.ip("link set old1 down")
    begin = packet_socket.begin_fanout
    monkeypatch.setattr(packet_socket, "begin_fanout", lambda _: 0)
    before = open_files()
    host = FewHost()

    async def go_through():
        port = EthPort(host, 0, "old1", "old1", 8)
        await port.open()
        assert port.queues() == {"enabled": 1, "max": 2}
        assert "is down" in port.state().reason
        monkeypatch.setattr(packet_socket, "begin_fanout", begin)
        namespace.ip("link set old1 up")
        async with asyncio.timeout(20):
            while port.queues() != {"enabled": 2, "max": 2}:
                await asyncio.sleep(0.01)
        assert port.state().word == "up"
        assert host.ports[0]["pairs"] == 2
        assert host.rings["owner"][host.rings["kick_fd"] > 0].tolist() == [0, 0, 1, 1]
        await port.close()

    with namespace.inside():
        asyncio.run(go_through())
    assert namespace.link("old1")["promiscuity"] == 0
    assert open_files() == before
