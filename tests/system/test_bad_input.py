"""Front-ends that break the protocol: they are refused, and nobody else notices."""

import contextlib
import dataclasses
import os
import resource
import socket
import struct

import pytest

from ports.vhost.messages import (
    RULES,
    U64,
    MemTable,
    Request,
    VringAddr,
    VringFd,
    VringState,
    encode_request,
)
from tests.system.net import (
    assert_footprint,
    exchange_both_ways,
    fill,
    footprint,
    open_fds,
    status_kib,
)
from vswitch.guest import GuestError
from vswitch.guest.frontend import Frontend, RingSetup

NEED_REPLY, REPLY, VERSION = 8, 4, 1
SERVED = [request for request in RULES if RULES[request].needs in (0, 1, 16, 1 << 16)]
REFUSED = "the switch refused"
HUNG_UP = "hung up|Broken pipe|reset by peer"


@pytest.fixture
def scene(net):
    """Two guests that talk, and a front-end that has negotiated on a port apart."""
    bystanders = net.guest("a"), net.guest("b")
    victim = net.prepared("c")
    with make_front_end(net, victim):
        pass
    net.switch.wait_for_state("c", "waiting-for-frontend")
    before = footprint(net.switch)
    yield net, victim
    net.switch.wait_for_state("c", "waiting-for-frontend")
    assert_footprint(net.switch, before)
    exchange_both_ways(*bystanders)
    victim.open()
    exchange_both_ways(bystanders[0], victim)


def make_front_end(net, victim, ack=True):
    frontend = Frontend.connect(net.switch.socket("c"), ack=ack)
    frontend.negotiate(victim._wanted)
    frontend.set_memory(victim.memory.table, [victim.memory.fd])
    return contextlib.closing(frontend)


def is_refused(frontend, data, fds=()):
    """Send a raw request that asks for an answer; whether it was refused or cut off."""
    try:
        frontend.send_raw(data, fds)
        (request,) = struct.unpack("=I", data[:4])
        head = frontend._read(12, request)
        _, flags, size = struct.unpack("=III", head)
        assert (flags, size) == (VERSION | REPLY, 8)
        return frontend._read(8, request) != bytes(8)
    except GuestError:
        return True


def assert_cut_off(frontend, data, fds=()):
    """Send what nothing can follow."""

    def go_on():
        frontend.send_raw(data, fds)
        frontend.barrier()

    with pytest.raises(GuestError, match=HUNG_UP):
        go_on()


def raw(request, payload=b"", flags=VERSION | NEED_REPLY, size=None):
    size = len(payload) if size is None else size
    return struct.pack("=III", request, flags, size) + payload


# Checklist 17, 14.
def test_payloads_of_a_wrong_size_are_refused(scene):
    net, victim = scene
    for request in SERVED:
        kind = RULES[request].payload
        right = {U64: 8, VringState: 8, VringFd: 8, VringAddr: 40, MemTable: 40}
        size = right.get(kind, 0)
        for wrong in {0, 1, size - 1, size + 1, 9, 41, 4096} - {size, -1}:
            with make_front_end(net, victim) as frontend:
                assert is_refused(frontend, raw(request, bytes(wrong)))


@pytest.mark.parametrize(
    "request_id",
    [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR],
)
@pytest.mark.parametrize("kind", ["missing", "surplus", "pipe", "file", "socket"])
def test_anything_but_an_eventfd_is_refused(scene, request_id, kind):
    net, victim = scene
    read_end, write_end = os.pipe()
    one, other = socket.socketpair()
    fds = {
        "missing": [],
        "surplus": [victim.rings["kick_fd"][0]],
        "pipe": [write_end],
        "file": [victim.memory.fd],
        "socket": [one.fileno()],
    }[kind]
    with make_front_end(net, victim) as frontend:
        with pytest.raises(GuestError, match=REFUSED):
            frontend.request(request_id, VringFd(1, kind != "surplus"), fds)
        frontend.barrier()
    for fd in (read_end, write_end):
        os.close(fd)
    one.close()
    other.close()


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "hole", "too large"])
def test_memory_that_cannot_be_mapped_is_refused(scene, kind, tmp_path):
    net, victim = scene
    (region,) = victim.memory.table.regions
    fd, other = {
        "pipe": os.pipe,
        "directory": lambda: (os.open(tmp_path, os.O_RDONLY), -1),
        "device": lambda: (os.open("/dev/zero", os.O_RDWR), -1),
        "hole": lambda: (os.memfd_create("empty"), -1),
        "too large": lambda: (os.memfd_create("huge"), -1),
    }[kind]()
    if kind == "too large":
        region = dataclasses.replace(region, gpa=0, frontend_va=0, size=65 << 40)
        os.ftruncate(fd, region.size)
    with (
        make_front_end(net, victim) as frontend,
        pytest.raises(GuestError, match=REFUSED),
    ):
        frontend.set_memory(MemTable((region,)), [fd])
    for one in {fd, other} - {-1}:
        os.close(one)


