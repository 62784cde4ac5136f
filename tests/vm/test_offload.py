"""Linux's own segmentation and checksums, with every mix of who can and who cannot.

Four guests that stay: two are offered all offloads and two none, of each two one with
packed rings; and the host behind a tap, whose kernel cuts UDP as well.
"""

import base64
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.netns.namespace import Namespace
from tests.vm import transfer
from tests.vm.lab import Lab

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

SUPER_FRAME = 3_000  # bytes a frame on average; an ordinary one has 1518 at most
ABLE, UNABLE = ("vm1", "vm2"), ("vm3", "vm4")
HOST = "uplink0"
NUMBERS = {"vm1": 1, "vm2": 2, "vm3": 3, "vm4": 4, HOST: 254}
VLAN = 7
# The last two are in a VLAN, and for guests only: not every host's kernel has VLANs.
WAYS = ("10.77.0.{}", "fd77::{}", "10.78.0.{}", "fd78::{}")

SOURCE = Path(transfer.__file__)
TRANSFER = "python3 -I -S /tmp/transfer.py"
ERRORS = "cat /proc/net/snmp /proc/net/snmp6 /sys/class/net/*/statistics/rx_*errors"


def prepare_guest(guest):
    number, vlan = NUMBERS[guest.machine.name], f"eth0.{VLAN}"
    for interface in ("all", "default", "eth0"):  # nobody else has their addresses
        guest.check(f"echo 0 > /proc/sys/net/ipv6/conf/{interface}/accept_dad")
    for command in (
        f"link add link eth0 name {vlan} type vlan id {VLAN}",
        f"link set {vlan} up",
        f"address add fd77::{number}/64 dev eth0",
        f"address add 10.78.0.{number}/24 dev {vlan}",
        f"address add fd78::{number}/64 dev {vlan}",
    ):
        guest.check(f"ip {command}")
    program = base64.b64encode(SOURCE.read_bytes()).decode()
    guest.check(f"echo {program} | base64 -d > /tmp/transfer.py")
    guest.check(f"{TRANSFER} serve > /tmp/served 2>&1 &")


def prepare_host(namespace):
    namespace.ip(f"address add 10.77.0.{NUMBERS[HOST]}/24 dev {HOST}")
    namespace.ip(f"address add fd77::{NUMBERS[HOST]}/64 dev {HOST} nodad")


def boot(lab, *machines):
    """Guests by their names, each of which serves."""
    guests = lab.boot(*machines)
    for guest in guests:
        prepare_guest(guest)
    for guest in guests:
        lab.wait_for(
            lambda guest=guest: guest.check("cat /tmp/served") == "ready",
            lambda guest=guest: guest.check("cat /tmp/served"),
        )
    return {guest.machine.name: guest for guest in guests}


@pytest.fixture(scope="module")
def net(tools_image):
    with ExitStack() as owned:
        directory = owned.enter_context(tempfile.TemporaryDirectory(prefix="vsw-"))
        namespace = owned.enter_context(Namespace())
        lab = owned.enter_context(
            Lab(Path(directory), tools_image, prefix=namespace.prefix)
        )
        lab.add_port(HOST, f"tap:{HOST}")
        prepare_host(namespace)
        server = owned.enter_context(
            namespace.start(sys.executable, str(SOURCE), "serve")
        )
        assert server.stdout.readline() == "ready\n"
        guests = boot(
            lab,
            lab.machine(1),
            lab.machine(2, packed=True),
            lab.machine(3, offloads=False),
            lab.machine(4, offloads=False, packed=True),
        )
        yield SimpleNamespace(lab=lab, namespace=namespace, guests=guests)


def addresses_of(source, target):
    ways = WAYS[:2] if HOST in {source, target} else WAYS
    return [way.format(NUMBERS[target]) for way in ways]


def send(net, source, addresses):
    """All transfers to these addresses; the lines that the sender prints."""
    if source == HOST:
        return net.namespace.run(sys.executable, str(SOURCE), "send", *addresses)
    command = f"{TRANSFER} send {' '.join(addresses)}"
    return net.guests[source].check(command, timeout=60)


def assert_same(said, addresses):
    """What came is what was sent, to each address by each protocol."""
    lines = [line.split() for line in said.splitlines()]
    wanted = [(how, address) for address in addresses for how in ("tcp", "udp")]
    assert [(how, address) for how, address, _, _ in lines] == wanted
    for _, _, sent, came in lines:
        assert sent == came, said


