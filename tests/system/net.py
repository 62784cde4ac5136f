"""Guests on a switch, their traffic, and what /proc says of the processes."""

import os
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from tests.switch import Switch, remove_directory, short_directory
from vswitch.guest import Guest, stream, traffic
from vswitch.guest.traffic import Generator, Sink

ALL_CPUS = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
BROADCAST = b"\xff" * 6
BURST = 64
HUGE = 2 << 20  # bytes of a huge page
# A sink of 64 frames a turn beside a generator of as many cannot fall further behind
# than the sender's ring is long, so these two never overflow.
SENDER, RECEIVER = {"queue_size": 256}, {"queue_size": 1024}

_TIB = 1 << 40
_PATTERN = bytes(7 * at % 256 for at in range(256)) * 260


class Net:
    """The ports of one test, and the guests behind them."""

    def __init__(self, switch):
        self.switch = switch
        self.guests = []
        self._ports = []

    def add_port(self, name, **options):
        """Add a port; its socket's path."""
        self.switch.add_port(name, **options)
        self._ports.append(name)
        return self.switch.socket(name)

    def guest(self, name, *, port=(), **options):
        """A guest that is up on a port of its own."""
        guest = self.prepared(name, port=port, **options)
        guest.open()
        self.switch.wait_for_state(name, "up")
        return guest

    def prepared(self, name, *, port=(), **options):
        """A guest on a port of its own that is not attached yet.

        One that listens gets a port that connects.
        """
        if options.get("mode") == "server":
            port = {"mode": "client"} | dict(port)
        return self.behind(self.add_port(name, **dict(port)), **options)

    def behind(self, path, **options):
        """A guest, not attached yet, on a port that is there."""
        guest = Guest(path, **options)
        self.guests.append(guest)
        return guest

    def forget(self, guest):
        """Close a guest before the end."""
        assert not guest.faults(), guest.faults()
        guest.close()
        self.guests.remove(guest)

    def pair(self, sender=(), receiver=()):
        """Guests a and b; a stream from a to b cannot overflow b's ring."""
        pair = (
            self.guest("a", **SENDER | dict(sender)),
            self.guest("b", **RECEIVER | dict(receiver)),
        )
        self.pin(*pair)
        return pair

    def pin(self, *guests):
        """Tell the switch where guests are, so that nothing has to be flooded."""
        for guest in guests:
            self.switch.ask("fdb_add", mac=guest.mac_text, ifname=self.name_of(guest))

    def name_of(self, guest):
        return Path(guest._path).stem

    def check(self):
        """What has to hold at the end of every test."""
        faults = [guest.faults() for guest in self.guests]
        assert not any(faults), faults
        self.switch.assert_ledger_balances()

    def close(self):
        for guest in self.guests:
            guest.close()
        left = {port["name"] for port in self.switch.ask("show")["ports"]}
        for name in left.intersection(self._ports):
            self.switch.ask("del_port", name=name)


@contextmanager
def on_a_switch(*options, inside=None):
    """Ports and guests on a switch of its own, that may be inside a namespace.

    Its log is printed where something goes wrong.
    """
    directory = short_directory()
    try:
        prefix = inside.prefix if inside else ()
        with Switch(directory, *options, prefix=prefix) as switch:
            net = Net(switch)
            try:
                yield net
            except BaseException:
                sys.stderr.write(switch.log)
                raise
            finally:
                net.close()
    finally:
        remove_directory(directory)


