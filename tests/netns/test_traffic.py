"""Two kernels through any two kinds of uplink: TCP, UDP, IPv4, IPv6, whatever offloads.

That frames of one kind pass says nothing of others: an unfinished checksum that nobody
finishes lets pings through and stops TCP.
"""

import os
import socket
import struct
import sys
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from bench.namespace import Namespace
from tests import netstat, requirements
from tests.datapath.test_offload import super_datagram, super_frame
from tests.netns.uplink import Bench, Trunk
from tests.switch import Switch, remove_directory, short_directory
from tests.vm import transfer

pytestmark = pytest.mark.netns

KINDS = ("tap", "eth", "xdp")
PAIRS = [(a, b) for n, a in enumerate(KINDS) for b in KINDS[n:]]
# Of kinds that have headers, so that nothing has to be done to frames on their way.
WITH_HEADERS = [pair for pair in PAIRS if "xdp" not in pair]
ADDRESSES = ("10.77.0.{}", "fd77::{}")
LARGE = 60_000  # bytes of a datagram that goes in fragments
SUPER_FRAME = 3_000  # bytes a frame on average
WAYS = (("left", "right"), ("right", "left"))
HEADER = struct.Struct("<BBHHHH")  # struct virtio_net_hdr


class Ends:
    """A switch between two namespaces, `left` and `right`, which name their ports."""

    def __init__(self, owned):
        self.home, *sides = (owned.enter_context(Namespace()) for _ in range(3))
        self.sides = dict(zip(("left", "right"), sides, strict=True))
        directory = short_directory()
        owned.callback(remove_directory, directory)
        self.switch = Switch(directory, prefix=self.home.prefix)
        owned.enter_context(self.switch)
        for side in sides:
            server = side.start(sys.executable, transfer.__file__, "serve")
            assert owned.enter_context(server).stdout.readline() == "ready\n"

    def plug(self, bench, kinds):
        """Put a port of some kind at each side."""
        self.kinds = dict(zip(self.sides, kinds, strict=True))
        for number, (name, side) in enumerate(self.sides.items(), 1):
            if self.kinds[name] == "tap":
                bench.tap(name)
                self.home.ip(f"link set {name} netns {side.pid}")
                side.ip(f"link set {name} up")
            else:
                bench.cable(name, side)
                bench.uplink(self.kinds[name], name)
            for address, rest in zip(ADDRESSES, ("24", "64 nodad"), strict=True):
                side.ip(f"address add {address.format(number)}/{rest} dev {name}")

    def socket(self, name, family):
        """A socket for datagrams at one side."""
        with self.sides[name].inside():
            sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.settimeout(10)
        return sock

    def trunk(self, name):
        with self.sides[name].inside():
            return Trunk(name)

    def prepare(self, offloads, mtu):
        """What the far ends leave to others; and whether ours merges what comes."""
        gro = "on" if offloads == "merged" else "off"
        for name, side in self.sides.items():
            side.run("ethtool", "-K", name, "tx", "on" if offloads == "on" else "off")
            if self.kinds[name] != "tap":
                self.home.run("ethtool", "-K", name, "gro", gro)
                self._set_mtu(name, mtu)
            side.ip(f"link set {name} mtu {mtu}")

    def _set_mtu(self, name, mtu):
        """Of our end; an xdp port has to be ready for what its peer may send then."""
        self.sides[name].ip(f"link set {name} mtu 1500")
        self.home.ip(f"link set {name} mtu {mtu}")
        if self.kinds[name] == "xdp":
            self.switch.wait_for_port(
                name,
                lambda port: (
                    port["state"] == "up"
                    and ("fragments" in port["features"]) == (mtu > 1500)
                ),
            )


@pytest.fixture(scope="module")
def net():
    requirements.require_root()
    requirements.require_command("ethtool", "ethtool")
    with ExitStack() as owned:
        yield Ends(owned)


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def ends(request, net):
    with Bench(net.switch, net.home) as bench:
        net.plug(bench, request.param)
        yield net
        bench.check()
        for name in net.sides:
            counted = net.switch.counters(name)
            done = counted["tx_gso_split"] or counted["tx_csum_completed"]
            assert bool(done) == (net.kinds[name] == "xdp")


def sent_through(net, source, target):
    """All transfers from one side to the other; by how much the source's port grew."""
    before = net.switch.counters(source)
    number = [*net.sides].index(target) + 1
    addresses = [address.format(number) for address in ADDRESSES]
    program = (sys.executable, transfer.__file__, "send")
    said = net.sides[source].run(*program, *addresses, timeout=60)
    transfer.assert_same(said, addresses)
    after = net.switch.counters(source)
    return SimpleNamespace(**{key: after[key] - before[key] for key in after})


@pytest.mark.parametrize(
    ("offloads", "mtu"),
    [("on", 1500), ("on", 9000), ("off", 1500), ("off", 9000), ("merged", 1500)],
)
def test_what_is_sent_arrives(ends, offloads, mtu):
    ends.prepare(offloads, mtu)
    for source, target in WAYS:
        sent = sent_through(ends, source, target)
        merged = offloads == "merged" and ends.kinds[source] != "tap"
        is_super = sent.rx_bytes / sent.rx_frames > max(SUPER_FRAME, mtu)
        has_header = ends.kinds[source] != "xdp"
        assert is_super == (has_header and (offloads == "on" or merged))
        assert sent.rx_missed == 0
        errors = ends.sides[target].run("sh", "-c", netstat.ERRORS)
        assert netstat.errors_in(errors) == {}


def test_datagrams_in_fragments_arrive(ends):
    ends.prepare("on", 1500)
    for source, target in WAYS:
        for family, address in zip(
            (socket.AF_INET, socket.AF_INET6), ADDRESSES, strict=True
        ):
            with ExitStack() as owned:
                sender, receiver = (
                    owned.enter_context(ends.socket(side, family))
                    for side in (source, target)
                )
                there = address.format([*ends.sides].index(target) + 1)
                receiver.bind((there, 5003))
                for _ in range(5):
                    data = os.urandom(LARGE)
                    sender.sendto(data, (there, 5003))
                    assert receiver.recv(1 << 16) == data


# --- super-frames within a VLAN ---

NEEDS_CSUM = 1


@pytest.mark.parametrize("ends", WITH_HEADERS, indirect=True, ids="-".join)
@pytest.mark.parametrize("kind", [super_frame, super_datagram])
@pytest.mark.parametrize("version", ["v4", "v6"])
def test_a_super_frame_keeps_its_tag_and_its_header(ends, version, kind):
    """None of our kernels need have VLANs: the frames are put together here."""
    ends.prepare("on", 1500)
    data, header = kind(version)
    flags, gso_type, hdr_len, size, start, offset = HEADER.unpack_from(header)
    tag = (0x8100, 0xA005)
    tagged = data[:12] + struct.pack("!HH", *tag) + data[12:]
    moved = HEADER.pack(flags, gso_type, hdr_len + 4, size, start + 4, offset)
    for source, target in WAYS:
        with ends.trunk(source) as sender, ends.trunk(target) as receiver:
            sender.send(tagged, moved)
            came = b""
            while came[:12] != data[:12]:
                header, came, taken = receiver.receive()
        assert (came, taken) == (data, tag)
        flags, *fields = HEADER.unpack(header)
        assert flags & NEEDS_CSUM
        del fields[1]  # hdr_len is a hint
        assert fields == [gso_type, size, start, offset]
