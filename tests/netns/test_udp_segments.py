"""UDP super-frames of a real kernel (UDP_SEGMENT), out of one tap and into another port."""

import os
import socket

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from ports import tap_device
from tests import requirements
from tests.netns.uplink import GUEST_MAC, TAP, VNET_HDR, hold

pytestmark = pytest.mark.netns

UDP_SEGMENT = 103  # linux/udp.h
SIZE = 1400
DATA = os.urandom(40 * SIZE + 7)  # one send, one super-frame
PARTS = [DATA[at : at + SIZE] for at in range(0, len(DATA), SIZE)]


@pytest.fixture(autouse=True)
def kernel():
    requirements.require_linux(6, 2, "UDP segments of taps")
    requirements.require_command("ethtool", "ethtool")


def send_in_segments(sock, address):
    sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, SIZE)
    assert sock.sendto(DATA, address) == len(DATA)


def test_a_udp_super_frame_passes_from_tap_to_tap(
    bench, switch, namespace, other_namespace
):
    for name in ("uso1", "uso2"):
        bench.interface(name, f"tuntap add {name} mode tap")
        bench.tap(name)
        assert {"host_uso", "guest_uso4"} <= {*switch.port(name)["features"]}
    namespace.ip(f"link set uso2 netns {other_namespace.pid}")
    namespace.ip("address add 10.79.0.1/24 dev uso1")
    other_namespace.ip("address add 10.79.0.2/24 dev uso2")
    other_namespace.ip("link set uso2 up")
    receiver = bench.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("10.79.0.1", 5001))
    sender = bench.socket(socket.AF_INET, socket.SOCK_DGRAM, namespace=other_namespace)
    send_in_segments(sender, ("10.79.0.1", 5001))
    assert [receiver.recv(1 << 16) for _ in PARTS] == PARTS
    # One frame with all of them, and what it takes to find each other.
    assert switch.counters("uso2")["rx_bytes"] > len(DATA)
    assert switch.counters("uso2")["rx_frames"] < len(PARTS) / 2
    assert switch.counters("uso1")["tx_gso_split"] == 0


def test_a_guest_that_cannot_gets_segments(bench, switch, namespace):
    bench.tap("uso3")
    namespace.ip("address add 10.78.0.254/24 dev uso3")
    mac = GUEST_MAC.hex(":")
    namespace.ip(f"neighbour add 10.78.0.1 lladdr {mac} nud permanent dev uso3")
    guest = bench.guest("vm")
    send_in_segments(bench.socket(socket.AF_INET, socket.SOCK_DGRAM), ("10.78.0.1", 9))
    received = [Ether(data) for data in guest.receive(timeout=10, at_least=len(PARTS))]
    assert [frame[UDP].load for frame in received] == PARTS
    first = received[0][IP].id
    for number, frame in enumerate(received):
        assert frame[IP].id == (first + number) % 65536
        wanted = Ether(bytes(frame))
        del wanted[IP].chksum, wanted[UDP].chksum
        assert bytes(wanted) == bytes(frame)
    assert switch.counters("vm")["tx_gso_split"] == 1
    assert switch.counters("vm")["tx_gso_segments"] == len(PARTS)


def test_a_kernel_that_knows_less_is_asked_for_less(namespace):
    """As Linux before 6.2 does with UDP segments: it refuses all that are asked for."""
    with hold(namespace, "old0", TAP | VNET_HDR) as file:
        assert not tap_device.take_offloads(file.fileno(), more=1 << 15)
        taken = namespace.run("ethtool", "--show-features", "old0")
        assert "tcp-segmentation-offload: on" in taken
        assert "tx-udp-segmentation: off" in taken
        assert tap_device.take_offloads(file.fileno())
        taken = namespace.run("ethtool", "--show-features", "old0")
        assert "tx-udp-segmentation: on" in taken