class Stream:
    """Numbered frames on a thread of their own, until `stop`.

    `flows` are pairs of guests, (sender, receiver), numbered from `first`. What comes
    in by any of a receiver's first `queues` queues is looked at.
    """

    def __init__(self, *flows, first=0, queues=1, **options):
        receivers = list(dict.fromkeys(receiver for _, receiver in flows))
        self._generators = [
            Generator(a, b, flow=n, **options)
            for n, (a, b) in enumerate(flows, start=first)
        ]
        common = {n: options[n] for n in ("raw", "verify") if n in options}
        count = first + len(flows)
        self.sinks = [
            Sink(guest, count, queue=queue, **common)
            for guest in receivers
            for queue in range(queues)
        ]
        self._flows = slice(first, count)
        for one in (*self.sinks, *self._generators):
            one.prepare()
        self._sending = np.array([g.record for g in self._generators], stream.GENERATOR)
        self._receiving = np.array([s.record for s in self.sinks], stream.SINK)
        self._exchange()  # compiled here, if need be
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()

    def _run(self):
        # By default workers leave the first CPU alone.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        self._exchange(seconds=600, linger=0.3)

    def _exchange(self, seconds=0, linger=0.001):
        """Send for so long at most, then receive while frames come."""
        hz = traffic.tsc_hz()
        stream.exchange(
            *(int(self._sending.ctypes.data), len(self._sending)),
            *(int(self._receiving.ctypes.data), len(self._receiving)),
            *(int(seconds * hz), int(linger * hz), 1 << 45),
            *np.zeros((2, 1024), np.int64),
        )

    @property
    def received(self):
        """Frames that have arrived, by flow; may be read at any time."""
        return sum(sink.flows["received"][self._flows] for sink in self.sinks)

    @property
    def sent(self):
        return self._sending["next"].copy()

    def wait_for_more(self, switch, count=10_000):
        """Wait until every flow has brought `count` more."""
        wanted = self.received + count
        switch.wait_for(
            lambda: bool((self.received >= wanted).all()),
            lambda: f"{wanted} frames, there are {self.received}, sent {self.sent}",
        )

    def stop(self):
        """End it, wait for what is under way, and return the totals.

        The guests' rings can be used for other things again.
        """
        self._end()
        for generator, row in zip(self._generators, self._sending, strict=True):
            generator.table[0] = row
            generator.finish(time.monotonic() + 30)
        # What was taken from a sender lies in the receivers' rings.
        self._exchange()
        for sink, row in zip(self.sinks, self._receiving, strict=True):
            sink.table[0] = row
        return traffic._count(self._generators, self.sinks)

    def _end(self):
        while self._thread.is_alive():
            # A generator at or behind its limit rests, so this settles.
            self._sending["limit"] = self._sending["next"]
            self._thread.join(0.01)


def frame(dst, src, length=60, fill=0):
    """An Ethernet frame between guests or addresses."""
    head = b"".join(getattr(one, "mac", one) for one in (dst, src))
    return head + b"\x88\xb5" + _PATTERN[fill % 256 :][: length - 14]


def transfer(sender, receiver, frames):
    """Send frames, no more at a time than fit the receiver; what arrives."""
    ring = receiver.rings[0]
    room, each = receiver.layouts[0].plan.size, int(ring["buffer_len"])
    chain = int(ring["chain"])
    arrived, batch, taken = [], [], 0
    for one in [*frames, None]:
        buffers = 0 if one is None else -(-(len(one) + 12) // each) * chain
        if batch and (one is None or taken + buffers > room):
            sender.send_all(batch)
            arrived += receiver.receive(timeout=10.0, at_least=len(batch))
            batch, taken = [], 0
        batch.append(one)
        taken += buffers
    sender.wait_sent()
    return arrived


def assert_flows(sender, receiver, count=8):
    """Frames of several lengths pass from one guest to the other."""
    frames = [frame(receiver, sender, 60 + 97 * n, n) for n in range(count)]
    arrived = transfer(sender, receiver, frames)
    assert arrived == frames, (len(arrived), len(frames), arrived)


def exchange_both_ways(one, other):
    assert_flows(one, other)
    assert_flows(other, one)


def fill(send, data):
    """Send until there is no room any more, as `send` then says."""
    while True:
        send(data)


# --- processes ---


def is_alive(pid):
    """Whether a process runs; one that nobody waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it was opened, or after
        return False


def open_fds(pid):
    """Descriptors of a process by number: what is behind each."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            info = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().splitlines()
            identity = [line for line in info if line.startswith("eventfd-id")]
            file = str(entry.readlink()), entry.stat().st_ino
            found[int(entry.name)] = (*file, *identity)
    return found


def guest_mappings(pid):
    """Ranges of a process that are reserved for guest memory, with their files."""
    rows = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return sorted(
        (row[0], row[1], row[2], row[4])
        for row in rows
        if 16 * _TIB <= int(row[0].split("-")[0], 16) < 80 * _TIB
    )


def footprint(switch):
    """How many descriptors and guest mappings each process of a switch has.

    Connections of the control socket do not count: the last question's may linger.
    """
    pids = (switch.pid, *switch.worker_pids())
    asked = _connections(switch.run_dir / "control.sock")

    def held(pid):
        return sum(inode not in asked for _, inode, *_ in open_fds(pid).values())

    return {pid: (held(pid), len(guest_mappings(pid))) for pid in pids}


def _connections(path):
    """Inodes of the sockets that were accepted at a path."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return {int(row[6]) for row in rows if row[7:] == [str(path)] and row[5] == "03"}


def assert_footprint(switch, before):
    """Wait until the processes hold what they held before."""
    switch.wait_for(
        lambda: footprint(switch) == before, lambda: (before, footprint(switch))
    )


def cpu_seconds(pid):
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def status_kib(pid, *names):
    """Sum of some lines of a process's status, in KiB."""
    sizes = Counter()
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.strip().endswith("kB"):
            sizes[name] = int(value.split()[0])
    return sum(sizes[name] for name in names)
