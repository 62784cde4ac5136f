"""Guests that make a nuisance of themselves: our memory and log stay as they are."""

import contextlib
import os

import numpy as np

from tests.system.net import exchange_both_ways, frame, status_kib
from vswitch.guest import GuestError
from vswitch.guest.frontend import Frontend

KICKS = 100_000
ADDRESSES = 20_000
FRAMES = 4096
VISITS = 300
SLACK = 8 << 10  # KiB that allocators may keep
MOST_LOG = 16 << 10  # bytes


def memory(switch):
    """KiB that each process has for itself."""
    pids = (switch.pid, *switch.worker_pids())
    return {pid: status_kib(pid, "RssAnon") for pid in pids}


def test_what_a_guest_repeats_neither_grows_our_memory_nor_fills_the_log(net):
    switch = net.switch
    a, b, idle = net.guest("a"), net.guest("b"), net.guest("idle", queue_size=64)
    exchange_both_ways(a, b)
    net.pin(idle)
    nuisances = (storm_of_kicks, invented_addresses, full_ring, reconnects)
    # Once for what is allocated at first use.
    for each in nuisances:
        each(net, a, idle, 1000)
    before, log = memory(switch), len(switch.log)
    for each, count in zip(nuisances, (KICKS, ADDRESSES, FRAMES, VISITS), strict=True):
        each(net, a, idle, count)
        exchange_both_ways(a, b)
    grown = {pid: kib - before[pid] for pid, kib in memory(switch).items()}
    assert max(grown.values()) < SLACK, grown
    assert len(switch.log) - log < MOST_LOG
    # What is left out is told, as a number.
    switch.wait_for_log("lines left out")


def storm_of_kicks(_net, _a, idle, count):
    kick = int(idle.rings[1]["kick_fd"])
    for _ in range(count):
        os.eventfd_write(kick, 1)


def invented_addresses(net, a, idle, count):
    """Frames of ever new stations, to one that does not answer."""
    noise = np.random.default_rng(count)
    sources = noise.integers(0, 256, (count, 6), np.uint8)
    sources[:, 0] &= 0xFC
    for at in range(0, count, 128):
        some = sources[at : at + 128]
        a.send_all([frame(idle, bytes(source)) for source in some])
    a.wait_sent()
    assert net.switch.port("a")["state"] == "up"


def full_ring(net, a, idle, count):
    """Frames to a guest that never refills its ring."""
    before = net.switch.counters("idle")["tx_drop_ring_full"]
    for _ in range(count // 64):
        a.send_all([frame(idle, a)] * 64)
    a.wait_sent()
    net.switch.wait_for(
        lambda: net.switch.counters("idle")["tx_drop_ring_full"] > before, "drops"
    )


def reconnects(net, _a, _idle, count):
    """Front-ends that come, say something senseless, and are shown out."""
    if "visited" not in net._ports:
        net.add_port("visited")
    for _ in range(count):
        visitor = Frontend.connect(net.switch.socket("visited"))
        with contextlib.closing(visitor), contextlib.suppress(GuestError):
            visitor.send_raw(b"\xff" * 12)
            visitor.barrier()
