"""Logs of written pages, announcements, the MTU, and a machine's life. 71 to 77."""

import itertools
import os

import pytest

from ports.vhost.messages import U64, Log, Request, encode_request
from tests.conformance import dirty
from tests.conformance.dirty import (
    PAGE,
    Copier,
    highest,
    rings_by_hand,
    rings_of,
)
from tests.conformance.hand import PROTOCOL_FEATURES
from tests.conformance.wire import REFUSED, ask, is_cut_off, number
from tests.datapath.packed_rings import DEFAULT as PACKED
from tests.system.net import (
    BROADCAST,
    Stream,
    footprint,
    frame,
    guest_mappings,
)
from tests.vm.checks import assert_moves_a_file, assert_pings
from tests.vm.netboot import boot_server
from vswitch.guest import GuestError

STATION = b"\x02\x00\x00\x00\x00\x0a"
RARP = b"\x80\x35"


def known(net, **options):
    """A guest by hand at STATION, so that frames to it are nobody else's."""
    guest = net.by_hand("a", **options)
    net.switch.ask("fdb_add", mac=STATION.hex(":"), ifname="a")
    return guest


def receive(net, guest, length=100):
    """Let a guest by hand receive one frame; the chain that came back."""
    sender = net.witnesses[0]
    sender.send_all(frame(STATION, sender, length))
    (back,) = guest.rx.wait_back()
    sender.wait_sent()  # what is logged is logged by then
    return back


def pages_of(guest, *places):
    """Numbers of the pages of (offset, length) in a guest by hand."""
    gpa = guest.table.regions[0].gpa
    return sorted(
        {
            page
            for offset, length in places
            for page in range(
                (gpa + offset) // PAGE, (gpa + offset + length - 1) // PAGE + 1
            )
        }
    )


def is_mapped(net, fd):
    inode = str(os.fstat(fd).st_ino)
    return [
        pid
        for pid in (net.switch.pid, *net.switch.worker_pids())
        if any(row[3] == inode for row in guest_mappings(pid))
    ]


def test_71_another_log_takes_over_when_it_is_answered(net, make_log):
    """[QEMU][RVMM][CH]"""
    guest = known(net)
    before = footprint(net.switch)
    logs = [make_log(highest(guest.table), offset=PAGE * n) for n in range(1, 6)]
    dirty.begin(guest.frontend, logs[0], rings_by_hand(guest))
    for old, new in itertools.pairwise(logs):
        guest.post(1)
        receive(net, guest)
        assert old.fetch()
        answer = ask(
            guest.frontend, Request.SET_LOG_BASE, new.payload.encode(), [new.fd]
        )
        assert answer == new.payload.encode()
        assert is_mapped(net, old.fd) == []
        assert is_mapped(net, new.fd) == net.switch.worker_pids()
        old.fetch()  # what was written between
        guest.post(1)
        receive(net, guest)
        assert old.fetch() == []
        assert new.fetch()
    dirty.end(guest.frontend, rings_by_hand(guest))
    assert is_mapped(net, logs[-1].fd) == []
    assert footprint(net.switch) == before
    for log in logs:
        log.assert_guards()


