"""Features: offered, agreed upon, repeated and changed. Checklist 1 to 11."""

import pytest

from ports.vhost import virtio
from ports.vhost.features import OFFERED, OFFERED_PROTOCOL
from ports.vhost.messages import U64, Request, encode_request
from tests.conformance import dirty
from tests.conformance.dirty import highest, rings_of
from tests.conformance.hand import PROTOCOL_FEATURES
from tests.conformance.wire import (
    REFUSED,
    VERSION,
    ask,
    is_cut_off,
    number,
    raw,
    read,
)
from tests.datapath.rings import DEFAULT
from tests.system.net import Stream, exchange_both_ways, frame
from vswitch.guest import DEFAULT_FEATURES, GuestError
from vswitch.guest.frontend import DEFAULT_ORDER, DEFAULT_PROTOCOL, Frontend

MORE_THAN_WAITS = 3000  # frames that may wait in the receiver's ring, and then some


def lacking(mask):
    return [1 << bit for bit in range(64) if not mask >> bit & 1]


UNOFFERED, UNOFFERED_PROTOCOL = lacking(OFFERED), lacking(OFFERED_PROTOCOL)
LEGACY, IPXE, LINUX = (
    PROTOCOL_FEATURES,
    PROTOCOL_FEATURES | virtio.F_VERSION_1,
    PROTOCOL_FEATURES | DEFAULT,
)


def assert_frames_pass_by_hand(guest, other):
    """One frame each way between a guest with rings by hand and another."""
    one, two = frame(other, b"\x02" * 6, 100), frame(b"\x02" * 6, other, 300)
    guest.send(one)
    assert other.receive(timeout=10.0) == [one]
    assert guest.tx.wait_back() == [(0, 0)]
    guest.post(1)
    other.send_all(two)
    length = guest.header_len + len(two)
    assert guest.rx.wait_back() == [(0, length)]
    assert guest.buffer(0, length)[guest.header_len :] == two


def test_01_get_features_any_time_same_answer(net):
    """[SPEC][M]"""
    guest = net.prepared_by_hand("a")
    frontend = guest.connect()
    answers = []

    def look():
        frontend.send_raw(raw(Request.GET_FEATURES, flags=VERSION) * 3)
        answers.extend(read(frontend) for _ in range(3))

    look()
    frontend.negotiate(guest.features)
    look()
    guest.tell_memory()
    guest.start()
    look()
    guest.stop()
    look()
    assert set(answers) == {(Request.GET_FEATURES, 0x5, number(OFFERED))}
    assert OFFERED & PROTOCOL_FEATURES


@pytest.mark.parametrize("ack", [True, False])
def test_02_features_not_offered_are_refused_and_no_ring_starts_with_them(net, ack):
    """[DPDK]"""
    guest = net.prepared_by_hand("a")
    for surplus in UNOFFERED:
        frontend = guest.connect(ack=ack)
        frontend.negotiate(guest.features, set_features=False)
        guest.tell_memory()
        guest.start()
        wrong = U64(guest.features | surplus)
        if ack:
            with pytest.raises(GuestError, match=REFUSED):
                frontend.request(Request.SET_FEATURES, wrong)
            assert net.switch.port("a")["state"] != "up"
        else:
            assert is_cut_off(frontend, encode_request(Request.SET_FEATURES, wrong))
        guest.hang_up()
    net.switch.wait_for_state("a", "waiting-for-frontend")


def test_03_the_same_features_again_disturb_no_running_ring(net):
    """[M]"""
    a, b = net.pair()
    with Stream((a, b)) as flow:
        for _ in range(100):
            for guest in (a, b):
                guest.frontend.request(Request.SET_FEATURES, U64(guest.features))
        flow.wait_for_more(net.switch)
        assert flow.stop().clean


def test_04_the_log_feature_alone_is_switched_while_rings_run(net, make_log):
    """[M]"""
    a, b = net.pair()
    log = make_log(highest(b.memory.table))
    frontend, rings = b.frontend, rings_of(b)
    plain, logging = (U64(b.features | bit) for bit in (0, virtio.F_LOG_ALL))
    with Stream((a, b)) as flow:
        for _ in range(20):
            frontend.request(Request.SET_LOG_BASE, log.payload, [log.fd])
            log.fetch()
            frontend.request(Request.SET_FEATURES, logging)
            flow.wait_for_more(net.switch, MORE_THAN_WAITS)
            assert log.fetch()
            frontend.request(Request.SET_FEATURES, plain)
            log.fetch()
            flow.wait_for_more(net.switch, MORE_THAN_WAITS)
            assert log.fetch() == []
        dirty.begin(frontend, log, rings)
        flow.wait_for_more(net.switch)
        dirty.end(frontend, rings)
        assert flow.stop().clean


