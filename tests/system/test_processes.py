"""The processes: how they start and end, what they share, what they cost."""

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.switch import RefusedError, Switch
from tests.system.net import (
    ALL_CPUS,
    Net,
    exchange_both_ways,
    guest_mappings,
    is_alive,
    open_fds,
    status_kib,
)
from vswitch.plan import FIRST_NUMBER

MIB = 1024  # KiB


def everything_of(switch, *names):
    """All that a switch can leave behind, as paths and pids."""
    files = [
        switch.segment,
        switch.run_dir / "control.sock",
        *map(switch.socket, names),
    ]
    return files, [switch.pid, *switch.worker_pids()]


def assert_gone(switch, files, pids):
    assert [path for path in files if path.exists()] == []
    switch.wait_for(lambda: not any(map(is_alive, pids)), f"{pids} to end")


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGHUP", "down"])
def test_a_switch_that_ends_leaves_nothing(start, how):
    switch = start()
    net = Net(switch)
    exchange_both_ways(net.guest("a"), net.guest("b"))
    switch.add_port("c")
    switch.wait_for_workers(1, 1)
    files, pids = everything_of(switch, "a", "b", "c")
    assert all(path.exists() for path in files)
    if how == "down":
        assert switch.ask("down") == {"pid": switch.pid}
        code = switch.wait_ended()
    else:
        code = switch.end(getattr(signal, how))
    assert code == 0
    assert not any(map(is_alive, pids))
    assert_gone(switch, files, pids)
    assert list(switch.run_dir.iterdir()) == []
    for guest in net.guests:
        guest.close()


def test_a_switch_that_ends_while_its_workers_start_leaves_nothing(start):
    switch = start()
    switch.end()
    switch.spawn()
    listed = Path(f"/proc/{switch.pid}/task/{switch.pid}/children")
    children = switch.wait_for(lambda: listed.read_text().split(), "workers")
    assert switch.end() == 0
    assert_gone(switch, [switch.segment], [switch.pid, *map(int, children)])
    assert list(switch.run_dir.iterdir()) == []


def test_the_manager_is_where_no_worker_is(start):
    switch = start()
    theirs = {worker["cpu"] for worker in switch.workers("active")}
    usable = os.sched_getaffinity(0)
    assert os.sched_getaffinity(switch.pid) == (usable - theirs or usable)
    for pid in switch.worker_pids():
        assert os.sched_getaffinity(pid) <= theirs


def test_a_second_manager_is_refused_and_told_of_the_first(start):
    first = start()
    second = Switch(first.directory)
    with pytest.raises(RefusedError, match=f"pid {first.pid} .stop it with"):
        second.start()
    assert second.wait_ended() == 1
    net = Net(first)
    exchange_both_ways(net.guest("a"), net.guest("b"))
    net.close()


def test_what_a_killed_manager_left_is_cleaned_by_the_next(start):
    switch = start()
    net = Net(switch)
    for name in "ab":
        net.guest(name)
    listening = net.add_port("c", mode="client")
    other = net.behind(listening, mode="server")  # no file of ours
    switch.wait_for_workers(1, 1)
    files, pids = everything_of(switch, "a", "b")
    switch.kill_with_keeper()
    assert_gone(switch, [], pids)
    assert all(path.exists() for path in files)
    unanswered = switch.socket("d")  # killed after it was made, before it was kept
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(unanswered))
    with (switch.run_dir / "made").open("a") as made:
        made.write(f"{unanswered}\n")
    before = switch.segment.stat().st_ino
    switch.start()
    assert switch.segment.stat().st_ino != before
    assert not unanswered.exists()
    assert listening.exists()
    assert [port["name"] for port in switch.ask("show")["ports"]] == ["a", "b", "c"]
    again = Net(switch)
    exchange_both_ways(again.guest("a"), again.guest("b"))
    again.check()
    again.close()
    other.close()
    for guest in net.guests:
        guest.close()


def test_a_stale_socket_that_somebody_else_listens_on_now_is_left_alone(start):
    switch = start()
    switch.add_port("a")
    switch.kill_with_keeper()
    switch.socket("a").unlink()
    guest = Net(switch).behind(switch.socket("a"), mode="server")
    switch.start()
    assert switch.socket("a").exists()
    assert switch.port("a")["state"] == "down"
    assert "EADDRINUSE: another process is listening" in switch.port("a")["reason"]
    guest.close()
    switch.wait_for_state("a", "waiting-for-frontend")


def test_all_workers_hold_the_same_addresses_and_numbers(own_net):
    net = own_net("--workers", 2)
    one = net.guest("a", regions=3, queue_pairs=2)
    exchange_both_ways(one, net.guest("b"))
    net.switch.wait_for_workers(2, 1)
    kick, call = 2, 2
    expected = (4, (2 + 1) * (kick + call) + 4)
    pids = net.switch.worker_pids()

    def agree():
        first, *others = [(guest_mappings(pid), planned_fds(pid)) for pid in pids]
        return others == [first] * 2 and tuple(map(len, first)) == expected

    # A spare that came up late is told of everything and may still be at it.
    net.switch.wait_for(agree, "the same mappings and descriptors in all workers")


def planned_fds(pid):
    return {n: file for n, file in open_fds(pid).items() if n >= FIRST_NUMBER}


def test_workers_run_on_the_cpus_that_they_were_given(start):
    cpus = sorted(os.sched_getaffinity(0))
    switch = start("--workers", 2, "--cpus", ALL_CPUS)
    switch.wait_for_workers(2, 1)
    workers = {worker["id"]: worker for worker in switch.workers()}
    for number, worker in workers.items():
        assert worker["cpu"] == cpus[number % 2 % len(cpus)]
        assert os.sched_getaffinity(worker["pid"]) == {worker["cpu"]}
    assert os.sched_getaffinity(switch.pid) == set(cpus)


def test_a_cpu_that_is_not_there_is_refused(start):
    with pytest.raises(RefusedError, match="cannot pin a worker to cpu 4095"):
        start("--cpus", 4095)


def test_processes_stay_small(own_net):
    net = own_net()
    one, other = net.guest("a"), net.guest("b")
    exchange_both_ways(one, other)
    net.switch.wait_for_workers(1, 1)
    assert status_kib(net.switch.pid, "VmRSS") < 60 * MIB
    guests = (one.memory.size + other.memory.size) // 1024
    for pid in net.switch.worker_pids():
        assert status_kib(pid, "RssAnon", "RssShmem") < 250 * MIB + guests
