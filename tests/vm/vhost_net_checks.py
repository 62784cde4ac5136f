"""What has to hold of taps with vhost-net; runs in a guest whose kernel has that.

    python -m tests.vm.vhost_net_checks     a line for each check: its name, then `ok` or
                                            what is wrong

A wire through the switch between two of the kernel's network stacks: tap `near` in the
switch's namespace, tap `far` in another one. `test_vhost_net` boots the guest.
"""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path

from bench.namespace import Namespace
from tests.switch import Switch, dropped, short_directory, wait_for

OPTIONS = ("--workers", "2", "--spares", "0", "--cpus", "0,0", "--idle-us", "20000")
NEAR, FAR = "near", "far"
ADDRESSES = {NEAR: ("10.77.0.1", "fd77::1"), FAR: ("10.77.0.2", "fd77::2")}
BYTES = 1 << 20
LONG = 8 << 20
PATIENCE_S = 120
# A slow path is a slow pace to TCP, which then makes small super-frames.
FEWEST_SEGMENTS = ("/proc/sys/net/ipv4/tcp_min_tso_segs", 40)
BUSYBOX = "/run/busybox"  # the guest's own


class Wire:
    """A switch, its two taps, and what is behind each."""

    def __init__(self, owned):
        self.sides = {name: owned.enter_context(Namespace()) for name in (NEAR, FAR)}
        for side in self.sides.values():
            setting, value = FEWEST_SEGMENTS
            side.run("sh", "-c", f"echo {value} >{setting}")
        prefix = self.sides[NEAR].prefix
        self.switch = Switch(short_directory(), *OPTIONS, prefix=prefix)
        owned.enter_context(self.switch)

    def plug(self, name):
        """Add a port; its tap gets its addresses, where it belongs."""
        self.switch.add_port(name, f"tap:{name}")
        if name == FAR:
            self.sides[NEAR].ip(f"link set {name} netns {self.sides[FAR].pid}")
        v4, v6 = ADDRESSES[name]
        lines = (
            f"address add {v4}/24 dev {name}",
            f"address add {v6}/64 dev {name} nodad",
            f"link set {name} up",
        )
        text = "\\n".join(lines)
        self.sides[name].run("sh", "-c", f"printf '{text}' | ip -batch -")

    def counters(self):
        return {name: self.switch.counters(name) for name in (NEAR, FAR)}

    def ping(self, name):
        """Ping from behind one tap to behind the other until there is an answer.

        Where the machine has no time for us, the question for an address is given up.
        """
        target = ADDRESSES[other(name)][0]

        def is_answered():
            with suppress(subprocess.CalledProcessError):
                self.sides[name].run(BUSYBOX, "ping", "-c", "1", "-W", "20", target)
                return True

        wait_for(is_answered, f"an answer from {target}", PATIENCE_S)

    def stream(self, name, version, data):
        """Start a transfer from behind a tap to the other one; how to await its end."""
        address = ADDRESSES[other(name)][version]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.sides[other(name)].inside():
            listener = socket.create_server((address, 0), family=family)
        with self.sides[name].inside():
            sender = socket.socket(family)
        digests = []
        threads = [
            threading.Thread(target=work, daemon=True)
            for work in (
                lambda: digests.append(take(listener)),
                lambda: send(sender, listener.getsockname()[:2], data),
            )
        ]
        for thread in threads:
            thread.start()

        def finish():
            for thread in threads:
                thread.join(PATIENCE_S)
            assert digests == [hashlib.sha256(data).digest()]

        return finish


def take(listener):
    """Take one connection to its end; the digest of what came."""
    digest = hashlib.sha256()
    with listener:
        listener.settimeout(PATIENCE_S)
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            while data := connection.recv(1 << 18):
                digest.update(data)
    return digest.digest()


def send(sender, address, data):
    with sender:
        sender.settimeout(PATIENCE_S)
        sender.connect(address)
        sender.sendall(data)


def other(name):
    return FAR if name == NEAR else NEAR