def test_05_other_features_are_refused_while_a_ring_runs(net):
    """[DPDK]"""
    a, b = net.pair()
    changes = [virtio.F_MRG_RXBUF, virtio.F_EVENT_IDX, virtio.F_VERSION_1]
    with Stream((a, b)) as flow:
        for change in changes:
            for guest in (a, b):
                with pytest.raises(GuestError, match=REFUSED):
                    guest.frontend.request(
                        Request.SET_FEATURES, U64(guest.features ^ change)
                    )
        flow.wait_for_more(net.switch)
        assert flow.stop().clean
    a.frontend.stop_ring(0)  # one ring still runs
    with pytest.raises(GuestError, match=REFUSED):
        a.frontend.request(Request.SET_FEATURES, U64(a.features ^ changes[0]))


def test_06_another_driver_chooses_anew_when_all_rings_are_stopped(net):
    """iPXE, then Linux, then a legacy driver, on one connection. [M]"""
    other = net.guest("b", mac=b"\x52\x54\x00\x00\x00\x0b")
    guest = net.by_hand("a", features=IPXE)
    assert_frames_pass_by_hand(guest, other)
    for features, header_len in ((LINUX, 12), (LEGACY, 10), (IPXE, 12), (LINUX, 12)):
        guest.stop()
        guest.features, guest.header_len = features, header_len
        guest.lay_out()
        guest.frontend.request(Request.SET_FEATURES, U64(features))
        guest.start()
        assert_frames_pass_by_hand(guest, other)


def test_07_protocol_features_come_before_features_and_once_per_pair(net):
    """[SPEC][M]"""
    a, b = net.prepared("a", queue_pairs=4), net.guest("b")

    class PerPair(Frontend):
        def request(self, request, payload=None, fds=(), *, ack=None):
            reply = super().request(request, payload, fds, ack=ack)
            if request == Request.SET_PROTOCOL_FEATURES:
                for _ in range(3):
                    known = super().request(Request.GET_PROTOCOL_FEATURES)
                    assert known == U64(OFFERED_PROTOCOL)
                    super().request(request, payload, ack=False)
            return reply

    a.frontend = PerPair.connect(net.switch.socket("a"))
    a._negotiate(a.frontend)
    a.start()
    a.frontend.request(Request.SET_PROTOCOL_FEATURES, U64(a.frontend.protocol_features))
    exchange_both_ways(a, b)
    assert net.switch.port("a")["queues"]["enabled"] == 4


def test_08_protocol_features_not_offered_are_refused(net):
    """[DPDK]"""
    net.add_port("a")
    for surplus in UNOFFERED_PROTOCOL:
        wrong = number(DEFAULT_PROTOCOL | surplus)
        frontend = net.connect("a")
        assert is_cut_off(frontend, raw(Request.SET_PROTOCOL_FEATURES, wrong))
        frontend = net.connect("a")
        frontend.negotiate(DEFAULT_FEATURES)
        assert ask(frontend, Request.SET_PROTOCOL_FEATURES, wrong) != number(0)
        assert ask(frontend, Request.GET_STATUS) == number(0)  # and goes on
        frontend.close()


def test_09_the_number_of_queues_is_the_ports_pairs(net):
    """[SPEC]"""
    for name, port, pairs in (("a", {}, 8), ("b", {"queues": 3}, 3)):
        net.add_port(name, **port)
        assert ask(net.connect(name), Request.GET_QUEUE_NUM) == number(pairs)


@pytest.mark.parametrize("when", ["never", "late"])
def test_10_an_owner_may_be_missing_or_late(net, when):
    """[M][LIBKRUN]"""

    class Unowned(Frontend):
        def request(self, request, payload=None, fds=(), *, ack=None):
            if request == Request.SET_OWNER:
                return None
            return super().request(request, payload, fds, ack=ack)

    a, b = net.prepared("a"), net.guest("b")
    a.frontend = Unowned.connect(net.switch.socket("a"))
    a._negotiate(a.frontend)
    a.start()
    exchange_both_ways(a, b)
    if when == "late":
        Frontend.request(a.frontend, Request.SET_OWNER)
        exchange_both_ways(a, b)


def test_11_the_owners_reset_changes_nothing(net):
    """[SPEC]"""
    a, b = net.pair()
    before = net.switch.port("a")["features"]
    with Stream((a, b)) as flow:
        for guest in (a, b):
            guest.frontend.request(Request.RESET_OWNER)
        flow.wait_for_more(net.switch)
        assert flow.stop().clean
    assert net.switch.port("a")["features"] == before
    # Memory and features are still known to the next start.
    a.stop()
    a._order = [step for step in DEFAULT_ORDER if step != "enable"]
    a.start()
    exchange_both_ways(a, b)