def test_72_no_page_that_was_written_is_missed(net, make_log):
    """While the front-end fetches and clears. [SPEC]"""
    guest = known(net)
    log = make_log(highest(guest.table))
    dirty.begin(guest.frontend, log, rings_by_hand(guest))
    net.drain()
    log.fetch()
    guest.post(1, base=0x50F00)  # a buffer across two pages
    receive(net, guest, 1000)
    wanted = {*pages_of(guest, (guest.rx.used, 4), (0x50F00, 1012))}
    # The other ring has a word that says whether to kick.
    assert wanted <= {*log.fetch()} <= wanted | {*pages_of(guest, (guest.tx.used, 4))}
    guest.send(frame(STATION, STATION))
    guest.tx.wait_back()
    net.switch.wait_for(
        lambda: log.fetch() == pages_of(guest, (guest.tx.used, 4)), "the used ring"
    )
    a, b = net.guest("b"), net.guest("c", rx_buffer_len=1000, regions=2)
    memory = b.memory
    log = make_log(highest(memory.table))
    offsets = {
        memory.gpa_of(offset) // PAGE: offset for offset in range(0, memory.size, PAGE)
    }
    dirty.begin(b.frontend, log, rings_of(b))
    with Copier(log, memory.bytes, offsets.__getitem__) as copier:
        with Stream((a, b), (b, a), raw=False, verify=True, length=(60, 1514)) as flow:
            flow.wait_for_more(net.switch, 5_000)
            net.switch.wait_for(lambda: copier.rounds > 10, "copies while pages change")
            flow.stop()
        b.stop()
    for ring, layout in zip(b.rings, b.layouts, strict=True):
        used = int(ring["used"]) - memory.addr
        areas = [(used, 6 + 8 * layout.plan.size)]
        if ring is b.rings[0] or layout is b.layouts[0]:
            buffers = int(ring["buffers"]) - memory.addr
            areas.append((buffers, layout.buffers.size))
        for at, length in areas:
            assert (
                copier.shadow[at : at + length] == memory.bytes[at : at + length]
            ).all()


def test_73_a_packed_ring_is_logged_by_its_own_address(net, make_log):
    """Though front-ends give that of the device's event area. [M]"""
    guest = known(net, packed=True, features=PACKED | PROTOCOL_FEATURES, size=16)
    log = make_log(highest(guest.table))
    dirty.begin(guest.frontend, log, rings_by_hand(guest))
    log.fetch()
    for slot in [*range(16)] * 3:  # around the ring
        offset = 0x50000 + 0x1000 * slot
        guest.rx.offer(slot, (guest.put(offset, b"\0"), 2048, 2))
        receive(net, guest)
        wanted = {*pages_of(guest, (guest.rx.desc, 256), (offset, 112))}
        events = {*pages_of(guest, (guest.rx.device, 4), (guest.tx.device, 4))}
        assert not wanted & events
        assert wanted <= {*log.fetch()} <= wanted | events
    guest.send(frame(STATION, STATION))
    guest.tx.wait_back()
    wanted = set(pages_of(guest, (guest.tx.desc, 256)))
    net.switch.wait_for(lambda: wanted <= set(log.fetch()), "the transmit ring")


def bad_logs(log):
    size, offset = log.size, log.offset
    return {
        "no bytes": (Log(0, 0), 1),
        "a byte too few": (Log(size - 8, offset), 1),
        "larger than its file": (Log(size + 2 * PAGE, offset), 1),
        "behind the end": (Log(size, offset + 2 * PAGE), 1),
        "the end wraps": (Log(size, (1 << 64) - PAGE), 1),
        "everything": (Log((1 << 64) - 1, 1), 1),
        "no descriptor": (log.payload, 0),
        "two descriptors": (log.payload, 2),
    }


def test_74_a_log_that_is_too_small_is_refused_and_none_is_overrun(net, make_log):
    """[CVE-2020-10722]"""
    guest = net.prepared_by_hand("a")
    net.switch.ask("fdb_add", mac=STATION.hex(":"), ifname="a")
    log = make_log(highest(guest.table))
    for payload, count in bad_logs(log).values():
        guest.open()
        data = encode_request(Request.SET_LOG_BASE, payload)
        assert is_cut_off(guest.frontend, data, [log.fd] * count)
        guest.hang_up()
        net.switch.wait_for_state("a", "waiting-for-frontend")
    # A log from before there was more memory, and ring parts logged far outside.
    small = make_log(1 << 20)
    guest.connect().negotiate(guest.features)
    dirty.begin(guest.frontend, small, [])
    guest.tell_memory()
    guest.start()
    for address in (0, 1 << 32, 1 << 63, (1 << 64) - 1):
        rings = [(setup, address) for setup, _ in rings_by_hand(guest)]
        dirty.log_rings(guest.frontend, rings, on=True)
        guest.post(4)
        for _ in range(4):
            receive(net, guest)
    small.assert_guards()


