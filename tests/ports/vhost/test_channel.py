import array
import os
import resource
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ports.errors import ProtocolError
from ports.vhost.channel import MAX_QUEUED, MESSAGE_TIMEOUT_S, Channel, close_fds
from ports.vhost.messages import (
    U64,
    Request,
    VringFd,
    encode_reply,
    encode_request,
)
from tests.ports.vhost.conftest import open_fds

pytestmark = pytest.mark.usefixtures("no_fd_leak")

KICK = encode_request(Request.SET_VRING_KICK, VringFd(1, has_fd=True))
GET = encode_request(Request.GET_FEATURES, need_reply=True)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def send(sock, data, fds=()):
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    assert sock.sendmsg([data], [rights] if fds else []) == len(data)


def send_files(sock, data, count):
    """Send `count` descriptors along, and keep none."""
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    try:
        send(sock, data, fds)
    finally:
        close_fds(fds)


def test_silence_is_no_message(pair):
    channel, _ = pair
    assert channel.receive(0) is None
    assert channel.deadline_s is None


def test_message_arrives_whole(pair):
    channel, peer = pair
    send(peer, GET)
    message = channel.receive(0)
    assert message == (Request.GET_FEATURES, True, b"", ())
    assert channel.receive(0) is None


def test_message_may_arrive_one_byte_at_a_time(pair):
    channel, peer = pair
    event = os.eventfd(0)
    send(peer, KICK[:1], [event])
    for byte in KICK[1:]:
        assert channel.receive(0) is None
        send(peer, bytes([byte]))
    message = channel.receive(0)
    assert message.payload == KICK[12:]
    assert len(message.fds) == 1
    close_fds([event, *message.fds])


def test_descriptors_stay_with_their_message(pair):
    channel, peer = pair
    send(peer, GET)
    send_files(peer, KICK, 1)
    send(peer, GET)
    send_files(peer, KICK, 2)
    counts = []
    while message := channel.receive(0):
        counts.append(len(message.fds))
        close_fds(message.fds)
    assert counts == [0, 1, 0, 2]


def test_descriptors_are_closed_on_exec(pair):
    channel, peer = pair
    send_files(peer, KICK, 1)
    (fd,) = channel.receive(0).fds
    assert not os.get_inheritable(fd)
    close_fds([fd])


@given(cuts=st.lists(st.integers(1, 60), max_size=10), count=st.integers(1, 4))
def test_any_cutting_gives_the_same_messages(cuts, count):
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    stream = (KICK + GET) * count
    received = []
    for cut in [*cuts, len(stream)]:
        theirs.send(stream[:cut])
        stream = stream[cut:]
        while message := channel.receive(0):
            received.append(message.request)
    assert received == [Request.SET_VRING_KICK, Request.GET_FEATURES] * count
    channel.close()
    theirs.close()


def test_as_many_descriptors_as_the_kernel_carries_are_taken(pair):
    channel, peer = pair
    send_files(peer, KICK, 253)
    message = channel.receive(0)
    assert len(message.fds) == 253
    close_fds(message.fds)


def test_descriptors_heaped_onto_one_message_end_it(pair):
    channel, peer = pair
    send_files(peer, KICK[:1], 253)
    assert channel.receive(0) is None
    send_files(peer, KICK[1:2], 1)
    with pytest.raises(ProtocolError, match="more than 253 descriptors"):
        channel.receive(0)


