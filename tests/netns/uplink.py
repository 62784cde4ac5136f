"""What hangs on a switch with taps: guests behind it, sockets in its namespace."""

import fcntl
import os
import socket
import struct
from contextlib import ExitStack, suppress

from bench.namespace import Namespace
from tests.switch import RefusedError
from vswitch.guest import Guest

ETHERTYPE = 0x88B5  # for experiments: no kernel has a use for it
GUEST_MAC = bytes.fromhex("525400000001")
WIRE_MAC = bytes.fromhex("525400000002")
TAP = 0x0002 | 0x1000  # IFF_TAP | IFF_NO_PI
TUN = 0x0001 | 0x1000
MULTI_QUEUE = 0x0100
VNET_HDR = 0x4000
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_SOL_PACKET = 263
_AUXDATA, _VNET_HDR, _IGNORE_OUTGOING = 8, 15, 23
_ETH_P_ALL = 3
_VLAN_VALID = 1 << 4
_SO_RCVBUFFORCE = 33
_PATTERN = bytes(7 * at % 256 for at in range(256)) * 40


class Bench:
    """What one test plugs into a switch, and takes away again."""

    def __init__(self, switch, namespace):
        self.switch, self.namespace = switch, namespace
        self._owned = ExitStack()
        self._guests = []
        self._ports = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for name in self._ports:
            self.unplug(name)
        self._owned.close()

    def tap(self, name, **options):
        """A port on a tap, up."""
        self.uplink("tap", name, **options)

    def uplink(self, kind, name, **options):
        """A port on an interface, up; what adding it answered."""
        self._ports.append(name)
        answer = self.switch.add_port(name, f"{kind}:{name}", **options)
        self.switch.wait_for_state(name, "up")
        return answer

    def cable(self, name, far):
        """A pair of interfaces of that name, up: one here, one in another namespace."""
        end = f"name {name} netns {far.pid}"
        self.interface(name, f"link add {name} type veth peer {end}")
        for namespace in (self.namespace, far):
            namespace.ip(f"link set {name} up")

    def plug(self, kind, name, far, **options):
        """A port on a cable, and a guest with options; it, and the far end's wire."""
        self.cable(name, far)
        self.uplink(kind, name)
        return self.guest("vm", **options), self.wire(name, far)

    def unplug(self, name):
        """Remove a port, if the switch and the port are there."""
        with suppress(RefusedError, OSError):
            self.switch.ask("del_port", name=name)

    def interface(self, name, command):
        """Make an interface that stays, with an `ip` command."""
        self.namespace.ip(command)
        self._owned.callback(self._remove, name)

    def _remove(self, name):
        if self.namespace.link(name):
            self.namespace.ip(f"link delete {name}")

    def guest(self, name, **options):
        """A guest, up, with rings that a burst fits."""
        self._ports.append(name)
        self.switch.add_port(name)
        options = {"mac": GUEST_MAC, "queue_size": 1024} | options
        guest = Guest.connect(self.switch.socket(name), **options)
        self._owned.callback(guest.close)
        self._guests.append(guest)
        self.switch.wait_for_state(name, "up")
        return guest

    def wire(self, interface, namespace=None):
        """A socket on the far side of a tap."""
        with (namespace or self.namespace).inside():
            return self._owned.enter_context(Wire(interface))

    def trunk(self, interface, namespace):
        """The same with tags and headers."""
        with namespace.inside():
            return self._owned.enter_context(Trunk(interface))

    def socket(self, *kind, namespace=None):
        """A socket of the namespace's own network stack."""
        with (namespace or self.namespace).inside():
            it = self._owned.enter_context(socket.socket(*kind))
        it.settimeout(10)
        return it

    def hold(self, name, flags):
        """Another program that is attached to a tap."""
        return self._owned.enter_context(hold(self.namespace, name, flags))

    def check(self):
        assert [guest.faults() for guest in self._guests] == [{}] * len(self._guests)
        self.switch.assert_ledger_balances()


class Wire:
    """Plain frames in and out of an interface, beside the kernel's network stack."""

    def __init__(self, interface, protocol=ETHERTYPE):
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        self._socket.bind((interface, protocol))
        self._socket.settimeout(10)

    def send(self, frame):
        self._socket.send(frame)

    def send_counted(self, frames):
        """Send frames back to back; how many the interface's queue took."""
        taken = 0
        for frame in frames:
            try:
                self._socket.send(frame)
                taken += 1
            except OSError as error:
                if error.errno != 105:  # ENOBUFS: the queue is full
                    raise
        return taken

    def receive(self, count):
        """The next `count` frames."""
        return [self._socket.recv(1 << 17) for _ in range(count)]

    def receive_until(self, number):
        """Those of `numbered` up to one, by their numbers; it is sure to come."""
        numbers = []
        while number not in numbers[-1:]:
            numbers.append(number_of(self._socket.recv(1 << 17)))
        return numbers

    def close(self):
        self._socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Trunk(Wire):
    """Whatever comes, with virtio-net headers, and with the tags that the kernel took."""

    def __init__(self, interface):
        super().__init__(interface, _ETH_P_ALL)
        for option in (_AUXDATA, _VNET_HDR, _IGNORE_OUTGOING):
            self._socket.setsockopt(_SOL_PACKET, option, 1)

    def send(self, frame, header=bytes(10)):
        self._socket.send(header + frame)

    def receive(self):
        """The next header, frame, and (tpid, tci) of the tag taken out, or None."""
        data, ancillary, _, _ = self._socket.recvmsg(1 << 17, 256)
        ((_, _, about),) = ancillary
        status, tci, tpid = struct.unpack_from("=I12xHH", about)
        tag = (tpid, tci) if status & _VLAN_VALID else None
        return data[:10], data[10:], tag


def hold(namespace, name, flags, offloads=None):
    """Attach to a tap as another program does; an open file."""
    with namespace.inside():
        file = os.fdopen(os.open("/dev/net/tun", os.O_RDWR), "r+b", buffering=0)
    request = struct.pack("16sH22x", name.encode(), flags)
    fcntl.ioctl(file, _TUNSETIFF, request)
    if offloads is not None:
        fcntl.ioctl(file, _TUNSETOFFLOAD, offloads)
    return file


def quiet_namespace():
    """One in which the kernel sends nothing of its own accord. Needs root."""
    namespace = Namespace()
    for which in ("all", "default"):
        setting = f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6"
        namespace.run("sh", "-c", f"! [ -e {setting} ] || echo 1 > {setting}")
    return namespace


def frame(dst, src, length=60, fill=0):
    """An Ethernet frame that says where it is in a series by its bytes."""
    head = dst + src + ETHERTYPE.to_bytes(2, "big")
    return head + _PATTERN[fill % 256 :][: length - 14]


def numbered(dst, src, count):
    """Frames that differ in their number."""
    head = dst + src + ETHERTYPE.to_bytes(2, "big")
    return [head + number.to_bytes(4, "big") + bytes(42) for number in range(count)]


def number_of(frame):
    """Which of `numbered` it is."""
    return int.from_bytes(frame[14:18], "big")
