"""Ports and front-ends that come and go for a long time; what they may leave behind."""

import itertools
import time
from pathlib import Path
from typing import NamedTuple

from tests.system.net import Stream, exchange_both_ways, footprint, status_kib
from tests.system.quitter import quit_after

SMALL = {"queue_size": 64}
LENGTHS = (64, 1500)
STEPS = 21  # messages of a guest's start
BYTES = 13  # of a message: all of its header, and one more
RENEWED = 50  # cycles after which the guest is another one, with other memory
WARM_UP = 2 * RENEWED
# CPython asks for memory by arenas of 1 MiB, and glibc keeps what it once had: one
# arena each, whatever goes on. What leaks passes that mark: 200 bytes a cycle in the long
# run.
SLACK_KIB = 2 << 10
SLACK_MAPS = 8  # those arenas are mappings too


class Held(NamedTuple):
    """What a process has."""

    fds: int
    guests: int  # mappings of guest memory
    maps: int  # lines of /proc/PID/maps
    kib: int  # of its own; guest memory is not


def held(switch):
    """What each process of a switch has."""
    return {
        pid: Held(
            *both,
            len(Path(f"/proc/{pid}/maps").read_text().splitlines()),
            status_kib(pid, "RssAnon"),
        )
        for pid, both in footprint(switch).items()
    }


def assert_held(switch, before):
    """Wait until the processes have no more than before, but for what allocators keep."""

    def is_back():
        return before.keys() == (now := held(switch)).keys() and all(
            (now[pid].fds, now[pid].guests) == (had.fds, had.guests)
            and now[pid].maps - had.maps <= SLACK_MAPS
            and now[pid].kib - had.kib <= SLACK_KIB
            for pid, had in before.items()
        )

    switch.wait_for(is_back, lambda: (before, held(switch)), timeout=30.0)


# --- ports ---


def come_and_go(net, seconds):
    """Add and remove ports beside a checked stream; how often, and the stream's totals.

    The stream cannot overflow its receiver (see `Net.pair`), and nothing is flooded to
    it: what does not arrive was lost because of us.
    """
    pair, witness = net.pair(), net.guest("w", **SMALL)
    net.pin(witness)
    rounds = 0
    with Stream(pair, raw=False, verify=True, length=LENGTHS) as stream:
        for kind in _KINDS:
            kind(net, witness)  # what is allocated at first use
        before = held(net.switch)
        deadline = time.monotonic() + seconds
        for kind in itertools.cycle(_KINDS):
            if time.monotonic() > deadline:
                break
            kind(net, witness)
            rounds += 1
        stream.wait_for_more(net.switch)
        totals = stream.stop()
    assert totals.clean, totals
    assert totals.foreign == 0, totals
    net.switch.assert_copies_balance("a", "b", totals.sent, totals.received)
    assert_held(net.switch, before)
    return rounds, totals


def _port_alone(net, _witness):
    net.add_port("x")
    net.switch.ask("del_port", name="x")


def _port_under_a_guest(net, witness):
    guest = net.guest("x", **SMALL)
    exchange_both_ways(guest, witness)
    net.switch.ask("del_port", name="x")
    net.forget(guest)


def _port_that_connects(net, witness):
    guest = net.guest("x", mode="server", **SMALL)
    exchange_both_ways(guest, witness)
    net.forget(guest)
    net.switch.ask("del_port", name="x")


_KINDS = (_port_alone, _port_under_a_guest, _port_that_connects)


# --- front-ends ---


def connect_and_hang_up(net, count):
    """Attach front-ends to one port so often; nothing of them is left.

    Every fourth hangs up somewhere on the way, also in the middle of a message.
    """
    path, witness = net.add_port("x"), net.guest("w", **SMALL)
    net.pin(witness)
    _cycle(net, path, witness, WARM_UP)
    net.switch.wait_for_state("x", "waiting-for-frontend")
    before = held(net.switch)
    _cycle(net, path, witness, count)
    net.switch.wait_for_state("x", "waiting-for-frontend")
    assert_held(net.switch, before)


def _cycle(net, path, witness, count):
    guest = None
    for number in range(count):
        if number % RENEWED == 0:
            if guest:
                net.forget(guest)
            guest = net.behind(path, **SMALL)
        if number % 4 == 3:
            part = number // STEPS % BYTES
            quit_after(guest, path, number % STEPS, part, ack=number % 8 == 3)
            continue
        guest.open()
        if number % 10 == 0:
            exchange_both_ways(guest, witness)
        guest.disconnect()
    net.forget(guest)
