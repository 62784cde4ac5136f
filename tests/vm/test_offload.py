"""Linux's own segmentation and checksums, with every mix of who can and who cannot.

Four guests that stay: two are offered all offloads and two none, of each two one with
packed rings; and hosts, whose kernels cut UDP as well: ours behind a tap, and two behind
interfaces of ours. One of those comes by XDP, with neither super-frames nor headers.
"""

import base64
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.namespace import Namespace
from tests.netstat import ERRORS, errors_in
from tests.vm import transfer
from tests.vm.lab import Lab

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

ORDINARY = 1518  # bytes of a frame at most
SUPER_FRAME = 3_000  # bytes a frame on average
FEW = 10  # frames that connections of before still had to send
ABLE, UNABLE = ("vm1", "vm2"), ("vm3", "vm4")
HOSTS = {"tap": "uplink0", "eth": "wire0", "xdp": "wire1"}
XDP = HOSTS["xdp"]
NUMBERS = {"vm1": 1, "vm2": 2, "vm3": 3, "vm4": 4, "uplink0": 254}
NUMBERS |= {"wire0": 253, "wire1": 252}
VLAN = 7
# The last two are in a VLAN, and for guests only: not every host's kernel has VLANs.
WAYS = ("10.77.0.{}", "fd77::{}", "10.78.0.{}", "fd78::{}")

SOURCE = Path(transfer.__file__)
TRANSFER = "python3 -I -S /tmp/transfer.py"


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


def add_host(owned, lab, namespace, kind):
    """A host that serves, behind a port of some kind; the namespace that it is in."""
    name = HOSTS[kind]
    host = namespace
    if kind != "tap":
        host = owned.enter_context(Namespace())
        far_end = f"name {name} netns {host.pid}"
        namespace.ip(f"link add {name} type veth peer {far_end}")
        namespace.ip(f"link set {name} up")
        host.ip(f"link set {name} up")
    lab.add_port(name, f"{kind}:{name}")
    host.ip(f"address add 10.77.0.{NUMBERS[name]}/24 dev {name}")
    host.ip(f"address add fd77::{NUMBERS[name]}/64 dev {name} nodad")
    server = owned.enter_context(host.start(sys.executable, str(SOURCE), "serve"))
    assert server.stdout.readline() == "ready\n"
    return host


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
        hosts = {
            name: add_host(owned, lab, namespace, kind) for kind, name in HOSTS.items()
        }
        guests = boot(
            lab,
            lab.machine(1),
            lab.machine(2, packed=True),
            lab.machine(3, offloads=False),
            lab.machine(4, offloads=False, packed=True),
        )
        yield SimpleNamespace(lab=lab, namespace=namespace, hosts=hosts, guests=guests)


def addresses_of(source, target):
    ways = WAYS[:2] if {source, target} & {*HOSTS.values()} else WAYS
    return [way.format(NUMBERS[target]) for way in ways]


def send(net, source, addresses):
    """All transfers to these addresses; the lines that the sender prints."""
    if host := net.hosts.get(source):
        return host.run(sys.executable, str(SOURCE), "send", *addresses)
    command = f"{TRANSFER} send {' '.join(addresses)}"
    return net.guests[source].check(command, timeout=60)


def errors_of(net, name):
    """What a network stack has against the frames that it got: lines that count some."""
    if host := net.hosts.get(name):
        said = host.run("sh", "-c", ERRORS)
    else:
        said = net.guests[name].check(ERRORS)
    return errors_in(said)


def assert_arrives(net, source, target):
    """What arrives is what was sent; how the ports' counters have grown."""
    before = {name: net.lab.counters(name) for name in (source, target)}
    addresses = addresses_of(source, target)
    transfer.assert_same(send(net, source, addresses), addresses)
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


each_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


@each_host
@pytest.mark.parametrize("source", ["vm1", "vm4"])
def test_guests_send_to_a_host(net, source, host):
    sent, came = assert_arrives(net, source, host)
    assert is_super(sent) == (source in ABLE)
    done = host == XDP and source in ABLE
    assert (came.tx_gso_split > 0) == (came.tx_csum_completed > 0) == done


