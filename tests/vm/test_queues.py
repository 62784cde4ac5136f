"""Several queue pairs, of which the guest uses as many as it likes."""

import re

import pytest

from tests.switch import remove_directory, short_directory
from tests.vm.checks import assert_pings, digest, serve_blob
from tests.vm.lab import Lab

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

PACKETS = re.compile(r"([rt]x)_queue_(\d)_packets: (\d+)")
FETCH = "wget -q -O /tmp/{name} http://{address}/blob"
# One file after the other; each leaves a line in /tmp/rounds.
ROUNDS = "while [ ! -e /tmp/stop ] && {fetch}; do echo >> /tmp/rounds; done"


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def several(guest_image, request):
    """A guest with four pairs and one processor, and a plain one."""
    directory = short_directory()
    with Lab(directory, guest_image, "--workers", request.param) as lab:
        guests = lab.boot(lab.machine(1, queues=4, processors=1), lab.machine(2))
        wait_for_pairs(lab, guests[0], 1)  # Linux asks for no more
        for guest in guests:
            serve_blob(guest)
        yield lab, *guests
    remove_directory(directory)


def use(lab, guest, pairs):
    guest.check(f"ethtool -L eth0 combined {pairs}")
    wait_for_pairs(lab, guest, pairs)


def wait_for_pairs(lab, guest, pairs):
    name = guest.machine.name
    lab.wait_for_port(name, lambda port: port["queues"]["enabled"] == pairs)


def packets(guest):
    """What the driver counted, by direction and queue, of the queues in use."""
    found = PACKETS.findall(guest.check("ethtool -S eth0"))
    return {(way, int(number)): int(count) for way, number, count in found}


def move_files(source, target, flows=4):
    """Fetch 8 MiB several times at once and compare what came."""
    address = source.machine.address.split("/")[0]
    names = [f"blob{number}" for number in range(flows)]
    fetches = (FETCH.format(name=name, address=address) for name in names)
    target.check(" & ".join((*fetches, "wait")))
    for name in names:
        assert digest(target, f"/tmp/{name}") == digest(source, "/www/blob")


def start_rounds(source, target):
    address = source.machine.address.split("/")[0]
    rounds = ROUNDS.format(fetch=FETCH.format(name="blob", address=address))
    target.check(
        f"rm -f /tmp/stop; echo > /tmp/rounds; ({rounds}) & echo $! > /tmp/pid"
    )


def stop_rounds(target):
    target.check("touch /tmp/stop; wait $(cat /tmp/pid)")


def count_rounds(guest):
    return int(guest.check("wc -l < /tmp/rounds"))


def test_a_guest_uses_as_many_pairs_as_it_likes(several):
    lab, guest, plain = several
    use(lab, guest, 4)
    move_files(guest, plain)
    move_files(plain, guest)
    before = packets(guest)
    for way in ("rx", "tx"):
        assert sum(before[way, number] > 0 for number in range(4)) > 1

    use(lab, guest, 1)
    assert_pings(plain, "10.77.0.1")
    move_files(plain, guest, 1)
    use(lab, guest, 4)
    while_disabled = packets(guest)
    assert while_disabled["rx", 0] > before["rx", 0] + 100
    for number in (1, 2, 3):
        assert while_disabled["rx", number] <= before["rx", number] + 10
    lab.assert_ledger_balances()


def test_pairs_come_and_go_under_traffic(several):
    lab, guest, plain = several
    start_rounds(guest, plain)
    start_rounds(plain, guest)
    for pairs in (4, 1, 3, 2, 1):
        use(lab, guest, pairs)
        for one in (guest, plain):
            before = count_rounds(one)
            lab.wait_for(
                lambda one=one, before=before: count_rounds(one) > before + 1,
                f"files with {pairs} pairs",
            )
    stop_rounds(guest)
    stop_rounds(plain)
    lab.assert_ledger_balances()
