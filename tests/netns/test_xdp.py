"""Interfaces as uplinks by AF_XDP: one end of a veth, whose other end is elsewhere."""

import re
from contextlib import contextmanager

import pytest

from ports import bpf, ethtool, xdp_program
from ports.errors import PortError
from ports.xdp_ring import CHUNKS
from tests.netns.checks import (
    TAG,
    assert_every_length_passes,
    assert_passes_both_ways,
    by_flow,
    flows,
    program,
    stopped,
    vswitch,
    wait_for_sleep,
    without,
    worker_frames,
)
from tests.netns.uplink import GUEST_MAC, WIRE_MAC, frame, numbered
from tests.switch import (
    RefusedError,
    dropped,
    wait_for,
)

pytestmark = pytest.mark.netns


@pytest.fixture
def kind():
    return "xdp"


# --- the interface's life ---


def test_it_is_shown_how_frames_come_and_go(bench, switch, far):
    bench.cable("show0", far)
    bench.uplink("xdp", "show0")
    port = switch.port("show0")
    assert port["reason"] == "interface show0 is up (native XDP, copy mode)"
    assert port["features"] == ["native", "copy", "vlan-tags"]
    assert port["queues"] == {"enabled": 1, "max": 1}


def test_an_interface_may_be_renamed(bench, plugged, switch, namespace, far):
    guest, wire = plugged("name0")
    namespace.ip("link set name0 down")
    namespace.ip("link set name0 name name1")
    namespace.ip("link set name1 up")
    switch.wait_for_state("name0", "up")
    assert_passes_both_ways(guest, wire)
    namespace.ip("link set name1 mtu 1400")  # has the keeper look
    wait_for(lambda: switch.port("name0")["state"] == "up", "nothing new")
    assert_passes_both_ways(guest, wire)
    switch.ask("del_port", name="name0")
    assert not program(namespace, "name1")
    namespace.ip("link delete name1")


def test_the_interface_s_mtu_is_followed(plugged, switch, namespace, far):
    guest, wire = plugged("mtu0", tx_buffer_len=16384, rx_buffer_len=16384)
    guest.send_all(frame(WIRE_MAC, GUEST_MAC, 1515))
    wait_for(lambda: switch.counters("mtu0")["tx_drop_too_long"] == 1, "a drop")
    # Each time other chunks are needed; a peer may not have more than we can.
    again = "port mtu0: attached to mtu0 again"
    for changes, mtu in enumerate((3000, 9216, 1500), start=1):
        far.ip("link set mtu0 mtu 1500")
        namespace.ip(f"link set mtu0 mtu {mtu}")
        wait_for(lambda n=changes: switch.log.count(again) == n, "other chunks")
        assert ("fragments" in switch.port("mtu0")["features"]) == (mtu > 4000)
        far.ip(f"link set mtu0 mtu {mtu}")
        lengths = [*range(1200, mtu, 333), *range(mtu, mtu + 15)]
        assert_every_length_passes(guest, wire, lengths)


# --- more queues than one ---


def many_queues(bench, namespace, far, name, rx, tx, far_rx, far_tx):
    here = f"numrxqueues {rx} numtxqueues {tx}"
    there = f"numrxqueues {far_rx} numtxqueues {far_tx}"
    peer = f"name {name} netns {far.pid} {there}"
    bench.interface(name, f"link add {name} {here} type veth peer {peer}")
    for end in (namespace, far):
        end.ip(f"link set {name} up")


def used_queues(namespace, name):
    """How many receive queues the program has seen frames of."""
    said = namespace.run("ethtool", "-S", name)
    counts = re.findall(r"rx_queue_\d+_xdp_packets: (\d+)", said)
    return sum(int(count) > 0 for count in counts)


def test_every_queue_is_served(two_workers, make_bench, namespace, far):
    bench = make_bench(two_workers)
    many_queues(bench, namespace, far, "many0", rx=4, tx=2, far_rx=2, far_tx=4)
    bench.uplink("xdp", "many0")
    assert two_workers.port("many0")["queues"] == {"enabled": 4, "max": 4}
    guest, wire = bench.guest("vm"), bench.wire("many0", far)
    trunk = bench.trunk("many0", far)
    assert_passes_both_ways(guest, wire)
    trunk.receive()
    before = worker_frames(two_workers)
    sent = list(flows(GUEST_MAC, WIRE_MAC, 32, 10))
    for one in sent:
        trunk.send(one)
    came = guest.receive(timeout=10, at_least=320)
    assert by_flow(came) == by_flow(sent)
    assert used_queues(namespace, "many0") == 4
    grown = {n: count - before[n] for n, count in worker_frames(two_workers).items()}
    assert min(grown.values()) > 0
    sent = list(flows(WIRE_MAC, GUEST_MAC, 32, 10))
    guest.send_all(sent)
    assert by_flow([trunk.receive()[1] for _ in sent]) == by_flow(sent)
    assert two_workers.counters("many0")["rx_missed"] == 0


