"""Where frames go: learning, flooding, and what is dropped on purpose."""

import random

import pytest

from tests.switch import RefusedError
from tests.system.net import BROADCAST, RECEIVER, assert_flows, frame

MULTICAST = bytes.fromhex("01005e000001")
LLDP = bytes.fromhex("0180c200000e")
LAST_RESERVED = bytes.fromhex("0180c200000f")
BEYOND_RESERVED = bytes.fromhex("0180c2000010")
STATION = bytes.fromhex("020000000001")


@pytest.fixture
def trio(net):
    """Three guests; nobody is known yet."""
    return [net.guest(name) for name in "abc"]


def said(mac):
    return mac.hex(":")


def deliver(sender, *frames):
    """Send frames; when they come back, every copy is where it belongs."""
    sender.send_all(list(frames))
    sender.wait_sent()


def arrived(*guests):
    return [guest.receive(timeout=0) for guest in guests]


def entries(switch, **wanted):
    """Rows of the forwarding database that look like that."""
    rows = switch.ask("fdb_show")
    return [r for r in rows if all(r[name] == v for name, v in wanted.items())]


def station(number):
    return b"\x02\x00\x01" + number.to_bytes(3, "big")


def test_an_address_is_flooded_until_it_was_heard(net, trio):
    a, b, c = trio
    to_b, to_a = frame(b, a), frame(a, b)
    deliver(a, to_b)
    assert arrived(a, b, c) == [[], [to_b], [to_b]]
    deliver(b, to_a)
    deliver(a, to_b)
    assert arrived(a, b, c) == [[to_a], [to_b], []]
    counters = net.switch.counters("a")
    assert (counters["rx_flooded"], counters["rx_forwarded"]) == (1, 1)
    assert net.switch.counters("b")["rx_forwarded"] == 1
    assert entries(net.switch, mac=a.mac_text, ifname="a", state="learned", vlan=0)


@pytest.mark.parametrize(
    "destination",
    [BROADCAST, MULTICAST, LLDP, LAST_RESERVED, STATION],
    ids=said,
)
def test_a_flooded_frame_reaches_all_others_exactly_once(net, trio, destination):
    # Protocols between neighbours are no bridge's business unless it takes part.
    for sender in trio:
        frames = [frame(destination, sender, 60 + n, n) for n in range(100)]
        deliver(sender, *frames)
        wanted = [[] if guest is sender else frames for guest in trio]
        assert arrived(*trio) == wanted
    assert net.switch.counters("a")["rx_flooded"] == 100
    assert net.switch.counters("a")["tx_frames"] == 200


def test_reserved_addresses_may_be_kept_back(own_net):
    net = own_net("--no-forward-reserved")
    a, b = net.guest("a"), net.guest("b")
    past = frame(BEYOND_RESERVED, a)
    deliver(a, frame(LLDP, a), frame(LAST_RESERVED, a), past)
    assert arrived(b) == [[past]]
    assert net.switch.counters("a")["rx_drop_reserved"] == 2


def test_a_port_that_is_not_up_gets_no_copies(net):
    a, b = net.guest("a"), net.guest("b")
    net.add_port("c")
    deliver(a, frame(BROADCAST, a))
    assert arrived(b) == [[frame(BROADCAST, a)]]
    assert set(net.switch.counters("c").values()) == {0}


def test_a_frame_for_its_own_port_is_dropped(net, trio):
    a, b, c = trio
    deliver(a, frame(b, STATION), frame(STATION, a))
    assert arrived(a, b, c) == [[], [frame(b, STATION)], [frame(b, STATION)]]
    assert net.switch.counters("a")["rx_drop_hairpin"] == 1


@pytest.mark.parametrize("source", [bytes(6), MULTICAST, BROADCAST], ids=said)
def test_a_source_that_can_be_nobodys_is_dropped(net, trio, source):
    a, b, c = trio
    deliver(a, frame(b, source))
    assert arrived(b, c) == [[], []]
    assert net.switch.counters("a")["rx_drop_bad_source"] == 1
    assert entries(net.switch, ifname="a") == []


def test_a_static_address_stays_where_it_was_put_until_it_is_deleted(net, trio):
    a, b, c = trio
    net.switch.ask("fdb_add", mac=said(STATION), ifname="c")
    deliver(b, frame(BROADCAST, STATION))
    arrived(*trio)
    deliver(a, frame(STATION, a))
    assert arrived(b, c) == [[], [frame(STATION, a)]]
    assert net.switch.ask("fdb_flush")["flushed"] == 1  # a's own
    (entry,) = net.switch.ask("fdb_show")
    assert (entry["mac"], entry["ifname"]) == (said(STATION), "c")
    assert (entry["state"], entry["age_s"]) == ("static", 0)
    net.switch.ask("fdb_del", mac=said(STATION))
    deliver(a, frame(STATION, a))
    assert arrived(b, c) == [[frame(STATION, a)]] * 2
    with pytest.raises(RefusedError, match="not in the table"):
        net.switch.ask("fdb_del", mac=said(STATION))


