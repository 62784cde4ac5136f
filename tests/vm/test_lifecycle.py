"""How network devices, guests and QEMU itself come and go, with traffic after each."""

import re
import sys
from datetime import datetime

import pytest

from tests.vm.checks import assert_moves_a_file, assert_pings
from vswitch.demo.qemu import kernel_arguments

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


def assert_both_ways(one, two):
    assert_pings(one, two.machine.address.split("/")[0])
    assert_pings(two, one.machine.address.split("/")[0])


@pytest.mark.parametrize("server", [False, True], ids=["connects", "listens"])
def test_a_network_device_is_taken_out_and_put_in_while_its_guest_runs(lab, server):
    (one,) = lab.boot(lab.machine(1))
    (two,) = lab.boot(lab.machine(2, server=server, halted=True), wait=False)
    lab.wait_for_state("vm2", "waiting-for-driver")
    two.resume()
    two.wait_ready()
    assert_both_ways(one, two)

    two.unplug_device()
    lab.wait_for_state("vm2", "waiting-for-driver")
    lab.plug(two)  # on the same connection
    assert_both_ways(one, two)

    two.unplug_device()
    two.unplug_backend()
    lab.wait_for_state("vm2", "waiting-for-frontend")
    two.plug_backend()
    lab.plug(two)
    assert_both_ways(one, two)
    assert_moves_a_file(one, two)
    assert_moves_a_file(two, one)
    lab.assert_ledger_balances()


def test_the_host_chooses_the_mtu(lab):
    machines = [lab.machine(number, device="host_mtu=9000") for number in (1, 2)]
    one, two = lab.boot(*machines)
    for guest in (one, two):
        assert guest.check("cat /sys/class/net/eth0/mtu") == "9000"
    assert_pings(one, "10.77.0.2", size=8972)
    assert_pings(two, "10.77.0.1", size=8972)

    two.unplug_device()
    lab.plug(two, "host_mtu=1500")
    assert two.check("cat /sys/class/net/eth0/mtu") == "1500"
    assert_pings(one, "10.77.0.2", size=1472)
    before = lab.counters("vm2")["tx_drop_too_long"]
    one.check("ping -c 1 -W 1 -s 1500 10.77.0.2; true")
    assert lab.counters("vm2")["tx_drop_too_long"] == before + 1
    one.check("ip link set eth0 mtu 1500")
    assert_moves_a_file(one, two)  # in frames of 64 KiB that are cut later
    assert_moves_a_file(two, one)
    lab.assert_ledger_balances()


LINE = re.compile(r"(\S+ \S+),(\d+) \S+ port vm2: connected")


def connected_at(lab):
    """When the log says that a front-end was connected to last, seconds."""
    date, milliseconds = LINE.findall(lab.log)[-1]
    return datetime.fromisoformat(date).timestamp() + int(milliseconds) / 1000


def test_a_port_that_connects_finds_each_new_qemu_at_once(lab):
    one, two = lab.boot(lab.machine(1), lab.machine(2, server=True))
    for _ in range(2):
        two.kill()
        lab.wait_for_state("vm2", "waiting-for-frontend")
        (two,) = lab.boot(two.machine)
        assert_both_ways(one, two)
        appeared = two.machine.socket_path.stat().st_ctime
        waited = connected_at(lab) - appeared
        assert waited < 1.0  # 20 ms on a machine that has nothing else to do
    lab.assert_ledger_balances()


# iPXE waits 16 s for a router unless one answers.
ROUTER = """
import socket
with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
    index = socket.if_nametoindex("uplink0")
    group = socket.inet_pton(socket.AF_INET6, "ff02::2") + index.to_bytes(4, "little")
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
    print("ready", flush=True)
    while True:
        if sock.recv(2048)[0] == 133:  # a solicitation; RFC 4861
            advertisement = bytes((134, 0, 0, 0, 64)) + bytes(11)
            sock.sendto(advertisement, ("ff02::1", 0, 0, index))
"""
FILES = (sys.executable, "-u", "-m", "http.server", "8000", "--directory")
SCRIPT = """\
#!ipxe
kernel vmlinuz initrd=initramfs {arguments}
initrd initramfs
boot
"""
DHCP = """\
start 10.77.0.1
end 10.77.0.1
static_lease {mac} 10.77.0.1
interface eth0
lease_file /tmp/leases
boot_file http://10.77.0.254:8000/script
"""


def test_ipxe_boots_linux_over_the_switch(uplink_lab, namespace, guest_image):
    """Firmware's driver first, then Linux's, on one connection.

    A guest tells by DHCP what to boot, the host behind a tap serves it.
    """
    lab = uplink_lab
    lab.add_port("uplink0", "tap:uplink0")
    namespace.run("ip", "address", "add", "10.77.0.254/24", "dev", "uplink0")
    (two,) = lab.boot(lab.machine(2))
    machine = lab.machine(1, from_network=True)
    lines = "\\n".join(DHCP.format(mac=machine.mac).splitlines())
    two.check(f"echo -e '{lines}' > /tmp/conf && touch /tmp/leases && udhcpd /tmp/conf")
    folder = lab.directory / "boot"
    folder.mkdir()
    (folder / "vmlinuz").symlink_to(guest_image.kernel)
    (folder / "initramfs").symlink_to(guest_image.initramfs)
    script = SCRIPT.format(arguments=kernel_arguments(machine))
    (folder / "script").write_text(script)
    with (
        namespace.start(sys.executable, "-c", ROUTER) as router,
        namespace.start(*FILES, folder) as files,
    ):
        router.stdout.readline()
        files.stdout.readline()
        (one,) = lab.boot(machine, wait=False)
        lab.wait_for_state("vm1", "up")
        assert lab.port("vm1")["features"] == ["protocol_features", "version_1"]
        one.wait_ready()
    assert "mrg_rxbuf" in lab.port("vm1")["features"]
    assert lab.log.count("port vm1: connected") == 1
    assert_both_ways(one, two)
    assert_moves_a_file(one, two)
    lab.assert_ledger_balances()
