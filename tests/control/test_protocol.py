"""Messages between manager and workers: bounds and descriptors survive."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswitch.control import protocol

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.text()
)
MESSAGES = st.lists(st.one_of(SCALARS, st.lists(st.lists(SCALARS))), max_size=4)


@pytest.fixture(scope="module")
def lasting():
    pair = protocol.pair()
    yield pair
    for sock in pair:
        sock.close()


@pytest.fixture
def pair():
    pair = protocol.pair()
    yield pair
    for sock in pair:
        sock.close()


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@given(st.lists(MESSAGES, min_size=1, max_size=3))
def test_what_was_sent_is_received_message_by_message(lasting, messages):
    ours, theirs = lasting
    for message in messages:
        protocol.send(ours, message)
    assert [protocol.receive(theirs) for _ in messages] == [(m, []) for m in messages]


def test_a_tuple_arrives_as_a_list(pair):
    protocol.send(pair[0], ["map", 1, [(1, 2, 3, 4)]])
    assert protocol.receive(pair[1])[0] == ["map", 1, [[1, 2, 3, 4]]]


@pytest.mark.parametrize("count", [1, 2, protocol.MAX_FDS])
def test_descriptors_ride_along_with_their_message(pair, count):
    read, write = os.pipe()
    before = open_files()
    protocol.send(pair[0], ["fds", 1], [write] * count)
    protocol.send(pair[0], ["sync", 2])
    message, fds = protocol.receive(pair[1])
    assert (message, len(fds)) == (["fds", 1], count)
    assert protocol.receive(pair[1]) == (["sync", 2], [])
    for fd in fds:
        assert not os.get_inheritable(fd)
        os.write(fd, b"x")
        os.close(fd)
    assert os.read(read, 2 * count) == b"x" * count
    assert open_files() == before
    os.close(read)
    os.close(write)


def test_the_largest_message_arrives_whole(pair):
    # The rows of a port's whole memory table are far from it.
    message = ["unmap", 1, [[1 << 46, 1 << 46, 1 << 20]] * 2000]
    protocol.send(pair[0], message)
    assert protocol.receive(pair[1]) == (message, [])


def test_a_peer_that_is_gone_is_an_end(pair):
    pair[0].close()
    with pytest.raises(EOFError, match="closed"):
        protocol.receive(pair[1])
    with pytest.raises(OSError, match="Broken pipe"):
        protocol.send(pair[1], ["ready"])


def test_the_last_words_of_a_peer_are_heard(pair):
    protocol.send(pair[0], ["ready"])
    pair[0].close()
    assert protocol.receive(pair[1]) == (["ready"], [])
    with pytest.raises(EOFError):
        protocol.receive(pair[1])


def test_nothing_to_receive_does_not_block(pair):
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        protocol.receive(pair[1])


def test_a_peer_that_does_not_read_does_not_block(pair):
    pair[0].setblocking(False)
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sent = 0

    def send_on():
        nonlocal sent
        while True:
            protocol.send(pair[0], ["progress", sent, 100])
            sent += 1

    with pytest.raises(BlockingIOError):
        send_on()
    assert sent > 0
    for number in range(sent):
        assert protocol.receive(pair[1])[0] == ["progress", number, 100]
