"""Two real guests: QEMU's front-end and Linux's driver against the whole switch."""

import os
import re
import signal

import pytest

from tests.vm.checks import (
    assert_moves_a_file,
    assert_moves_a_file_to_the_host,
    assert_pings,
)
from vswitch.demo.qemu import QemuGuest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

PING = re.compile(r"(\d+) packets transmitted, (\d+) packets received")


def count_answers(guest):
    """Of the ping in the guest's background."""
    return int(guest.run("grep -c 'bytes from' /tmp/ping").output)


@pytest.fixture
def pair(lab):
    return lab.boot(lab.machine(1), lab.machine(2))


def test_guests_ping_and_move_a_file_over_tcp_unharmed(lab, pair):
    one, two = pair
    assert_pings(one, "10.77.0.2")
    assert_moves_a_file(two, one)
    learned = {(e["mac"], e["ifname"]) for e in lab.ask("fdb_show")}
    assert {(f"52:54:00:00:00:0{n}", f"vm{n}") for n in (1, 2)} <= learned
    lab.assert_ledger_balances()


def test_guests_talk_again_after_a_reset(lab, pair):
    one, two = pair
    one.reset()
    one.wait_ready()
    assert_pings(one, "10.77.0.2")
    two.reset()
    two.wait_ready()
    assert_pings(one, "10.77.0.2")
    lab.assert_ledger_balances()


def test_guests_talk_again_after_a_pause_and_a_pulled_cable(lab, pair):
    one, two = pair
    assert_pings(one, "10.77.0.2")
    one.pause()
    one.resume()
    assert_pings(one, "10.77.0.2")
    two.set_link(up=False)
    two.set_link(up=True)
    assert_pings(two, "10.77.0.1")


def test_a_port_serves_the_next_qemu_when_one_is_killed(lab, pair):
    one, two = pair
    assert_pings(one, "10.77.0.2")
    two.kill()
    lab.wait_for_state("vm2", "waiting-for-frontend")
    (again,) = lab.boot(two.machine)
    assert_pings(again, "10.77.0.1")
    assert_pings(one, "10.77.0.2")


def test_a_guest_talks_to_the_host_through_a_tap(uplink_lab, namespace):
    uplink_lab.add_port("uplink0", "tap:uplink0")
    namespace.run("ip", "address", "add", "10.77.0.254/24", "dev", "uplink0")
    (guest,) = uplink_lab.boot(uplink_lab.machine(1))
    assert_pings(guest, "10.77.0.254")
    assert_moves_a_file_to_the_host(guest, namespace)
    uplink_lab.assert_ledger_balances()


def test_memory_that_is_not_shared_is_named_as_the_reason(lab):
    lab.boot(lab.machine(1, shared=False))
    port = lab.wait_for_port("vm1", lambda port: "share=on" in port["reason"])
    assert "-object memory-backend-memfd" in port["reason"]
    assert "-machine memory-backend=" in port["reason"]
    lab.wait_for_log(port["reason"])


def test_a_guest_with_two_queue_pairs_uses_both(lab):
    one, two = lab.boot(lab.machine(1, queues=2), lab.machine(2))
    channels = "/sys/class/net/eth0/queues"
    assert one.check(f"ls -d {channels}/tx-*").split() == [
        f"{channels}/tx-0",
        f"{channels}/tx-1",
    ]
    for cpu in ("1", "2"):  # a mask: Linux sends on the processor's own queue
        one.check(f"taskset {cpu} ping -c 3 -i 0.2 10.77.0.2")
    assert_pings(two, "10.77.0.1")
    assert lab.port("vm1")["queues"]["enabled"] == 2


def test_qemu_may_listen_and_the_switch_connect(lab):
    one, _ = lab.boot(lab.machine(1), lab.machine(2, server=True))
    assert_pings(one, "10.77.0.2")


