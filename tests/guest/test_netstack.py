import hashlib
import queue

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.l2 import ARP, Ether

from vswitch.guest import GuestError
from vswitch.guest.netstack import NetStack, checksum


class Plug:
    """What a stack needs of a guest, on a cable of two queues that can lose frames."""

    def __init__(self, number):
        self.mac = bytes((0x52, 0x54, 0, 0, 0, number))
        self.arriving, self.other, self.sent = queue.Queue(), None, 0
        self.losing = 0  # every so many frames; 0: none

    def send_all(self, frame):
        self.sent += 1
        if self.other and not (self.losing and self.sent % self.losing == 0):
            self.other.arriving.put(frame)

    def receive(self, timeout):
        try:
            return [self.arriving.get(timeout=timeout)]
        except queue.Empty:
            return []


@pytest.fixture
def plugs():
    a, b = Plug(1), Plug(2)
    a.other, b.other = b, a
    return a, b


@pytest.fixture
def stacks(plugs):
    with NetStack(plugs[0], "10.0.0.1") as a, NetStack(plugs[1], "10.0.0.2") as b:
        yield a, b


def test_a_ping_is_answered(stacks):
    times = stacks[0].ping("10.0.0.2", 3, timeout=10)
    assert all(time is not None and time > 0 for time in times)


def test_nobody_there_is_said(stacks):
    with pytest.raises(GuestError, match=r"nobody says they are 10\.0\.0\.9"):
        stacks[0].ping("10.0.0.9", timeout=0.01)


@pytest.mark.parametrize("size", [0, 1, 1400, 1401, 300_000])
def test_a_transfer_arrives_whole(stacks, size):
    data = bytes(i * 31 % 251 for i in range(size))
    digest = stacks[0].transfer("10.0.0.2", data)
    assert digest == hashlib.sha256(data).hexdigest()
    assert stacks[1].received == [data]


def test_a_transfer_survives_losses(stacks, plugs):
    plugs[0].losing, plugs[1].losing = 50, 7
    data = bytes(200_000)
    assert stacks[0].transfer("10.0.0.2", data) == hashlib.sha256(data).hexdigest()


def test_another_stack_understands_arp_and_icmp(plugs):
    plug, peer = plugs
    with NetStack(plug, "10.0.0.1"):
        ask = Ether(src=peer.mac, dst="ff:ff:ff:ff:ff:ff") / ARP(
            op=1, hwsrc=peer.mac, psrc="10.0.0.2", pdst="10.0.0.1"
        )
        peer.send_all(bytes(ask))
        answer = Ether(peer.arriving.get(timeout=10))
        assert (answer[ARP].op, answer[ARP].psrc) == (2, "10.0.0.1")
        echo = (
            Ether(src=peer.mac, dst=answer.src)
            / IP(src="10.0.0.2", dst="10.0.0.1")
            / ICMP(id=7, seq=9)
            / b"payload"
        )
        peer.send_all(bytes(echo))
        reply = Ether(peer.arriving.get(timeout=10))
        assert (reply[ICMP].type, reply[ICMP].id, reply[ICMP].seq) == (0, 7, 9)
        assert bytes(reply[ICMP].payload)[:7] == b"payload"


def test_the_checksum_of_rfc_1071():
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D
    assert checksum(b"\x01") == 0xFEFF
