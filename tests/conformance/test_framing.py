"""Messages on the socket: cut, joined, answered, malformed. Checklist 12 to 19."""

import contextlib
import itertools
import os
import signal
from pathlib import Path

import pytest

from ports.vhost.messages import (
    PF_REPLY_ACK,
    RULES,
    Request,
    VringFd,
    VringState,
    encode_request,
)
from tests.conformance.wire import (
    NATURAL,
    NEED_REPLY,
    REPLY,
    SERVED,
    VERSION,
    ask,
    good_message,
    is_cut_off,
    is_refused,
    number,
    raw,
    read,
)
from tests.system.net import exchange_both_ways, footprint
from vswitch.guest.frontend import DEFAULT_PROTOCOL, Frontend, eventfd

UNKNOWN = [0, 22, 23, 33, 44, 60, 77, 1 << 31, 0xFFFFFFFF]
LAST_KNOWN = 43


class ByteByByte(Frontend):
    """Sends every message one byte at a time, and calls `between` after each."""

    def send_raw(self, data, fds=()):
        for at in range(len(data)):
            super().send_raw(data[at : at + 1], fds if at == 0 else ())
            self.between()


@contextlib.contextmanager
def halted(pid):
    """Keep a process from running."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def assert_one_reply(frontend, data, fds, wanted):
    """Send a message; the replies before a barrier's are `wanted` (0 or 1)."""
    frontend.send_raw(data, fds)
    frontend.send_raw(raw(Request.GET_FEATURES, flags=VERSION))
    for _ in range(wanted):
        request, flags, payload = read(frontend)
        assert (request, flags) == (int.from_bytes(data[:4], "little"), 0x5)
        yield payload
    assert read(frontend)[0] == Request.GET_FEATURES


def test_12_a_message_may_come_one_byte_at_a_time_and_nobody_waits(net):
    """[INF]"""
    a, b = net.prepared("a"), net.guest("b")
    a.frontend = ByteByByte.connect(net.switch.socket("a"))
    bytes_sent = itertools.count()

    def between():
        if next(bytes_sent) % 100 == 50:  # in the middle of messages, mostly
            net.assert_undisturbed()

    a.frontend.between = between
    a._negotiate(a.frontend)
    a.start()
    exchange_both_ways(a, b)
    assert next(bytes_sent) > 300


def test_13_descriptors_belong_to_the_message_that_they_came_with(net):
    """Two messages wait in the socket, and only the second brought one. [M]"""
    guest = net.by_hand("a")
    frontend, calls = guest.frontend, [eventfd() for _ in range(3)]
    messages = []
    for call in calls:
        for request, payload, fds in (
            (Request.GET_FEATURES, None, []),
            (Request.SET_VRING_CALL, VringFd(1, has_fd=True), [call]),
            (Request.SET_VRING_ENABLE, VringState(1, 1), []),
        ):
            messages.append((encode_request(request, payload, need_reply=True), fds))
    with halted(net.switch.pid):
        for data, fds in messages:
            frontend.send_raw(data, fds)
    for data, _ in messages:
        request, flags, payload = read(frontend)
        assert (request, flags) == (int.from_bytes(data[:4], "little"), 0x5)
        assert request == Request.GET_FEATURES or payload == number(0)
    guest.send(bytes(6) + bytes(54))  # comes back, with a call
    guest.tx.wait_back()
    net.switch.wait_for(
        lambda: [*map(count_of, calls)] == [0, 0, 1], "a call on the last"
    )
    for fd in calls:
        os.close(fd)