def test_guests_talk_again_after_the_driver_was_unbound_and_reloaded(lab, pair):
    one, two = pair
    assert_pings(one, "10.77.0.2")
    driver = "/sys/bus/virtio/drivers/virtio_net"
    one.check(f"dev=$(basename {driver}/virtio*)")
    for stop, start in (
        (f"echo $dev > {driver}/unbind", f"echo $dev > {driver}/bind"),
        ("rmmod virtio_net", "insmod /modules/virtio_net.ko"),
    ):
        one.check(stop)
        lab.wait_for_port("vm1", lambda port: port["state"] != "up")
        one.check(start)
        one.check(f"ip address add {one.machine.address} dev eth0")
        one.check("ip link set eth0 up")
        assert_pings(one, "10.77.0.2")
        assert_pings(two, "10.77.0.1")
    lab.assert_ledger_balances()


def test_guests_talk_again_after_a_reboot_from_inside(lab, pair):
    one, two = pair
    one.check("(sleep 0.5; reboot -f) &")
    one.wait_ready()
    assert_pings(one, "10.77.0.2")
    assert_pings(two, "10.77.0.1")
    lab.assert_ledger_balances()


def test_guests_exchange_jumbo_frames(pair):
    one, two = pair
    for guest in pair:
        guest.check("ip link set eth0 mtu 9000")
    assert_pings(one, "10.77.0.2", size=8000)
    assert_pings(two, "10.77.0.1", size=8972)


def test_guests_do_not_notice_that_a_worker_or_the_manager_is_killed(lab, pair):
    watched = "cat /sys/class/net/eth0/carrier_changes /sys/class/net/eth0/carrier"
    # Linux says that a link becomes ready, and when it likes, if it had to wait for it.
    log = "dmesg | grep -E 'eth0|virtio' | grep -v 'becomes ready' || true"
    for guest in pair:
        lab.wait_for(
            lambda guest=guest: guest.check(watched).split()[1] == "1", "a carrier"
        )
    before = [(guest.check(watched), guest.check(log)) for guest in pair]
    since = [lab.port(guest.machine.name)["since"] for guest in pair]
    pairs = list(zip(pair, ("10.77.0.2", "10.77.0.1"), strict=True))
    for guest, address in pairs:
        guest.check(f"ping -i 0.1 {address} > /tmp/ping & echo $! > /tmp/pid")
    for _ in range(3):
        lab.wait_for_workers(1, 1)
        (worker,) = lab.workers("active")
        answers = [count_answers(guest) for guest in pair]
        os.kill(worker["pid"], signal.SIGKILL)
        lab.wait_for(lambda pid=worker["pid"]: pid not in lab.worker_pids(), "an heir")
        for guest, seen in zip(pair, answers, strict=True):
            lab.wait_for(
                lambda guest=guest, seen=seen: count_answers(guest) > seen + 3,
                "answers with another worker",
            )
    assert [lab.port(guest.machine.name)["since"] for guest in pair] == since
    for step in (lambda: lab.end(signal.SIGKILL), lab.start):  # the manager
        answers = [count_answers(guest) for guest in pair]
        step()
        for guest, seen in zip(pair, answers, strict=True):
            lab.wait_for(
                lambda guest=guest, seen=seen: count_answers(guest) > seen + 3,
                "answers without a manager, or with another",
            )
    for guest, _ in pairs:
        said = guest.check(
            "kill -INT $(cat /tmp/pid); wait $(cat /tmp/pid); cat /tmp/ping"
        )
        sent, received = map(int, PING.search(said).groups())
        assert sent - received <= 3, said  # those that a dead worker had in hand
    assert [(guest.check(watched), guest.check(log)) for guest in pair] == before
    lab.assert_ledger_balances()
    pair[0].reset()
    pair[0].wait_ready()
    assert_pings(pair[0], "10.77.0.2")


@pytest.mark.parametrize("server", [False, True], ids=["connects", "listens"])
def test_a_guest_may_be_started_before_its_port_is_added(
    lab, guest_image, short_path, server
):
    machine = lab.machine(1, server=server)
    with QemuGuest(guest_image, machine, short_path) as one:
        if server:
            lab.wait_for(machine.socket_path.exists, "a QEMU that listens")
        else:
            tried = "Unable to connect"
            lab.wait_for(lambda: tried in one.qemu_log.read_text(), "a QEMU that tries")
        lab.add_port("vm1", mode="client" if server else "server")
        one.wait_ready()
        (two,) = lab.boot(lab.machine(2))
        assert_pings(two, "10.77.0.1")