def test_queues_that_come_later_are_served_too(bench, switch, namespace, far):
    many_queues(bench, namespace, far, "many1", rx=2, tx=1, far_rx=1, far_tx=2)
    far.run("ethtool", "-L", "many1", "tx", "1")
    namespace.run("ethtool", "-L", "many1", "rx", "1")
    bench.uplink("xdp", "many1")
    assert switch.port("many1")["queues"]["enabled"] == 1
    namespace.run("ethtool", "-L", "many1", "rx", "2")
    far.run("ethtool", "-L", "many1", "tx", "2")
    switch.wait_for_port("many1", lambda port: port["queues"]["enabled"] == 2)
    switch.wait_for_state("many1", "up")
    guest, trunk = bench.guest("vm"), bench.trunk("many1", far)
    sent = list(flows(b"\xff" * 6, WIRE_MAC, 32, 1))
    for one in sent:
        trunk.send(one)
    assert by_flow(guest.receive(timeout=10, at_least=32)) == by_flow(sent)
    assert used_queues(namespace, "many1") == 2


def test_frames_of_a_queue_that_nobody_serves_are_counted(bench, namespace, far):
    bench.cable("many2", far)
    index = namespace.link("many2")["ifindex"]
    with attached(namespace, "many2", index, xdp_program.NATIVE) as held:
        own, wire = bench.wire("many2", namespace), bench.wire("many2", far)
        for one in numbered(GUEST_MAC, WIRE_MAC, 10):
            wire.send(one)
        wait_for(lambda: held.count_lost() == 10, "10 frames")
        assert held.count_lost() == 0
    wire.send(frame(GUEST_MAC, WIRE_MAC))
    assert own.receive(1) == [frame(GUEST_MAC, WIRE_MAC)]


@contextmanager
def attached(namespace, name, index, mode):
    """Our program on an interface, with no sockets."""
    with namespace.inside():
        held = xdp_program.Program(name, index, fragments=False)
        try:
            held.attach([mode])
        except PortError:
            held.close()
            raise
    try:
        yield held
    finally:
        held.close()


# --- what cannot be used ---