def rarp(mac):
    """What stands for a guest that has just arrived, RFC 903."""
    body = b"\0\1\x08\0\6\4\0\3" + mac + bytes(4) + mac + bytes(4)
    return (BROADCAST + mac + RARP + body).ljust(60, b"\0")


def test_75_a_guest_that_arrives_is_announced_before_its_rings_run(net):
    """[M]"""
    guest = net.prepared_by_hand("a")
    frontend = guest.connect()
    for _ in range(5):
        frontend.request(Request.SEND_RARP, U64(int.from_bytes(STATION, "little")))
    frontend.barrier()
    (entry,) = (e for e in net.switch.ask("fdb_show") if e["mac"] == STATION.hex(":"))
    assert (entry["ifname"], entry["state"]) == ("a", "learned")
    for witness in net.witnesses:
        heard = witness.receive(timeout=10.0, at_least=5)
        assert [one.ljust(60, b"\0") for one in heard] == [rarp(STATION)] * 5
    frontend.negotiate(guest.features)
    guest.tell_memory()
    guest.start()
    net.switch.wait_for_state("a", "up")
    guest.post(1)
    receive(net, guest)
    assert net.witnesses[1].receive(timeout=0) == []  # it is known where it is


def test_76_an_mtu_that_cannot_be_is_refused(net):
    """[DPDK]"""
    guest = net.by_hand("a")
    for mtu in (0, 67, 65536, 1 << 63):
        with pytest.raises(GuestError, match=REFUSED):
            guest.frontend.request(Request.NET_SET_MTU, U64(mtu))
    for mtu in (68, 1500, 9000, 65535):
        assert ask(guest.frontend, Request.NET_SET_MTU, number(mtu)) == number(0)


def boot_by_network(lab, guest, start):
    """iPXE's features, then Linux's."""
    start()
    lab.wait_for_port(
        "vm1", lambda port: port["features"] == ["protocol_features", "version_1"]
    )
    guest.wait_ready(timeout=120)
    assert "mrg_rxbuf" in lab.port("vm1")["features"]


@pytest.mark.vm
@pytest.mark.timeout(600)
def test_77_a_real_guests_life(uplink_lab, namespace, guest_image):
    """iPXE, Linux, reboot, stop, link, DIMM, migration, unplug: traffic after each. [M]"""
    lab = uplink_lab
    (two,) = lab.boot(lab.machine(2))
    machine = lab.machine(1, from_network=True, halted=True, slots=2)

    def talk():
        assert_pings(one, "10.77.0.2")
        assert_pings(two, "10.77.0.1")
        assert_moves_a_file(two, one)

    with boot_server(lab, namespace, guest_image, machine, two):
        (one,) = lab.boot(machine, wait=False)
        boot_by_network(lab, one, one.resume)
        talk()
        boot_by_network(lab, one, one.reset)
        talk()
    one.pause()
    lab.wait_for_state("vm1", "waiting-for-driver")
    one.resume()
    talk()
    one.set_link(up=False)
    lab.wait_for_state("vm1", "waiting-for-driver")
    one.set_link(up=True)
    talk()
    one.plug_memory("dimm0", 128)
    talk()
    elsewhere = machine._replace(name="vm1b", socket_path=lab.socket("vm1b"))
    there = elsewhere._replace(halted=False, incoming=True)
    (target,) = lab.boot(there, wait=False)
    target.plug_memory("dimm0", 128)
    one.begin_move(target, lab.directory / "move", bytes_per_s=1 << 20)
    assert "log_all" in lab.port("vm1")["features"]
    talk()
    one.cancel_move()
    lab.wait_for_port("vm1", lambda port: "log_all" not in port["features"])
    talk()
    one.unplug_device()
    lab.wait_for_state("vm1", "waiting-for-driver")
    lab.plug(one)
    talk()
    assert lab.log.count("port vm1: connected") == 1
    lab.assert_ledger_balances()
