"""A guest with several receive queues: each flow stays in one, flows spread over all."""

from itertools import chain

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw

from tests.datapath.bench import A, B
from tests.datapath.rings import GPA, NEXT, WRITE, Side, mac

PAIRS = 4
BUFFERS = 64
ROOM = 512
ETHER = Ether(dst=mac(B), src=mac(A))
V4, V6 = IP(src="10.0.0.1", dst="10.0.0.2"), IPv6(src="fd00::1", dst="fd00::2")
OPTIONS = IP(src="10.0.0.1", dst="10.0.0.2", options=[b"\x01"] * 8)


def tcp(n):
    return TCP(sport=1000 + n, dport=80)


FLOWS = {
    "tcp over ipv4": lambda n: ETHER / V4 / tcp(n),
    "udp over ipv4": lambda n: ETHER / V4 / UDP(sport=53, dport=1000 + n),
    "tcp over ipv6": lambda n: ETHER / V6 / tcp(n),
    "tagged": lambda n: ETHER / Dot1Q(vlan=7) / V4 / tcp(n),
    "tagged twice": lambda n: ETHER / Dot1Q(vlan=7) / Dot1Q(vlan=8) / V6 / tcp(n),
    "options": lambda n: ETHER / OPTIONS / tcp(n),
    "hosts": lambda n: ETHER / IP(src=f"10.0.1.{n}", dst="10.0.0.2") / ICMP(),
    "ipv6 hosts": lambda n: ETHER / IPv6(src=f"fd00::1:{n:x}", dst="fd00::2") / "x",
    "stations": lambda n: Ether(dst=mac(B), src=mac(n + 16), type=0x88B5) / Raw("x"),
}


class Receiver:
    """A guest on port B with PAIRS receive queues of BUFFERS buffers."""

    def __init__(self, bench):
        self.guest = bench.guest(B, size=256)
        extra = [Side(self.guest, 2 * pair, 0x4000 * pair) for pair in range(1, PAIRS)]
        self.queues = [self.guest.rx, *extra]
        bench.plane.shared.ports[B]["pairs"] = PAIRS
        for at, queue in enumerate(self.queues):
            for head in range(BUFFERS):
                queue.describe(head, GPA + self.buffer(at, head), ROOM, WRITE)
            queue.offer(*range(BUFFERS))

    @staticmethod
    def buffer(at, head):
        return 0x40000 + ROOM * (BUFFERS * at + head)

    def received(self):
        """The frames that came since the last time, by queue."""
        return [
            [self.guest.read(self.buffer(at, head) + 12, n - 12) for head, n in back]
            for at, back in enumerate(queue.reap() for queue in self.queues)
        ]


@pytest.fixture
def receiver(bench):
    it = Receiver(bench)
    it.guest.send(mac(A) + mac(B) + b"\x88\xb5" + bytes(46))  # its address is known now
    bench.turn()
    return it


@pytest.fixture
def sender(bench):
    return bench.guest(A, size=64)


def send(bench, sender, frames):
    """All in one burst."""
    for i, data in enumerate(frames):
        sender.send(data, i, 0x20000 + ROOM * i)
    assert bench.turn() == len(frames)


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)
def test_flows_spread_and_each_keeps_its_order(bench, receiver, sender, flow):
    flows = [bytes(flow(n)) for n in range(16)]
    frames = [data + bytes([turn] * 8) for turn in range(3) for data in flows]
    send(bench, sender, frames)
    queues = receiver.received()
    assert sorted(chain(*queues)) == sorted(frames)
    assert all(queues)
    for data in flows:
        turns = [data + bytes([turn] * 8) for turn in range(3)]
        assert turns in [[f for f in q if f[: len(data)] == data] for q in queues]
    assert bench.tally(B)["tx_frames"] == len(frames)


def test_pieces_of_a_datagram_stay_together(bench, receiver, sender):
    whole = [
        bytes(ETHER / IP(src="10.0.0.1", dst="10.0.0.2", frag=n) / Raw(bytes(40)))
        for n in (1, 2)
    ]
    first = bytes(
        ETHER / IP(src="10.0.0.1", dst="10.0.0.2", flags="MF") / UDP(sport=7) / "x"
    )
    send(bench, sender, [first, *whole])
    assert [first, *whole] in receiver.received()


def test_a_frame_in_pieces_goes_where_its_flow_goes(bench, receiver, sender):
    frames = [bytes(FLOWS["tagged twice"](n)) for n in range(8)]
    send(bench, sender, frames)
    before = receiver.received()
    for i, data in enumerate(frames):
        at, tx = 0x20000 + ROOM * i, sender.tx
        sender.write(at, bytes(12) + data)
        cut = 12 + 5 * (i + 1)  # through the addresses, the tags, the header
        tx.describe(2 * i, GPA + at, cut, NEXT, 2 * i + 1)
        tx.describe(2 * i + 1, GPA + at + cut, 12 + len(data) - cut)
        tx.offer(2 * i)
    assert bench.turn() == len(frames)
    assert receiver.received() == before


@pytest.mark.parametrize("length", [14, 17, 18, 22, 33, 34, 37])
def test_a_frame_that_ends_within_its_headers_is_delivered(
    bench, receiver, sender, length
):
    data = bytes(FLOWS["tagged"](1))[:length]
    send(bench, sender, [data])
    assert list(chain(*receiver.received())) == [data]


def test_with_one_queue_everything_goes_there(bench, receiver, sender):
    bench.plane.shared.ports[B]["pairs"] = 1
    frames = [bytes(FLOWS["tcp over ipv4"](n)) for n in range(8)]
    send(bench, sender, frames)
    assert receiver.received() == [frames, [], [], []]


def test_a_queue_without_buffers_drops_what_is_its_own(bench, receiver, sender):
    flows = [bytes(FLOWS["hosts"](n)) for n in range(32)]
    send(bench, sender, flows)
    before = receiver.received()
    starved = receiver.queues[1]
    starved.record["next_avail"] = starved.offered  # as if all were taken
    send(bench, sender, flows)
    after = receiver.received()
    assert after == [before[0], [], before[2], before[3]]
    assert bench.drops(B) == {"tx_drop_ring_full": len(before[1])}
