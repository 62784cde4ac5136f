"""What a port offers never shrinks while it lives: a guest that runs keeps what it took."""

from contextlib import closing

import pytest

from ports.vhost import virtio
from ports.vhost.messages import U64, Request
from vswitch.guest.errors import GuestError
from vswitch.guest.frontend import Frontend

OFFERS = (
    Request.GET_FEATURES,
    Request.GET_PROTOCOL_FEATURES,
    Request.GET_QUEUE_NUM,
    Request.GET_MAX_MEM_SLOTS,
)
NOT_OFFERED = 1 << 33  # access_platform
FEW = virtio.F_VERSION_1 | virtio.F_PROTOCOL_FEATURES


def offer(frontend):
    return [frontend.request(request) for request in OFFERS]


def test_front_ends_that_leave_while_negotiating_are_told_of(net):
    # As QEMU does with more queue pairs than the port has.
    path = net.add_port("c", queues=2)

    def reason():
        frontend = Frontend.connect(path)
        frontend.negotiate(0, set_features=False)
        frontend.close()
        return net.switch.port("c")["reason"]

    net.switch.wait_for(lambda: "more than 2 queue pairs?" in reason(), reason)
    net.switch.wait_for_state("c", "waiting-for-frontend")


def test_an_offer_stays_the_same_on_one_connection(net):
    guest = net.guest("b")
    frontend = guest.frontend
    first = offer(frontend)
    for mtu in (1500, 68, 9000):
        frontend.request(Request.NET_SET_MTU, U64(mtu))
        assert offer(frontend) == first
    for request, value in (
        (Request.NET_SET_MTU, 67),
        (Request.SET_FEATURES, guest.features | NOT_OFFERED),
    ):
        with pytest.raises(GuestError, match="refused"):
            frontend.request(request, U64(value))
        assert offer(frontend) == first
    guest.stop()
    frontend.request(Request.SET_FEATURES, U64(FEW))
    assert offer(frontend) == first


def test_an_offer_stays_the_same_whatever_became_of_the_last_front_end(net):
    path = net.add_port("b")

    def connect():
        frontend = Frontend.connect(path)
        frontend.negotiate(FEW)
        return closing(frontend)

    with connect() as frontend:
        first = offer(frontend)
        frontend.request(Request.NET_SET_MTU, U64(68))
    with connect() as frontend:
        assert offer(frontend) == first
        frontend.request(Request.SET_FEATURES, U64(NOT_OFFERED), ack=False)
        with pytest.raises(GuestError):  # hung up: there was no other way to refuse
            frontend.barrier()
    with connect() as frontend:
        assert offer(frontend) == first
