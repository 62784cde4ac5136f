"""`vswitch upgrade`: the manager and its workers go on by other code, under traffic.

Other code is told by its digest, which takes in variables that begin with NUMBA_. So these
tests need not compile anything: what is compiled of one digest is linked to the other.
"""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import ports
import vswitch
from ports import cache
from tests.switch import Switch, wait_for
from tests.system.net import Net, Stream, exchange_both_ways
from tests.system.shell import FAILED, NO_MANAGER

AGAIN = 75
ASK = "from ports import cache; print(cache.cache_dir())"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def other_code(shell, monkeypatch):
    """Have commands be of another digest from the call on."""
    links = []

    def change():
        monkeypatch.setenv("NUMBA_OF_ANOTHER_DIGEST", str(len(links)))
        assert cache.is_warm()  # by the switch that has been started
        said = subprocess.run([sys.executable, "-c", ASK], check=True, stdout=-1)
        links.append(Path(said.stdout.decode().strip()))
        links[-1].symlink_to(cache.cache_dir())

    yield change
    shell.run("down")
    for link in links:
        link.unlink()


@pytest.fixture
def net(shell):
    """Ports and guests on the switch that the shell started."""
    switch = Switch(shell.directory)  # to ask it
    it = Net(switch)
    yield it
    for guest in it.guests:
        guest.close()


def pids(shell):
    return {worker["pid"] for worker in shell.json("show")["workers"]}


def test_guests_stay_and_no_frame_is_lost_uncounted(shell, net, other_code):
    shell.ok("up")
    a, b = net.pair({"packed": True})
    exchange_both_ways(a, b)
    net.switch.wait_for_workers(1, 1)
    before = pids(shell)
    other_code()
    with Stream((a, b)) as flow:
        flow.wait_for_more(net.switch)
        manager, spare, worker = shell.ok("upgrade").splitlines()
        flow.wait_for_more(net.switch)
        totals = flow.stop()
    assert manager.startswith(f"manager: version {vswitch.__version__} to ")
    assert "replaced; it was a spare" in spare
    assert "replaced by worker" in worker
    assert worker.endswith(" ms without one")
    assert not before & pids(shell)
    assert (totals.reordered, totals.duplicates, totals.corrupt) == (0, 0, 0)
    lost = net.switch.counters("b")["tx_drop_not_ready"]
    assert totals.sent - totals.received == lost
    for guest in (a, b):
        guest.wait_ready()  # on the connection that it always had
    exchange_both_ways(a, b)
    said = f"nothing to do: all of it is of this code, version {vswitch.__version__}\n"
    assert shell.ok("upgrade") == said
    net.switch.wait_for_workers(1, 1)


def test_workers_that_a_new_manager_has_adopted_are_replaced(shell, net, other_code):
    shell.ok("up", "--spares", "0")
    a, b = net.pair()
    (before,) = pids(shell)
    other_code()
    shell.kill_manager()
    shell.ok("up")
    assert pids(shell) == {before}
    said = shell.json("upgrade")
    assert said["manager"] is None
    (renewed,) = said["workers"]
    assert renewed["worker"] == 0
    assert 0 < renewed["gap_s"] < 10
    (after,) = shell.json("show")["workers"]  # none too many, either
    assert (after["id"], after["role"]) == (renewed["heir"], "active")
    exchange_both_ways(a, b)


def test_in_the_foreground_its_service_starts_it_again(shell, net, other_code):
    managers = []

    def serve():
        code = AGAIN
        while code == AGAIN:
            with shell.start("up", "--foreground", "--spares", "0") as manager:
                managers.append(manager.pid)
                code = manager.wait()  # its workers have its pipes, too

    service = threading.Thread(target=serve)
    service.start()
    try:
        wait_for(lambda: shell.run("show")[0] == 0, "a switch")
        a, b = net.pair()
        other_code()
        assert len(shell.json("upgrade")["workers"]) == 1
        assert len(managers) == 2
        exchange_both_ways(a, b)
    finally:
        shell.run("down")
        service.join(60)
    assert not service.is_alive()


def test_code_that_does_not_start_changes_nothing(shell, monkeypatch):
    shell.ok("up", "--spares", "0")
    pid = (shell.run_dir / "pid").read_text()
    broken = shell.directory / "broken"
    for package in (ports, vswitch):
        origin = Path(package.__file__).parent
        shutil.copytree(origin, broken / package.__name__)
    manager = broken / "vswitch" / "manager.py"
    manager.write_text('raise SystemExit("it is broken")\n' + manager.read_text())
    monkeypatch.setenv("PYTHONPATH", str(broken))
    code, said = shell.error("upgrade")
    assert code == FAILED
    assert "the new code does not start, so nothing was changed" in said
    assert "it is broken" in said
    assert (shell.run_dir / "pid").read_text() == pid
    os.kill(int(pid), 0)


def test_without_a_switch_there_is_nothing_to_upgrade(shell):
    code, said = shell.error("upgrade")
    assert code == NO_MANAGER
    assert "vswitch up" in said
