"""Which offloads a guest may use, and what is said of headers that do not fit."""

import pytest

from vswitch.guest import OFFLOADS, GuestError, NetHeader
from vswitch.guest.header import RECEIVE_OFFLOADS, SEND_OFFLOADS, usable

CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_ECN = 1 << 0, 1 << 1, 1 << 7, 1 << 9
HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_USO = 1 << 11, 1 << 12, 1 << 13, 1 << 56
VERSION_1 = 1 << 32


@pytest.mark.parametrize(
    ("offered", "left"),
    [
        (OFFLOADS, OFFLOADS),
        (OFFLOADS & ~CSUM, RECEIVE_OFFLOADS),
        (OFFLOADS & ~GUEST_CSUM, SEND_OFFLOADS),
        (VERSION_1 | HOST_TSO4 | HOST_ECN | HOST_USO, VERSION_1),
        (CSUM | HOST_ECN, CSUM),
        (CSUM | HOST_TSO6 | HOST_ECN, CSUM | HOST_TSO6 | HOST_ECN),
        (GUEST_CSUM | GUEST_ECN, GUEST_CSUM),
        (GUEST_TSO4 | GUEST_ECN, 0),
    ],
)
def test_a_feature_is_not_used_without_the_one_that_it_needs(offered, left):
    # virtio 1.2 §5.1.3.1
    assert usable(offered) == left


def test_a_guest_accepts_what_is_offered_and_usable(attach, host):
    host.options = {"offered": VERSION_1 | 1 << 30 | HOST_TSO4 | GUEST_CSUM}
    guest = attach(features=VERSION_1 | 1 << 30 | OFFLOADS)
    assert guest.features == VERSION_1 | 1 << 30 | GUEST_CSUM


def test_as_many_headers_as_frames_are_needed(attach):
    guest = attach()
    with pytest.raises(GuestError, match="2 frames with 1 headers"):
        guest.send([bytes(60)] * 2, headers=[NetHeader()])


def test_plain_frames_arrive_with_a_header_that_asks_for_nothing(attach):
    guest = attach()
    guest.send_all([bytes(60)] * 300, headers=[NetHeader()] * 300)
    arrived = guest.receive_with_headers(timeout=5.0, at_least=300)
    assert arrived == [(NetHeader(num_buffers=1), bytes(60))] * 300
