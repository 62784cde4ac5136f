"""Two real guests: QEMU's front-end and Linux's driver against the whole switch."""

import sys

import pytest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

BLOB = "dd if=/dev/urandom of=/www/blob bs=1M count=8 && httpd -h /www"
FETCH = """
import hashlib, sys, urllib.request
with urllib.request.urlopen(sys.argv[1], timeout=30) as answer:
    print(hashlib.file_digest(answer, "sha256").hexdigest())
"""


def digest(guest, path):
    return guest.check(f"sha256sum {path}").split()[0]


def assert_pings(guest, address, count=3):
    output = guest.check(f"ping -c {count} -i 0.2 -W 5 {address}")
    assert f"{count} packets received" in output


@pytest.fixture
def pair(lab):
    return lab.boot(lab.machine(1), lab.machine(2))


def test_guests_ping_and_move_a_file_over_tcp_unharmed(lab, pair):
    one, two = pair
    assert_pings(one, "10.77.0.2")
    two.check(BLOB)
    one.check("wget -q -O /tmp/blob http://10.77.0.2/blob")
    assert digest(one, "/tmp/blob") == digest(two, "/www/blob")
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
    guest.check(BLOB)
    fetched = namespace.run(sys.executable, "-c", FETCH, "http://10.77.0.1/blob")
    assert fetched.strip() == digest(guest, "/www/blob")
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