def errors_of(net, name):
    """What a network stack has against the frames that it got: lines that count some."""
    if name == HOST:
        said = net.namespace.run("sh", "-c", ERRORS)
    else:
        said = net.guests[name].check(ERRORS)
    found = {}
    heads = {}
    for line in said.splitlines():
        name, *values = line.split()
        if name in heads:
            found |= {
                f"{name}{key}": int(value)
                for key, value in zip(heads[name], values, strict=True)
                if key == "InCsumErrors"
            }
        elif name.endswith(":"):
            heads[name] = values
        elif "InCsumErrors" in name:
            found[name] = int(values[0])
        elif not values:
            found[f"interfaces {len(found)}"] = int(name)
    assert len(found) > 10, said
    return {name: count for name, count in found.items() if count}


def assert_arrives(net, source, target):
    """What arrives is what was sent; how the ports' counters have grown."""
    before = {name: net.lab.counters(name) for name in (source, target)}
    addresses = addresses_of(source, target)
    assert_same(send(net, source, addresses), addresses)
    assert errors_of(net, target) == {}
    net.lab.assert_ledger_balances()
    grown = {}
    for name, old in before.items():
        new = net.lab.counters(name)
        grown[name] = SimpleNamespace(**{key: new[key] - old[key] for key in new})
    return grown[source], grown[target]


def is_super(sent):
    return sent.rx_bytes / sent.rx_frames > SUPER_FRAME


@pytest.mark.parametrize(("source", "target"), [ABLE, ABLE[::-1]])
def test_super_frames_pass_between_guests_that_can(net, source, target):
    sent, came = assert_arrives(net, source, target)
    assert is_super(sent)
    assert (came.tx_gso_split, came.tx_csum_completed) == (0, 0)


@pytest.mark.parametrize(
    ("source", "target"), [("vm1", "vm3"), ("vm2", "vm4"), ("vm2", "vm3")]
)
def test_a_guest_that_cannot_gets_segments_and_whole_checksums(net, source, target):
    sent, came = assert_arrives(net, source, target)
    assert is_super(sent)
    assert came.tx_gso_segments > came.tx_gso_split > 0
    assert came.tx_csum_completed > 0


@pytest.mark.parametrize(
    ("source", "target"), [("vm3", "vm1"), ("vm4", "vm2"), UNABLE, UNABLE[::-1]]
)
def test_a_guest_that_cannot_sends_whole_frames(net, source, target):
    sent, came = assert_arrives(net, source, target)
    assert not is_super(sent)
    assert (came.tx_gso_split, came.tx_csum_completed) == (0, 0)


@pytest.mark.parametrize("source", ["vm1", "vm4"])
def test_guests_send_to_the_host(net, source):
    sent, came = assert_arrives(net, source, HOST)
    assert is_super(sent) == (source in ABLE)
    assert (came.tx_gso_split, came.tx_csum_completed) == (0, 0)


@pytest.mark.parametrize("target", ["vm2", "vm3"])
def test_the_host_sends_to_guests(net, target):
    sent, came = assert_arrives(net, HOST, target)
    assert is_super(sent)
    # None of these guests takes UDP super-frames: Linux does since 6.2, and sends them.
    segments_udp = "host_uso" in net.lab.port(HOST)["features"]
    assert (came.tx_gso_split > 0) == (segments_udp or target in UNABLE)
    assert (came.tx_csum_completed > 0) == (target in UNABLE)


@pytest.mark.parametrize("target", ["vm1", "vm4"])
def test_a_host_without_offloads_sends_to_guests(net, target):
    switch = ("ethtool", "-K", HOST, "tx")
    net.namespace.run(*switch, "off")
    try:
        sent, came = assert_arrives(net, HOST, target)
    finally:
        net.namespace.run(*switch, "on")  # and with it what needs it
    assert not is_super(sent)
    assert (came.tx_gso_split, came.tx_csum_completed) == (0, 0)


def test_super_frames_in_a_vlan_cross_two_taps_and_a_bridge(tools_image, namespace):
    """What a guest puts into a VLAN passes the host's kernel as it is, both ways."""
    with ExitStack() as owned:
        namespace.ip("link add br0 type bridge")
        namespace.ip("link set br0 up")
        labs, guests = [], {}
        for number in (1, 2):
            directory = owned.enter_context(tempfile.TemporaryDirectory(prefix="vsw-"))
            lab = Lab(Path(directory), tools_image, prefix=namespace.prefix)
            labs.append(owned.enter_context(lab))
            lab.add_port("tap", f"tap:up{number}")
            namespace.ip(f"link set up{number} master br0")
            guests |= boot(lab, lab.machine(number))
        net = SimpleNamespace(guests=guests)
        addresses = [way.format(2) for way in WAYS]
        assert_same(send(net, "vm1", addresses), addresses)
        assert errors_of(net, "vm2") == {}
        assert is_super(SimpleNamespace(**labs[0].counters("vm1")))
        assert is_super(SimpleNamespace(**labs[1].counters("tap")))
        for lab, name in ((labs[0], "tap"), (labs[1], "vm2")):
            assert lab.counters(name)["tx_gso_split"] == 0
            lab.assert_ledger_balances()