def test_descriptors_that_do_not_fit_into_our_table_end_the_session(pair):
    """The kernel installs some of them and drops the others; neither may leak."""
    channel, peer = pair
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    send(peer, KICK, fds)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds) + 6, limits[1]))
    try:
        with pytest.raises(ProtocolError, match="limit of open files"):
            channel.receive(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        close_fds(fds)


@pytest.mark.parametrize(
    "header",
    [
        "010000000200000000000000",  # version 2
        "010000000500000000000000",  # a reply
        "010000000100000001100000",  # 4097 bytes
        "0100000001000000ffffffff",
    ],
)
def test_bad_header_ends_the_session_and_its_descriptors(pair, header):
    channel, peer = pair
    before = open_fds()
    send_files(peer, bytes.fromhex(header), 5)
    with pytest.raises(ProtocolError):
        channel.receive(0)
    assert open_fds() == before


def test_peer_that_leaves_between_messages(pair):
    channel, peer = pair
    send(peer, GET)
    peer.close()
    assert channel.receive(0) is not None
    with pytest.raises(EOFError, match=r"closed the connection$"):
        channel.receive(0)


def test_peer_that_leaves_within_a_header(pair):
    channel, peer = pair
    send_files(peer, KICK[:5], 1)
    peer.close()
    with pytest.raises(EOFError, match="in the middle of a message"):
        channel.receive(0)


def test_peer_that_leaves_within_a_payload(pair):
    channel, peer = pair
    send_files(peer, KICK[:15], 1)
    peer.close()
    with pytest.raises(EOFError, match="in the middle of SET_VRING_KICK"):
        channel.receive(0)


def test_peer_that_leaves_with_our_reply_unread(pair):
    channel, peer = pair
    channel.send(GET)
    peer.close()
    with pytest.raises(EOFError):
        channel.receive(0)


def test_closing_ends_the_descriptors_of_half_a_message(pair):
    channel, peer = pair
    send_files(peer, KICK[:15], 3)
    assert channel.receive(0) is None
    channel.close()


def test_message_has_a_deadline_from_its_first_byte_to_its_last(pair):
    channel, peer = pair
    send(peer, KICK[:1])
    channel.receive(100)
    assert channel.deadline_s == 100 + MESSAGE_TIMEOUT_S
    send(peer, KICK[1:14])
    channel.receive(105)
    assert channel.deadline_s == 100 + MESSAGE_TIMEOUT_S
    send(peer, KICK[14:])
    assert channel.receive(106) is not None
    assert channel.deadline_s is None


def test_reply_arrives(pair):
    channel, peer = pair
    reply = encode_reply(Request.GET_FEATURES, U64(1))
    channel.send(reply)
    assert not channel.wants_write
    assert peer.recv(100) == reply


def test_peer_that_never_reads_is_given_up(pair):
    channel, _ = pair
    reply = encode_reply(Request.GET_FEATURES, U64(1))
    while not channel.wants_write:
        channel.send(reply)
    for _ in range(MAX_QUEUED // len(reply) - 1):
        channel.send(reply)
    with pytest.raises(ProtocolError, match="does not read its replies"):
        channel.send(reply)


def test_replies_that_had_to_wait_arrive_in_order(pair):
    channel, peer = pair
    sent = b""
    while not channel.wants_write:
        sent += (reply := os.urandom(20))
        channel.send(reply)
    received = b""
    while len(received) < len(sent):
        received += peer.recv(65536)
        channel.flush()
    assert received == sent
    assert not channel.wants_write


def test_sending_to_a_peer_that_left(pair):
    channel, peer = pair
    peer.close()
    with pytest.raises(EOFError):
        channel.send(GET)


class Reads:
    """A socket that counts how often something is taken out of it."""

    def __init__(self, sock):
        self._sock, self.count = sock, 0

    def recvmsg(self, length, room, flags):
        self.count += not flags & socket.MSG_PEEK
        return self._sock.recvmsg(length, room, flags)

    def __getattr__(self, name):
        return getattr(self._sock, name)


def test_what_came_in_one_piece_is_taken_by_one_read():
    # A kill between two would leave a payload without its header.
    ours, theirs = socket.socketpair()
    shown = []

    def show(data, fds):
        shown.append((data, len(fds)))

    reads = Reads(ours)
    channel = Channel(reads, show)
    send_files(theirs, KICK, 1)
    send(theirs, GET)
    kick, get = channel.receive(0), channel.receive(0)
    assert (kick.request, get.request) == (Request.SET_VRING_KICK, Request.GET_FEATURES)
    assert len(kick.fds) == 1
    close_fds(kick.fds)
    assert reads.count == 2
    assert [data for data, _ in shown] == [KICK, GET]
    assert channel.receive(0) is None
    channel.close()
    theirs.close()
