"""A session that is saved and loaded is the same session, with the same descriptors."""

import os

import pytest

from ports.base import MAX_PAIRS
from ports.vhost import saved
from ports.vhost.messages import (
    U64,
    Log,
    MemoryRegion,
    MemTable,
    Request,
    VringAddr,
    VringFd,
    VringState,
    encode_request,
)
from ports.vhost.session import Session

PAGE = 4096


@pytest.fixture
def memory():
    fd = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


def say(session, request, payload, *fds):
    """A message by way of its bytes, as it is kept."""
    copies = [os.dup(fd) for fd in fds]
    message = saved.load_message(encode_request(request, payload), copies)
    step = session.handle(message)
    assert not step.refused, step


def test_what_was_said_comes_back(memory):
    session = Session(MAX_PAIRS)
    region = MemoryRegion(0, 16 * PAGE, 1 << 40, 0)
    kick = os.eventfd(0, os.EFD_CLOEXEC)
    say(session, Request.SET_FEATURES, U64(session.offered))
    say(session, Request.SET_MEM_TABLE, MemTable((region,)), memory)
    say(session, Request.SET_LOG_BASE, Log(PAGE, 0), memory)
    say(session, Request.SET_VRING_NUM, VringState(3, 16))
    say(session, Request.SET_VRING_BASE, VringState(3, 0x8000))
    say(
        session,
        Request.SET_VRING_ADDR,
        VringAddr(3, 1, *(((1 << 40) + n * PAGE) for n in (0, 1, 2)), 0),
    )
    say(session, Request.SET_VRING_KICK, VringFd(3, has_fd=True), kick)
    say(session, Request.SET_VRING_ENABLE, VringState(3, 1))
    say(session, Request.SEND_RARP, U64(1))
    words, fds = saved.save_session(session)
    again = saved.load_session(words, [os.dup(fd) for fd in fds])
    assert saved.save_session(again)[0] == words
    assert again.rings[3].runnable
    assert again.log is not None
    for one in (session, again):
        one.close()
    os.close(kick)


@pytest.mark.parametrize("request_", [Request.SET_VRING_CALL, Request.SET_VRING_NUM])
def test_a_message_does_not_take_the_next_one_s_descriptors(request_):
    payload = (
        VringFd(0, has_fd=False)
        if request_ == Request.SET_VRING_CALL
        else VringState(0, 4)
    )
    others = os.eventfd(0, os.EFD_CLOEXEC)
    message = saved.load_message(encode_request(request_, payload), [others])
    assert message.fds == ()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(others)
