"""A tap's queue for each worker: flows stay with one, and whoever serves them may die."""

import json
import os
import signal
import socket
import struct
from contextlib import ExitStack

import pytest

from ports.base import RING_RUNNING, RX
from tests.netns.flows import Connection, Datagrams
from tests.switch import Switch, remove_directory, short_directory
from tests.system.net import ALL_CPUS
from vswitch import shared

pytestmark = pytest.mark.netns

NEAR, FAR = "10.80.0.1", "10.80.0.2"
CONNECTIONS = 3
FLOWS = 8
ENOUGH = 2 << 20  # bytes
ROUNDS = 100
KILLS = 3


@pytest.fixture(scope="module")
def switch(namespace):
    directory = short_directory()
    options = ("--workers", 2, "--cpus", ALL_CPUS)
    with Switch(directory, *options, prefix=namespace.prefix) as it:
        it.wait_for_workers(2, 1)
        yield it
    remove_directory(directory)


@pytest.fixture
def owned():
    with ExitStack() as it:
        yield it


@pytest.fixture
def link_kernels(bench, namespace, other_namespace):
    """Have two kernels reach each other by NEAR and FAR, over two taps."""

    def link():
        for name in ("near", "far"):
            bench.tap(name)
        namespace.ip(f"address add {NEAR}/24 dev near")
        namespace.ip(f"link set far netns {other_namespace.pid}")
        other_namespace.ip(f"address add {FAR}/24 dev far")
        other_namespace.ip("link set far up")
        return namespace, other_namespace

    return link


def queue_owners(switch):
    """The workers that receive from the ports, in the order of their rings."""
    rings = shared.attach(switch.run_dir).rings
    transmits, receives = rings[0::2], rings[RX::2]
    running = receives["state"] == RING_RUNNING
    owners = receives["owner"][running].tolist()
    assert transmits["owner"][running].tolist() == owners
    return owners


def received_by_worker(switch):
    """Frames that each worker took from all ports so far."""
    return shared.attach(switch.run_dir).counters["rx_frames"].sum(axis=1)


def queues_of(namespace, name):
    """How many queues of a tap have somebody attached, or None if it may have just one."""
    (link,) = json.loads(namespace.ip(f"-json -details link show {name}"))
    tap = link["linkinfo"]["info_data"]
    return tap["numqueues"] if tap["multi_queue"] else None


def killed(switch, worker):
    """Kill a worker; return when another one has its place."""
    os.kill(worker["pid"], signal.SIGKILL)
    switch.wait_for(lambda: worker["pid"] not in switch.worker_pids(), "its death")
    switch.wait_for(lambda: len(switch.workers("active")) == 2, "an heir")


# --- how many queues ---


def test_a_tap_that_we_make_has_a_queue_for_each_worker(switch, bench, namespace):
    bench.tap("many0")
    port = switch.port("many0")
    assert port["queues"] == {"enabled": 2, "max": 2}
    assert port["reason"] == "interface many0 is up"
    assert sorted(queue_owners(switch)) == [0, 1]
    assert queues_of(namespace, "many0") == 2
    switch.ask("del_port", name="many0")
    assert namespace.link("many0") is None


def test_a_tap_has_no_more_queues_than_it_may(switch, bench, namespace):
    bench.tap("few0", queues=1)
    port = switch.port("few0")
    assert port["queues"] == {"enabled": 1, "max": 1}
    assert port["reason"] == "interface few0 is up"
    assert queues_of(namespace, "few0") is None


def test_a_tap_that_was_there_for_many_queues_is_left_without_any(
    switch, bench, namespace
):
    bench.interface("many1", "tuntap add many1 mode tap multi_queue")
    for _ in range(3):
        bench.tap("many1")
        assert queues_of(namespace, "many1") == 2
        switch.ask("del_port", name="many1")
        assert queues_of(namespace, "many1") == 0


def test_a_tap_of_one_queue_serves_both_workers(
    switch, bench, namespace, link_kernels, owned
):
    bench.interface("near", "tuntap add near mode tap")
    near, far = link_kernels()
    port = switch.port("near")
    assert port["queues"] == {"enabled": 1, "max": 2}
    assert port["reason"].endswith(
        "; it has one queue for 2 workers (ip tuntap add near mode tap multi_queue)"
    )
    assert queues_of(namespace, "near") is None
    connections = start_streams(owned, near, far)
    wait_for_more(switch, connections)
    for connection in connections:
        connection.stop()


# --- flows ---


def start_streams(owned, near, far):
    """Connections that are busy both ways."""
    ports = range(5000, 5000 + CONNECTIONS)
    connections = [
        owned.enter_context(Connection(near, far, FAR, port)) for port in ports
    ]
    for connection in connections:
        connection.start()
    return connections


def wait_for_more(switch, connections, enough=ENOUGH):
    """Wait until each way of each connection has brought more."""
    before = [connection.received for connection in connections]

    def missing():
        now = [connection.received for connection in connections]
        return [
            (was, came)
            for then, both in zip(before, now, strict=True)
            for was, came in zip(then, both, strict=True)
            if came < was + enough
        ]

    switch.wait_for(lambda: not missing(), missing)


def test_both_ways_of_a_flow_stay_with_one_worker(switch, link_kernels, owned):
    """As the kernel answers by the queue that it was asked by, and so do we.

    A flow may have to find its worker first: what the kernel answers at once it sends
    before it notes by which queue it was asked.
    """
    near, far = link_kernels()
    know_each_other(near, far)
    used = set()
    for port in range(5000, 5000 + 16):
        connection = owned.enter_context(Connection(near, far, FAR, port))

        def workers(connection=connection):
            before = received_by_worker(switch)
            for number in range(ROUNDS):
                assert_echoes(*connection.ends, struct.pack("!Q", number))
            return (received_by_worker(switch) - before).nonzero()[0].tolist()

        used |= {*switch.wait_for(lambda: one_of(workers()), "one worker")}
    assert used == {0, 1}


def one_of(workers):
    return workers if len(workers) == 1 else None


def assert_echoes(client, server, word):
    for source, target in ((client, server), (server, client)):
        source.sendall(word)
        assert target.recv(len(word), socket.MSG_WAITALL) == word


def know_each_other(near, far):
    """Have nobody ask for addresses any more."""
    for asker, name, other, address in (
        (near, "near", far.link("far"), FAR),
        (far, "far", near.link("near"), NEAR),
    ):
        mac = other["address"]
        asker.ip(f"neighbour replace {address} lladdr {mac} nud permanent dev {name}")


def test_flows_go_on_in_order_while_workers_are_killed(switch, link_kernels, owned):
    near, far = link_kernels()
    streams = start_streams(owned, near, far)
    both = (
        owned.enter_context(Datagrams(near, far, (NEAR, FAR), 7000, FLOWS)),
        owned.enter_context(Datagrams(far, near, (FAR, NEAR), 7000, FLOWS)),
    )

    def wait():
        wait_for_more(switch, streams)
        enough = max(way.look() for way in both) + 100 * FLOWS
        switch.wait_for(lambda: all(way.look() >= enough for way in both), "datagrams")

    for turn in range(KILLS):
        wait()
        switch.wait_for_workers(2, 1)
        killed(switch, switch.workers("active")[turn % 2])
    wait()
    for stream in streams:
        stream.stop()
    assert [way.overtaken for way in both] == [[], []]
    assert [len(way.last) for way in both] == [FLOWS, FLOWS]
    assert len(set(queue_owners(switch))) == 2
