"""Guests on a plane, a turn on demand, and the ledger to close with."""

from tests.datapath.rings import Guest
from vswitch.datapath import loop

A, B, C, D = 1, 2, 3, 4
NEW_HEADER = bytes(10) + b"\x01\x00"


class Bench:
    """A plane with the guests that were put on it; worker 0 serves them."""

    def __init__(self, plane):
        self.plane = plane
        self.guests = []

    def guest(self, slot, **options):
        guest = Guest(self.plane, slot, **options)
        self.guests.append(guest)
        return guest

    def pair(self):
        a, b = self.guest(A), self.guest(B)
        a.post(8)
        b.post(8)
        return a, b

    def turn(self, now_s=0, worker=0, budget=50_000):
        loop.start_rings(self.plane.ctx, worker)
        polled = loop.polled_rings(self.plane.shared, worker)
        return loop.poll_turn(self.plane.ctx, worker, polled, now_s, budget)

    def round(self, now_s=0):
        """One burst of each ring."""
        return self.turn(now_s, budget=0)

    def tally(self, slot, worker=0):
        """The counters of a port that are not zero."""
        tally = self.plane.tally(slot, worker)
        names = [name for name in tally.dtype.names if name != "pad"]
        return {name: int(tally[name]) for name in names if tally[name]}

    def drops(self, slot):
        return {k: n for k, n in self.tally(slot).items() if "_drop_" in k}

    def check_ledger(self):
        for slot in range(8):
            tally = self.tally(slot)
            verdicts = tally.get("rx_forwarded", 0) + tally.get("rx_flooded", 0)
            verdicts += sum(n for k, n in tally.items() if k.startswith("rx_drop_"))
            assert tally.get("rx_frames", 0) == verdicts

    def close(self):
        for guest in self.guests:
            guest.close()
