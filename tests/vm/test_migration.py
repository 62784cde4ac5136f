"""A real guest moves while it talks: from port to port, from switch to switch.

Both QEMUs have its memory in one file: QEMU 7.2's interpreter (TCG) loses pages of a
running guest when it copies them, with or without a network. That the switch logs every
page that it writes is shown in tests/system/test_migration.py.
"""

import re
from itertools import pairwise

import pytest

from tests.switch import wait_for
from tests.vm.checks import assert_moves_a_file, assert_pings, digest, serve_blob
from tests.vm.lab import Lab

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

PING_S = 0.1
ANSWER = re.compile(r"bytes from .* seq=(\d+)")
# From the guest's last breath here to the first frame there, beside the pause itself:
# QEMU starts the device, the guest announces itself.
GRACE_S = 1.0
_PULL = (
    "(n=0; while [ -e /tmp/go ]; do wget -q -O /tmp/blob http://{0}/blob && "
    "[ $(sha256sum /tmp/blob | cut -c1-64) = {1} ] && n=$((n+1)) || touch /tmp/bad; "
    "done; echo $n > /tmp/pulled) >/dev/null 2>&1 &"
)


def begin_talking(mover, peer):
    """The peer pings the mover, which fetches a file again and again and checks it."""
    serve_blob(peer)
    sum_ = digest(peer, "/www/blob")
    mover.check(f"touch /tmp/go; {_PULL.format('10.77.0.2', sum_)}")
    peer.check(f"ping -i {PING_S} 10.77.0.1 > /tmp/ping & echo $! > /tmp/pinger")
    wait_for(lambda: answered(peer), "an answer to the ping")


def answered(peer):
    """Sequence numbers of the pings that were answered."""
    return [int(seq) for seq in ANSWER.findall(peer.check("cat /tmp/ping"))]


def end_talking(mover, peer):
    """The longest time without an answer to the ping, seconds; every file was whole."""
    now = len(answered(peer))
    wait_for(lambda: len(answered(peer)) > now + 5, "answers to the ping")
    peer.check("kill $(cat /tmp/pinger)")
    answers = answered(peer)
    lost = max(after - before - 1 for before, after in pairwise(answers))
    mover.check("rm /tmp/go; while [ ! -e /tmp/pulled ]; do usleep 50000; done")
    mover.check("[ ! -e /tmp/bad ]")
    assert int(mover.check("cat /tmp/pulled")) > 0
    return lost * PING_S


def move(mover, lab, machine, directory):
    """The guest on its new machine, and how long it stood still."""
    (target,) = lab.boot(machine._replace(incoming=True), wait=False)
    mover.begin_move(target, directory / "move")
    pause_s = mover.end_move(target)
    return target, pause_s


def learned_at(lab, mac):
    return next(e["ifname"] for e in lab.ask("fdb_show") if e["mac"] == mac)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_guest_moves_to_another_port_under_traffic(lab, packed):
    machine = lab.machine(1, packed=packed, memory_file=lab.directory / "memory")
    mover, peer = lab.boot(machine, lab.machine(2))
    elsewhere = machine._replace(name="vm1b", socket_path=lab.socket("vm1b"))
    begin_talking(mover, peer)
    moved, pause_s = move(mover, lab, elsewhere, lab.directory)
    assert_pings(moved, "10.77.0.2")
    assert learned_at(lab, machine.mac) == "vm1b"
    assert end_talking(moved, peer) <= pause_s + GRACE_S
    assert lab.port("vm1")["state"] == "waiting-for-driver"
    assert_moves_a_file(peer, moved)
    mover.close()
    lab.assert_ledger_balances()


def test_a_guest_stays_when_its_move_is_cancelled(lab):
    machine = lab.machine(1)
    mover, peer = lab.boot(machine, lab.machine(2))
    elsewhere = machine._replace(name="vm1b", socket_path=lab.socket("vm1b"))
    begin_talking(mover, peer)
    (target,) = lab.boot(elsewhere._replace(incoming=True), wait=False)
    mover.begin_move(target, lab.directory / "move", bytes_per_s=1 << 20)
    assert "log_all" in lab.port("vm1")["features"]
    mover.cancel_move()
    lab.wait_for_port("vm1", lambda port: "log_all" not in port["features"])
    assert_pings(peer, "10.77.0.1")
    assert end_talking(mover, peer) <= GRACE_S
    assert learned_at(lab, machine.mac) == "vm1"
    lab.assert_ledger_balances()


def test_a_guest_moves_to_another_switch_under_traffic(
    uplink_lab, namespace, guest_image
):
    here = uplink_lab
    other = here.directory / "other"
    other.mkdir()
    with Lab(other, guest_image, prefix=namespace.prefix) as there:
        namespace.run("ip", "link", "add", "br0", "type", "bridge")
        namespace.run("ip", "link", "set", "br0", "up")
        for lab, name in ((here, "left0"), (there, "right0")):
            lab.add_port(name, f"tap:{name}")
            namespace.run("ip", "link", "set", name, "master", "br0", "up")
        machine = here.machine(1, memory_file=here.directory / "memory")
        mover, peer = here.boot(machine, here.machine(2))
        begin_talking(mover, peer)
        elsewhere = machine._replace(name="vm1b", socket_path=there.socket("vm1b"))
        moved, pause_s = move(mover, there, elsewhere, here.directory)
        assert_pings(moved, "10.77.0.2")
        assert learned_at(here, machine.mac) == "left0"
        assert learned_at(there, machine.mac) == "vm1b"
        assert end_talking(moved, peer) <= pause_s + GRACE_S
        for lab in (here, there):
            lab.assert_ledger_balances()