def assert_refused(switch, interface, text):
    with pytest.raises(RefusedError, match=text):
        switch.add_port("odd", f"xdp:{interface}")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        ("", "there is none"),
        ("tuntap add odd0 mode tun", "it is not Ethernet: it carries IP"),
        ("tuntap add odd0 mode tap", r"it is a tun, .*\(use eth:odd0\)"),
        ("link add name odd0 type bridge", r"it is a bridge, .*\(use eth:odd0\)"),
        (
            "link add odd0 numrxqueues 9 type veth peer name odd1",
            r"it has 9 receive queues, .*\(ethtool -L, or use eth:odd0\)",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_and_eth_named(
    bench, switch, namespace, make, text
):
    if make:
        bench.interface("odd0", make)
    assert_refused(switch, "odd0", f"port odd: cannot use interface odd0.*: {text}")


@pytest.mark.parametrize(
    ("set_up", "text"),
    [
        (lambda far: far.ip("link set odd2 mtu 4000"), "ERANGE: its peer's MTU"),
        (lambda far: None, "ENOSPC: it has fewer receive queues"),
    ],
    ids=["mtu", "queues"],
)
def test_what_the_driver_refuses_is_explained(
    bench, switch, namespace, far, set_up, text
):
    far_tx = 2 if "queues" in text else 1
    many_queues(bench, namespace, far, "odd2", rx=1, tx=1, far_rx=1, far_tx=far_tx)
    set_up(far)
    assert_refused(
        switch, "odd2", f"cannot attach to interface odd2: {text}.*use eth:odd2"
    )
    assert namespace.link("odd2")["promiscuity"] == 0


def test_a_choice_of_queues_is_refused(bench, switch, far):
    bench.cable("odd4", far)
    text = r"cannot choose the queues of xdp:odd4: .* \(ethtool -L odd4 combined N\)"
    with pytest.raises(RefusedError, match=text):
        switch.add_port("odd", "xdp:odd4", queues=1)


def test_an_interface_that_another_program_has_is_refused(
    start, bench, switch, namespace, far
):
    bench.cable("taken0", far)
    start().add_port("theirs", "xdp:taken0")
    text = "cannot attach to interface taken0: EBUSY: another program is attached to it"
    assert_refused(switch, "taken0", text)
    assert program(namespace, "taken0")


@pytest.mark.parametrize(
    "lacking", ["net_raw", "net_admin,-sys_admin", "bpf,-sys_admin"]
)
def test_without_a_right_it_is_named(start, bench, namespace, far, lacking):
    bench.cable("right0", far)
    switch = start(prefix=without(lacking))
    name = f"CAP_{lacking.split(',')[0].upper()}"
    text = f"cannot attach to interface right0: EPERM: we have no {name} "
    assert_refused(switch, "right0", text)
    assert not program(namespace, "right0")
    assert namespace.link("right0")["promiscuity"] == 0


def test_these_rights_are_enough(start, make_bench, far):
    only = "-all,+net_raw,+net_admin,+bpf,+setpcap"
    keep = ("setpriv", f"--bounding-set={only}", f"--inh-caps={only}")
    bench = make_bench(start(prefix=keep))
    bench.cable("right1", far)
    bench.uplink("xdp", "right1")
    assert_passes_both_ways(bench.guest("vm"), bench.wire("right1", far))


def test_addresses_are_warned_of(bench, switch, namespace, far):
    bench.cable("addr0", far)
    namespace.ip("address add 10.78.0.254/24 dev addr0")
    said = vswitch(switch, namespace, "add-port", "xdp:addr0")
    assert said.startswith(
        "warning: interface addr0 has 10.78.0.254/24, where nobody can reach this"
        " machine (move to a tap port: vswitch add-port tap:addr0-host; "
    )
    switch.ask("del_port", name="addr0")


# --- frames ---


def test_tags_pass_wherever_they_are(bench, plugged, switch, far):
    """A bridge takes tags out of what comes in and sends them beside the frame."""
    guest, _ = plugged("vlan0")
    far.ip("link add vlanbr type bridge mcast_snooping 0")
    far.ip("link add vlanin type veth peer name vlanout")
    try:
        for command in ("vlan0 master", "vlanout master"):
            far.ip(f"link set {command} vlanbr")
        for name in ("vlanbr", "vlanin", "vlanout"):
            far.ip(f"link set {name} up")
        trunk = bench.trunk("vlanin", far)
        assert_passes_both_ways(guest, bench.wire("vlanin", far))
        trunk.receive()
        for length in (16, 60, 1506):
            plain = frame(WIRE_MAC, GUEST_MAC, length)
            for tpid, tci in ((0x8100, 0xE000), (0x8100, 0xA123), (0x88A8, 0x0FFE)):
                put_in = tpid.to_bytes(2, "big") + tci.to_bytes(2, "big")
                for inner in (plain, plain[:12] + TAG + plain[12:]):
                    guest.send_all(inner[:12] + put_in + inner[12:])
                    assert trunk.receive()[1:] == (inner, (tpid, tci))
                    back = GUEST_MAC + WIRE_MAC + put_in + inner[12:]
                    trunk.send(back)
                    assert guest.receive(timeout=10) == [back]
    finally:
        for name in ("vlanin", "vlanbr"):
            far.ip(f"link delete {name}")
    assert switch.counters("vlan0")["rx_missed"] == 0


def test_what_finds_no_chunk_is_counted(plugged, switch):
    guest, wire = plugged("full0")
    assert_passes_both_ways(guest, wire)
    worker = wait_for_sleep(switch)
    with stopped(switch.pid, worker["pid"]):
        for one in numbered(GUEST_MAC, WIRE_MAC, CHUNKS + 100):
            wire.send(one)
    wait_for(lambda: switch.counters("full0")["rx_missed"] == 100, "what is missing")
    assert switch.counters("full0")["rx_frames"] == CHUNKS + 1
    room = CHUNKS - dropped(switch.counters("vm"), "tx")
    arrived = guest.receive(timeout=10, at_least=room, max_frames=CHUNKS)
    assert arrived == numbered(GUEST_MAC, WIRE_MAC, room)
    assert_passes_both_ways(guest, wire)


def test_what_the_device_refuses_is_counted(plugged, switch, far):
    """Here before the manager has heard that there is no carrier."""
    guest, wire = plugged("full1")
    assert_passes_both_ways(guest, wire)
    with stopped(switch.pid):
        far.ip("link set full1 down")
        guest.send_all(numbered(WIRE_MAC, GUEST_MAC, 100))
        guest.wait_sent()
    counted = switch.counters("full1")
    assert (counted["tx_frames"], counted["tx_drop_ring_full"]) == (1, 100)


# --- kernels that know less, drivers that do more ---


def test_a_kernel_without_the_function_loads_the_program_without(
    namespace, far, bench, monkeypatch
):
    bench.cable("old1", far)
    index = namespace.link("old1")["ifindex"]
    with attached(namespace, "old1", index, xdp_program.NATIVE) as held:
        assert held.has_tags
    monkeypatch.setattr(xdp_program, "function_for_tags", lambda: 0)
    for mode in (xdp_program.NATIVE, xdp_program.GENERIC):
        with attached(namespace, "old1", index, mode) as held:
            assert (held.mode, held.has_tags) == (mode, False)
    assert bpf.function_id("no_kernel_has_this") == 0


def test_what_a_driver_does_is_switched_off_and_on_again(namespace, far, bench):
    bench.cable("old2", far)
    index = namespace.link("old2")["ifindex"]
    with namespace.inside():
        for setting in (ethtool.RX_VLAN, ethtool.GRO):
            ethtool.switch_on(index, setting)
            assert ethtool.switch_off(index, setting)
            assert not ethtool.switch_off(index, setting)
        ethtool.switch_on(index, ethtool.GRO)
        sets_checksums = ethtool.GRO._replace(set=0x15)
        for setting, found in (
            (ethtool.GRO._replace(set=0x7FFF), "E(OP)?NOTSUPP?"),
            (sets_checksums, "it stays on"),
        ):
            text = rf"cannot switch gro of old2 off: {found} \(use eth:old2\)"
            with pytest.raises(PortError, match=text):
                ethtool.switch_off(index, setting)
