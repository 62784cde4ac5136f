"""What a machine needs to boot from the network, all of it reached through the switch.

A guest tells by DHCP what to boot; the host behind a tap serves it.
"""

import contextlib
import sys

from vswitch.demo.qemu import kernel_arguments

# iPXE waits 16 s for a router unless one answers.
_ROUTER = """
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
_FILES = (sys.executable, "-u", "-m", "http.server", "8000", "--directory")
_SCRIPT = """\
#!ipxe
kernel vmlinuz initrd=initramfs {arguments}
initrd initramfs
boot
"""
_DHCP = """\
start 10.77.0.1
end 10.77.0.1
static_lease {mac} 10.77.0.1
interface eth0
lease_file /tmp/leases
boot_file http://10.77.0.254:8000/script
"""


@contextlib.contextmanager
def boot_server(lab, namespace, image, machine, helper):
    """Everything that a machine needs to boot with iPXE, behind a tap and in a guest."""
    lab.add_port("uplink0", "tap:uplink0")
    namespace.run("ip", "address", "add", "10.77.0.254/24", "dev", "uplink0")
    lines = "\\n".join(_DHCP.format(mac=machine.mac).splitlines())
    helper.check(f"echo -e '{lines}' > /tmp/conf && touch /tmp/leases")
    helper.check("udhcpd /tmp/conf")
    folder = lab.directory / "boot"
    folder.mkdir()
    (folder / "vmlinuz").symlink_to(image.kernel)
    (folder / "initramfs").symlink_to(image.initramfs)
    script = _SCRIPT.format(arguments=kernel_arguments(machine))
    (folder / "script").write_text(script)
    with (
        namespace.start(sys.executable, "-c", _ROUTER) as router,
        namespace.start(*_FILES, folder) as files,
    ):
        router.stdout.readline()
        files.stdout.readline()
        yield