def vhost_threads():
    """The kernel's, by name, which ends with their owner's number."""
    names = [path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm")]
    return sorted(name for name in names if name.startswith("vhost-"))


def open_files(pid):
    """How many stay, and how many are of those that may come and go."""
    passing = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            passing.append(str(entry.readlink()).startswith(("/proc/", "socket:")))
    return passing.count(False), passing.count(True)


# --- the checks, in the order in which they are made ---


def it_is_chosen_by_itself(wire):
    for name in (NEAR, FAR):
        wire.plug(name)
        port = wire.switch.wait_for_state(name, "up")
        assert (port["backend"], port["backend_reason"]) == ("vhost-net", ""), port
        assert port["queues"] == {"enabled": 2, "max": 2}, port
    assert vhost_threads() == 4 * [f"vhost-{wire.switch.pid}"]


def pings_pass_both_ways(wire):
    for name in (NEAR, FAR):
        wire.ping(name)


def streams_pass_both_ways_in_super_frames(wire):
    data = os.urandom(BYTES)
    begin = wire.counters()
    for name in (NEAR, FAR):
        for version in range(2):
            before = wire.counters()
            wire.stream(name, version, data)()
            after = wire.counters()
            way = {
                counter: after[other(name)][counter] - before[other(name)][counter]
                for counter in ("tx_frames", "tx_bytes", "tx_gso_split")
            }
            assert way["tx_bytes"] > BYTES, way
            assert way["tx_bytes"] > 8 * 1514 * way["tx_frames"], way
            assert way["tx_gso_split"] == 0, way
    for name, end in wire.counters().items():
        # The kernel's thread may be slower than its driver.
        lost = dropped(end, "tx") - dropped(begin[name], "tx")
        assert lost == end["tx_drop_ring_full"] - begin[name]["tx_drop_ring_full"], end
    wire.switch.assert_ledger_balances()


def a_link_that_is_down_is_counted(wire):
    near = wire.sides[NEAR]
    near.ip(f"link set {NEAR} down")
    wire.switch.wait_for_state(NEAR, "down")
    wire.sides[FAR].ip(f"neighbour flush dev {FAR}")
    asking = [BUSYBOX, "ping", "-c", "1", "-W", "1", ADDRESSES[NEAR][0]]
    wire.sides[FAR].run("sh", "-c", f"! {' '.join(asking)}")
    wait_for(lambda: wire.counters()[NEAR]["tx_drop_link_down"] > 0, "a drop")
    near.ip(f"link set {NEAR} up")
    near.ip(f"address add {ADDRESSES[NEAR][1]}/64 dev {NEAR} nodad")
    wire.switch.wait_for_state(NEAR, "up")
    wire.ping(FAR)


def a_port_takes_everything_with_it_and_can_come_back(wire):
    staying, passing = open_files(wire.switch.pid)

    def are_open_as_before():
        stay, pass_ = open_files(wire.switch.pid)
        return stay == staying and pass_ <= passing

    wire.switch.ask("del_port", name=NEAR)
    assert wire.sides[NEAR].link(NEAR) is None
    assert len(vhost_threads()) == 2
    wire.plug(NEAR)
    wait_for(are_open_as_before, "as many open files as before")
    wire.ping(NEAR)


def a_worker_that_is_killed_is_not_missed(wire):
    finish = wire.stream(NEAR, 0, bytes(LONG))
    counters = wire.counters
    begun = counters()[FAR]["tx_bytes"]
    wait_for(lambda: counters()[FAR]["tx_bytes"] > begun + LONG // 16, "bytes")
    dead = busiest(wire.switch)
    os.kill(dead, signal.SIGKILL)
    finish()
    assert dead not in wire.switch.worker_pids()
    for name in (NEAR, FAR):
        wire.ping(name)
        assert wire.switch.port(name)["backend"] == "vhost-net"
        assert counters()[name]["broken_rings"] == 0


def busiest(switch):
    """The process id of the worker that has moved the most frames."""
    moved = {n: w["frames"] for n, w in switch.ask("stats")["workers"].items()}
    number = int(max(moved, key=moved.get))
    return next(w["pid"] for w in switch.workers() if w["id"] == number)


def nothing_is_left_at_the_end(wire):
    assert wire.switch.end() == 0
    assert vhost_threads() == []


CHECKS = (
    it_is_chosen_by_itself,
    pings_pass_both_ways,
    streams_pass_both_ways_in_super_frames,
    a_link_that_is_down_is_counted,
    a_port_takes_everything_with_it_and_can_come_back,
    a_worker_that_is_killed_is_not_missed,
    nothing_is_left_at_the_end,
)
NAMES = [check.__name__ for check in CHECKS]


def main():
    with ExitStack() as owned:
        wire = Wire(owned)
        for check in CHECKS:
            try:
                check(wire)
                outcome = "ok"
            except Exception:  # noqa: BLE001 - to be told, and the others made
                said = f"{traceback.format_exc()}{wire.switch.log}"
                outcome = " | ".join(said.strip().splitlines())
            sys.stdout.write(f"{check.__name__} {outcome}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