def count_of(fd):
    """How often an eventfd was signalled, without taking it away."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    (count,) = (line for line in lines if line.startswith("eventfd-count"))
    return int(count.split()[1], 16)


def test_14_every_message_that_wants_a_reply_gets_one(net):
    """[CH]"""
    guest = net.prepared_by_hand("a")
    for request in [*SERVED, *(n for n in range(1, LAST_KNOWN + 1) if n not in SERVED)]:
        frontend = net.connect("a")
        frontend.negotiate(guest.features)
        payload, fds = None, []
        if request in SERVED:
            payload, fds = good_message(guest, request)
        data = encode_request(request, payload, need_reply=True)
        (answer,) = assert_one_reply(frontend, data, fds, 1)
        if request not in NATURAL:
            assert (answer == number(0)) == (request in SERVED), request
        net.hang_up(frontend, "a")


def test_15_a_reply_of_its_own_is_the_only_one(net):
    """[SPEC]"""
    guest = net.prepared_by_hand("a")
    frontend = guest.connect()
    frontend.negotiate(guest.features)
    for request in NATURAL:
        payload, fds = good_message(guest, request)
        data = encode_request(request, payload, need_reply=True)
        for _ in range(2):
            assert len([*assert_one_reply(frontend, data, fds, 1)]) == 1


def test_16_without_reply_ack_nothing_is_acknowledged(net):
    """[SPEC]"""
    guest = net.prepared_by_hand("a")
    frontend = guest.connect()
    frontend.negotiate(guest.features, DEFAULT_PROTOCOL & ~PF_REPLY_ACK)
    quiet = set(SERVED) - set(NATURAL) - {Request.SET_PROTOCOL_FEATURES}
    for request in sorted(quiet):
        payload, fds = good_message(guest, request)
        data = encode_request(request, payload, need_reply=True)
        assert [*assert_one_reply(frontend, data, fds, 0)] == []


@pytest.mark.parametrize(
    "header",
    [
        raw(Request.GET_FEATURES, size=4097),
        raw(Request.SET_FEATURES, size=0xFFFFFFFF),
        raw(Request.SET_MEM_TABLE, size=1 << 31),
        raw(Request.GET_FEATURES, flags=0),
        raw(Request.GET_FEATURES, flags=2),
        raw(Request.GET_FEATURES, flags=3),
        raw(Request.GET_FEATURES, flags=VERSION | REPLY),
        raw(Request.SET_OWNER, flags=VERSION | REPLY | NEED_REPLY),
        b"\xff" * 12,
        bytes(12),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=range(11),
)
def test_17_a_header_that_cannot_be_followed_ends_the_connection(net, header):
    """[DPDK]"""
    guest = net.prepared_by_hand("a")
    before = footprint(net.switch)
    spare = eventfd()
    for count in (0, 1, 8):
        frontend = net.connect("a")
        frontend.negotiate(guest.features)
        assert is_cut_off(frontend, header, [spare] * count)
        net.hang_up(frontend, "a")
        assert footprint(net.switch) == before
    os.close(spare)


@pytest.mark.parametrize("count", [1, 9, 33, 253])
def test_18_descriptors_that_do_not_belong_are_closed(net, count):
    """On messages of every kind, known or not. [CVE-2019-14818]"""
    guest = net.prepared_by_hand("a")
    before = footprint(net.switch)
    spare = eventfd()
    for request in range(LAST_KNOWN + 3):
        if request in SERVED and count <= RULES[request].max_fds:
            continue
        payload = good_message(guest, request)[0] if request in SERVED else None
        frontend = net.connect("a")
        frontend.negotiate(guest.features)
        body = b"" if payload is None else payload.encode()
        assert is_refused(frontend, request, body, [spare] * count)
        net.hang_up(frontend, "a")
        assert footprint(net.switch) == before, request
    os.close(spare)


@pytest.mark.parametrize("request_id", UNKNOWN)
def test_19_an_unknown_request_is_refused_or_ends_the_connection(net, request_id):
    """[DPDK][INF]"""
    guest = net.prepared_by_hand("a")
    frontend = guest.connect()
    frontend.negotiate(guest.features)
    for payload in (b"", number(0), bytes(40)):
        answer = ask(frontend, request_id, payload)
        assert len(answer) == 8
        assert answer != number(0)
    frontend.barrier()
    assert is_cut_off(frontend, raw(request_id, flags=VERSION))
