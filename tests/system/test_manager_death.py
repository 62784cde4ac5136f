"""The manager may be killed at any moment: frames go on, and the next one takes over."""

import os
import random
import signal
import threading

import pytest

from tests.switch import DEFAULTS
from tests.system.net import (
    ALL_CPUS,
    Stream,
    exchange_both_ways,
    footprint,
    is_alive,
)
from tests.system.shell import NO_MANAGER
from vswitch import orphans
from vswitch.guest import Guest, GuestError
from vswitch.options import parse_options

KILLS = 12
BOTH = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])

pytestmark = pytest.mark.timeout(300)


def kill_manager(switch):
    switch.end(signal.SIGKILL)


@BOTH
def test_frames_flow_without_a_manager_and_the_next_one_goes_on(own_net, packed):
    net = own_net()
    switch = net.switch
    switch.wait_for_workers(1, 1)
    a, b = net.pair({"packed": packed}, {"packed": packed})
    workers = switch.worker_pids()
    exchange_both_ways(a, b)
    held = {pid: footprint(switch)[pid] for pid in workers}
    with Stream((a, b)) as flow:
        for _ in range(3):
            flow.wait_for_more(switch)
            kill_manager(switch)
            flow.wait_for_more(switch, 100_000)
            switch.start()
            assert switch.worker_pids() == workers
            flow.wait_for_more(switch)
        totals = flow.stop()
    # A ring that is stopped and started again loses nothing but what was flooded.
    assert (totals.reordered, totals.duplicates, totals.corrupt) == (0, 0, 0)
    assert totals.sent - totals.received == switch.counters("b")["tx_drop_not_ready"]
    for guest in (a, b):
        guest.wait_ready()  # on the connection that it always had
    exchange_both_ways(a, b)
    states = {entry["mac"]: entry["state"] for entry in switch.ask("fdb_show")}
    assert states[a.mac_text] == states[b.mac_text] == "static"
    assert {pid: footprint(switch)[pid] for pid in workers} == held


def test_a_guest_resets_disconnects_and_comes_back_after_a_takeover(own_net):
    net = own_net()
    a, b = net.guest("a", packed=True), net.guest("b")
    exchange_both_ways(a, b)
    kill_manager(net.switch)
    net.switch.start()
    a.reset()
    exchange_both_ways(a, b)
    b.disconnect()
    net.switch.wait_for_state("b", "waiting-for-frontend")
    b.open()
    exchange_both_ways(a, b)
    net.switch.ask("del_port", name="a")
    assert [port["name"] for port in net.switch.ask("show")["ports"]] == ["b"]


def test_workers_that_die_without_a_manager_are_replaced_by_the_next(own_net):
    net = own_net("--workers", 2, "--cpus", ALL_CPUS)
    switch = net.switch
    switch.wait_for_workers(2, 1)
    a, b = net.pair()
    pids = switch.worker_pids()
    for doomed in (pids[:1], pids):
        with Stream((a, b)) as flow:
            flow.wait_for_more(switch)
            kill_manager(switch)
            for pid in doomed:
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)
            switch.start()
            flow.wait_for_more(switch)
            assert flow.stop().reordered == 0
        switch.wait_for_workers(2, 1)
        assert not set(doomed) & set(switch.worker_pids())


def test_a_front_end_is_answered_whenever_the_manager_is_killed(own_net):
    """It negotiates, comes and goes; no answer is lost and none comes twice.

    But a connection that was accepted and not yet kept goes with the manager.
    """
    net = own_net("--spares", 0)
    switch, dice = net.switch, random.Random(4)
    peer = net.guest("p")
    paths = {True: net.add_port("a"), False: net.add_port("b")}
    unkept = []
    for number in range(KILLS):
        packed = bool(number % 2)
        done = threading.Event()

        def come_and_go(packed=packed, done=done, number=number):
            while not done.is_set():
                try:
                    with Guest(paths[packed], packed=packed, timeout=60) as guest:
                        guest.reset()
                except GuestError as error:
                    if "no answer to GET_FEATURES" not in str(error):  # its first
                        raise
                    unkept.append(number)

        guest = threading.Thread(target=come_and_go)
        guest.start()
        killer = threading.Timer(dice.uniform(0.02, 0.2), switch.kill)
        killer.start()
        killer.join()
        switch.wait_ended()
        switch.start()
        done.set()
        guest.join(60)
        assert not guest.is_alive(), number
    assert len(unkept) == len(set(unkept)) < KILLS / 2  # one a kill, if at all
    last = net.behind(paths[True], packed=True)
    last.open()
    exchange_both_ways(last, peer)
    assert "a message was begun" not in switch.log