@pytest.mark.parametrize(
    ("mac", "text"),
    [
        ("52:54:00", "not six hexadecimal bytes"),
        (said(MULTICAST), "a group's"),
        (said(bytes(6)), "a group's or zero"),
    ],
)
def test_addresses_that_no_station_has_are_refused(net, mac, text):
    net.guest("a")
    with pytest.raises(RefusedError, match=text):
        net.switch.ask("fdb_add", mac=mac, ifname="a")
    with pytest.raises(RefusedError, match="no port nobody"):
        net.switch.ask("fdb_add", mac=said(STATION), ifname="nobody")


def test_flushing_one_port_leaves_the_others(net, trio):
    for guest in trio:
        deliver(guest, frame(BROADCAST, guest))
    assert net.switch.ask("fdb_flush", ifname="b") == {"flushed": 1}
    assert [e["ifname"] for e in net.switch.ask("fdb_show")] in (["a", "c"], ["c", "a"])
    assert net.switch.ask("fdb_flush") == {"flushed": 2}
    assert net.switch.ask("fdb_show") == []


def test_a_station_that_moves_is_followed_and_counted(net, trio):
    a, b, c = trio
    deliver(a, frame(BROADCAST, STATION))
    deliver(b, frame(BROADCAST, STATION))
    arrived(*trio)
    deliver(c, frame(STATION, c))
    assert arrived(a, b) == [[], [frame(STATION, c)]]
    assert entries(net.switch, mac=said(STATION))[0]["ifname"] == "b"
    assert net.switch.counters("b")["fdb_moved"] == 1


def test_the_addresses_behind_a_port_go_with_its_guest(net, trio):
    a, b, c = trio
    for number in range(5):
        deliver(b, frame(BROADCAST, station(number)))
    assert len(entries(net.switch, ifname="b")) == 5
    b.disconnect()
    net.switch.wait_for_state("b", "waiting-for-frontend")
    net.switch.wait_for(
        lambda: not entries(net.switch, ifname="b"), "b's addresses to go"
    )
    deliver(a, frame(station(1), a))
    assert arrived(c)[0][-1] == frame(station(1), a)


def test_an_address_that_is_silent_for_the_ageing_time_is_forgotten(own_net):
    net = own_net("--ageing", 1)
    a, b, c = (net.guest(name) for name in "abc")
    deliver(b, frame(BROADCAST, b))
    net.switch.wait_for(
        lambda: not entries(net.switch, mac=b.mac_text), "b's address to age"
    )
    arrived(a, c)
    deliver(a, frame(b, a))
    assert arrived(b, c) == [[frame(b, a)]] * 2
    net.switch.wait_for(
        lambda: net.switch.counters("b")["fdb_expired"] == 1, "b's entry to be cleared"
    )


def test_a_guest_that_invents_addresses_pushes_out_only_its_own(net):
    a = net.guest("a", port={"max_addresses": 50}, **RECEIVER)
    b, c = net.guest("b"), net.guest("c")
    deliver(b, frame(BROADCAST, b))
    deliver(c, frame(BROADCAST, c))
    for begin in range(0, 20_000, 500):
        deliver(a, *(frame(b, station(n)) for n in range(begin, begin + 500)))
        b.receive(timeout=0)
    known = entries(net.switch)
    assert len([e for e in known if e["ifname"] == "a"]) <= 50
    assert {(b.mac_text, "b"), (c.mac_text, "c")} <= {
        (e["mac"], e["ifname"]) for e in known
    }
    counters = net.switch.counters("a")
    assert counters["fdb_refused"] + counters["fdb_evicted"] == 20_000 - 50
    assert counters["rx_flooded"] == 0
    flooded = net.switch.counters("c")["tx_frames"]
    arrived(a, b, c)
    assert_flows(b, c)
    assert net.switch.counters("c")["tx_frames"] == flooded + 8


def test_random_traffic_never_comes_back_and_never_comes_twice(net, trio):
    dice = random.Random(5)
    addresses = [*(guest.mac for guest in trio), STATION, BROADCAST, MULTICAST]
    sent = {guest: set() for guest in trio}
    seen = {guest: [] for guest in trio}
    for number in range(300):
        sender = dice.choice(trio)
        to = dice.choice(addresses)
        one = frame(to, sender, 60 + number % 1000, number) + number.to_bytes(4, "big")
        deliver(sender, one)
        sent[sender].add(one)
        for guest, frames in zip(trio, arrived(*trio), strict=True):
            seen[guest] += frames
    for guest in trio:
        others = set().union(*(sent[other] for other in trio if other is not guest))
        assert len(seen[guest]) == len(set(seen[guest]))
        assert set(seen[guest]) <= others
        groups = {one for one in others if one[0] & 1 or one[:6] == STATION}
        mine = {one for one in others if one[:6] == guest.mac}
        assert groups | mine <= set(seen[guest])