# Checklist S12.
@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@pytest.mark.parametrize("where", ["outside", "across the end", "wrapping", "odd"])
def test_a_ring_outside_of_memory_never_starts_and_says_why(scene, part, where):
    net, victim = scene
    end = victim.memory.addr + victim.memory.size
    addr = {
        "outside": end + (1 << 20),
        "across the end": end - 16,
        "wrapping": (1 << 64) - 16,
        "odd": victim.memory.addr + 1,
    }[where]
    good = {
        name: victim.memory.addr + 0x10000 * n
        for n, name in enumerate(("desc", "avail", "used"))
    }
    with make_front_end(net, victim) as frontend:
        ring = RingSetup(
            index=1, size=256, base=0, **good | {part: addr}, kick_fd=-1, call_fd=-1
        )
        if where == "odd":
            with pytest.raises(GuestError, match=REFUSED):
                frontend.start_ring(ring)
        else:
            frontend.start_ring(ring)
            port = net.switch.port("c")
            assert port["state"] == "waiting-for-driver"
            assert "outside guest memory" in port["reason"]


# Checklist S16.
def test_who_stops_in_the_middle_of_a_message_is_cut_off_and_nobody_waits(scene):
    net, victim = scene
    data = encode_request(Request.SET_FEATURES, U64(0))
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(make_front_end(net, victim))]
        for name in "de":
            connected = Frontend.connect(net.add_port(name))
            slow.append(stack.enter_context(contextlib.closing(connected)))
        for frontend, length in zip(slow, (1, 11, 15), strict=True):
            frontend._sock.settimeout(30)
            frontend.send_raw(data[:length])
        exchange_both_ways(*net.guests[:2])
        for frontend in slow:
            with pytest.raises(GuestError, match=HUNG_UP):
                frontend._read(1, Request.SET_FEATURES)
    for name in "de":
        net.switch.ask("del_port", name=name)


# Checklist S18.
def test_who_asks_and_never_reads_holds_up_nobody_else(scene):
    net, victim = scene
    with make_front_end(net, victim, ack=False) as frontend:
        frontend._sock.setblocking(False)
        question = encode_request(Request.GET_FEATURES)
        with pytest.raises(GuestError, match="temporarily unavailable"):
            fill(frontend.send_raw, question * 1000)
        exchange_both_ways(*net.guests[:2])
        assert status_kib(net.switch.pid, "VmRSS") < 60 << 10


def test_a_port_takes_front_ends_again_when_there_are_descriptors_again(own_net):
    net = own_net("--spares", 0)
    net.add_port("a")
    _, hard = resource.prlimit(net.switch.pid, resource.RLIMIT_NOFILE)
    used = open_fds(net.switch.pid)
    few = next(number for number in range(len(used) + 1) if number not in used)
    resource.prlimit(net.switch.pid, resource.RLIMIT_NOFILE, (few, hard))
    with socket.socket(socket.AF_UNIX) as refused:
        refused.connect(str(net.switch.socket("a")))
        net.switch.wait_for_log("cannot take a front-end: EMFILE")
        resource.prlimit(net.switch.pid, resource.RLIMIT_NOFILE, (hard, hard))
    guest = net.behind(net.switch.socket("a"), timeout=60)
    guest.open()
    exchange_both_ways(guest, net.guest("b"))