def test_a_keeper_that_dies_is_replaced(own_net):
    net = own_net()
    net.switch.wait_for_workers(1, 1)
    a, b = net.guest("a"), net.guest("b")
    keeper = net.switch.keeper_pid()
    os.kill(keeper, signal.SIGKILL)
    net.switch.wait_for(
        lambda: net.switch.keeper_pid() not in {0, keeper}, "another keeper"
    )
    workers = net.switch.worker_pids()
    kill_manager(net.switch)
    net.switch.start()
    assert net.switch.worker_pids() == workers
    exchange_both_ways(a, b)


def test_without_its_keeper_a_killed_manager_takes_everything_with_it(own_net):
    net = own_net()
    net.add_port("a")
    pids = net.switch.worker_pids()
    net.switch.kill_with_keeper()
    net.switch.wait_for(lambda: not any(map(is_alive, pids)), "the workers to end")
    net.switch.start()
    assert not set(pids) & set(net.switch.worker_pids())
    assert net.switch.port("a")["state"] == "waiting-for-frontend"


# --- in the words of the command line ---


def test_up_goes_on_and_says_so(shell):
    shell.ok("up", "--spares", "0")
    shell.ok("add-port", "vm1.sock")
    with Guest(shell.directory / "vm1.sock") as guest:
        (before,) = shell.json("show")["workers"]
        shell.kill_manager()
        assert shell.error("show")[0] == NO_MANAGER
        said = shell.ok("up")
        assert "the manager before was killed; its workers and guests went on" in said
        (after,) = shell.json("show")["workers"]
        assert after["pid"] == before["pid"]
        guest.wait_ready()
        (port,) = shell.json("show")["ports"]
        assert port["state"] == "up"


def test_other_options_for_workers_start_them_anew(shell):
    shell.ok("up", "--spares", "0")
    shell.ok("add-port", "vm1.sock")
    (before,) = shell.json("show")["workers"]
    shell.kill_manager()
    code, _, warned = shell.run("up", "--poll", "busy")
    assert code == 0
    why = "poll was adaptive and is now busy; guests connect anew"
    assert f"warning: workers of the manager before were ended: {why}" in warned
    (after,) = shell.json("show")["workers"]
    assert after["pid"] != before["pid"]
    assert [port["name"] for port in shell.json("show")["ports"]] == ["vm1"]


def test_another_layout_of_shared_memory_starts_anew(start, monkeypatch):
    switch = start("--spares", 0)
    switch.add_port("a")
    kill_manager(switch)
    monkeypatch.setattr("vswitch.shared.layout_digest", lambda: b"another")
    options = parse_options(["--run-dir", str(switch.run_dir), *DEFAULTS])
    options.spares = 0
    kept, _, why = orphans.adopt(switch.run_dir, options)
    assert kept is None
    assert "it belongs to another version of vswitch" in why
    monkeypatch.undo()
    switch.start()
    assert switch.port("a")["state"] == "waiting-for-frontend"


def test_down_ends_what_a_killed_manager_left(shell):
    shell.ok("up")
    shell.ok("add-port", "vm1.sock")
    pids = [worker["pid"] for worker in shell.json("show")["workers"]]
    shell.kill_manager()
    assert all(map(is_alive, pids))
    said = f"down: {len(pids)} workers had gone on without a manager\n"
    assert shell.ok("down") == said
    assert not any(map(is_alive, pids))
    assert [path.name for path in shell.run_dir.iterdir()] == ["log"]
    assert not (shell.directory / "vm1.sock").exists()
    assert shell.error("down")[0] == NO_MANAGER