@each_host
@pytest.mark.parametrize("target", ["vm2", "vm3"])
def test_a_host_sends_to_guests(net, target, host):
    sent, came = assert_arrives(net, host, target)
    assert is_super(sent) == (host != XDP)
    assert (came.tx_csum_completed > 0) == (target in UNABLE)
    if host == XDP:
        assert came.tx_gso_split == 0
        return
    # None of these guests takes UDP super-frames: Linux does since 6.2, and sends them.
    segments_udp = "host_uso" in net.lab.port(host)["features"]
    assert (came.tx_gso_split > 0) == (segments_udp or target in UNABLE)


@each_host
@pytest.mark.parametrize("target", ["vm1", "vm4"])
def test_a_host_without_offloads_sends_to_guests(net, target, host):
    switch = ("ethtool", "-K", host, "tx")
    net.hosts[host].run(*switch, "off")
    try:
        sent, came = assert_arrives(net, host, target)
    finally:
        net.hosts[host].run(*switch, "on")  # and with it what needs it
    assert not is_super(sent)
    assert came.tx_gso_split == 0
    assert came.tx_csum_completed <= FEW


def set_mtu(net, guest, host, mtu):
    net.guests[guest].check(f"ip link set eth0 mtu {mtu}")
    net.hosts[host].ip(f"link set {host} mtu 1500")
    net.namespace.ip(f"link set {host} mtu {mtu}")
    if host == XDP:  # it has to be ready for what its peer may send then
        net.lab.wait_for(
            lambda: (
                net.lab.port(host)["state"] == "up"
                and ("fragments" in net.lab.port(host)["features"]) == (mtu > 1500)
            ),
            lambda: net.lab.port(host),
        )
    net.hosts[host].ip(f"link set {host} mtu {mtu}")


@each_host
@pytest.mark.parametrize("guest", ["vm1", "vm3"])
def test_jumbo_frames_pass_between_a_guest_and_a_host(net, guest, host):
    set_mtu(net, guest, host, 9000)
    try:
        for source, target in ((guest, host), (host, guest)):
            _, came = assert_arrives(net, source, target)
            if guest in UNABLE:
                assert came.tx_bytes / came.tx_frames > ORDINARY
    finally:
        set_mtu(net, guest, host, 1500)


def test_super_frames_in_a_vlan_cross_two_uplinks_and_a_bridge(tools_image, namespace):
    """What a guest puts into a VLAN passes the host's kernel as it is.

    By a tap on one side and an interface on the other.
    """
    with ExitStack() as owned:
        namespace.ip("link add br0 type bridge")
        namespace.ip("link set br0 up")
        namespace.ip("link add up2 type veth peer name br2")
        namespace.ip("link set up2 up")
        labs, guests = [], {}
        for number, (uplink, in_bridge) in enumerate(
            (("tap:up1", "up1"), ("eth:up2", "br2")), 1
        ):
            directory = owned.enter_context(tempfile.TemporaryDirectory(prefix="vsw-"))
            lab = Lab(Path(directory), tools_image, prefix=namespace.prefix)
            labs.append(owned.enter_context(lab))
            lab.add_port("uplink", uplink)
            namespace.ip(f"link set {in_bridge} master br0 up")
            guests |= boot(lab, lab.machine(number))
        net = SimpleNamespace(guests=guests, hosts={})
        addresses = [way.format(2) for way in WAYS]
        transfer.assert_same(send(net, "vm1", addresses), addresses)
        assert errors_of(net, "vm2") == {}
        assert is_super(SimpleNamespace(**labs[0].counters("vm1")))
        assert is_super(SimpleNamespace(**labs[1].counters("uplink")))
        for lab, name in ((labs[0], "uplink"), (labs[1], "vm2")):
            assert lab.counters(name)["tx_gso_split"] == 0
            lab.assert_ledger_balances()
