"""What tests of taps and interfaces do and ask again and again."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from tests.netns.uplink import GUEST_MAC, WIRE_MAC, frame
from tests.switch import wait_for
from tests.system.net import cpu_seconds

BURST = 64
# A worker that was not woken looks by itself after a second.
WOKEN_S = 0.9
TAG = b"\x81\x00\xa1\x23"


def without(right):
    """What to start a switch by that lacks a capability."""
    return ("setpriv", f"--bounding-set=-{right}", f"--inh-caps=-{right}")


def vswitch(switch, namespace, *arguments):
    """Run the command inside; what it had to say beside its answer."""
    command = [sys.executable, "-m", "vswitch.cli", "--run-dir", switch.run_dir]
    return subprocess.run(
        [*namespace.prefix, *command, *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    ).stderr


def program(namespace, name):
    """The XDP program that an interface runs, or None."""
    links = json.loads(namespace.ip("-json link show"))
    return next(link.get("xdp") for link in links if link["ifname"] == name)


@contextmanager
def stopped(*pids):
    """Processes that do nothing meanwhile; a worker's manager first, or it kills it."""
    with ExitStack() as owned:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            owned.callback(os.kill, pid, signal.SIGCONT)
            wait_for(lambda pid=pid: cpu_state(pid) == "T", "its stop")
        yield


def cpu_state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def assert_passes_both_ways(guest, wire):
    """One frame each way, after which both addresses are known."""
    up, down = frame(WIRE_MAC, GUEST_MAC), frame(GUEST_MAC, WIRE_MAC)
    guest.send_all(up)
    assert wire.receive(1) == [up]
    wire.send(down)
    assert guest.receive(timeout=10) == [down]


def assert_every_length_passes(guest, wire, lengths):
    for at in range(0, len(lengths), BURST):
        part = lengths[at : at + BURST]
        up = [frame(WIRE_MAC, GUEST_MAC, length, length) for length in part]
        guest.send_all(up)
        assert wire.receive(len(up)) == up
        down = [frame(GUEST_MAC, WIRE_MAC, length, length) for length in part]
        for one in down:
            wire.send(one)
        assert guest.receive(timeout=10, at_least=len(down)) == down


def wait_for_sleep(switch):
    """The worker, which has given back all that it took."""
    switch.wait_for(
        lambda: switch.workers("active")[0]["state"] == "sleeping", "a worker's sleep"
    )
    return switch.workers("active")[0]


def assert_at_rest(switch):
    """The worker, which does next to nothing."""
    (worker,) = switch.workers("active")
    before = cpu_seconds(worker["pid"])
    time.sleep(1)  # what it uses in a second
    assert cpu_seconds(worker["pid"]) - before < 0.2
    return worker


class Traffic:
    """Frames back and forth in a thread, as long as the `with` lasts."""

    def __init__(self, guest):
        self._guest, self._stop = guest, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        while not self._stop.is_set():
            self._guest.send_all(frame(WIRE_MAC, GUEST_MAC))
            self._guest.wait_sent()

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def send_and_kill(send, frames, switch):
    """Send at a pace at which a ring holds what comes while there is no worker.

    The last one is sure to arrive: it is sent when nothing else is on the way.
    """
    (worker,) = switch.workers("active")
    for number, one in enumerate(frames[:-1]):
        send(one)
        if number == len(frames) // 2:
            os.kill(worker["pid"], signal.SIGKILL)
        time.sleep(0.0003)
    switch.wait_for_workers(1, 1)
    wait_for_sleep(switch)
    send(frames[-1])


def assert_a_burst_at_most(numbers, sent, counted):
    """A death costs a burst, or brings it twice; nothing else changes places."""
    lost = sent - len(set(numbers)) - counted
    again = len(numbers) - len(set(numbers))
    assert 0 <= lost + again <= BURST, (lost, again)
    steps = [after - before for before, after in pairwise(numbers)]
    assert sum(step <= 0 for step in steps) <= 1
    assert min(steps) > -BURST


def flows(dst, src, count, each):
    """UDP datagrams of `count` flows, each numbered by its first bytes, taken in turn."""
    for number in range(each):
        for flow in range(count):
            head = IP(src="10.78.0.1", dst="10.78.0.2") / UDP(sport=flow + 1, dport=9)
            data = flow.to_bytes(2, "big") + number.to_bytes(4, "big")
            yield bytes(Ether(dst=dst, src=src) / head / data)


def by_flow(frames):
    """The numbers of each flow, in the order in which they came."""
    numbers = {}
    for one in frames:
        flow, number = (
            int.from_bytes(one[42:44], "big"),
            int.from_bytes(one[44:48], "big"),
        )
        numbers.setdefault(flow, []).append(number)
    return numbers


def worker_frames(switch):
    switch.wait_for_workers(2, 1)
    stats = switch.ask("stats")["workers"]
    return {w["id"]: stats[str(w["id"])]["frames"] for w in switch.workers("active")}
