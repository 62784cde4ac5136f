"""What users see of the shared records: plain values, taken at one moment.

Counters are kept per worker and port; here they are summed. Everything is read from the
segment, so it works beside a running switch.
"""

import time
from typing import Any, Final

import numpy as np

from ports.counters import NAMES
from vswitch.control.mac import format_mac
from vswitch.records import (
    FDB_PORT_MASK,
    FDB_STAMP_MASK,
    FDB_STAMP_SHIFT,
    FDB_STATIC,
    MAX_WORKERS,
    ROLE_ACTIVE,
    WORKER_NONE,
    WORKER_POLLING,
    WORKER_SLEEPING,
    WORKER_STARTING,
    Shared,
)
from vswitch.shared import elapsed_s

_STATES: Final = {
    WORKER_STARTING: "starting",
    WORKER_POLLING: "polling",
    WORKER_SLEEPING: "sleeping",
}


class Usage:
    """How busy the workers are: the part of useful cycles between two samples."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._before = self._now = self._sample()

    def sample(self) -> None:
        """Take a sample; usage is between the last two."""
        self._before, self._now = self._now, self._sample()

    def workers(self) -> list[dict[str, Any]]:
        """The workers of `show`."""
        return [
            {
                "id": number,
                "pid": int(record["pid"]),
                "cpu": int(record["cpu"]),
                "role": "active" if record["role"] == ROLE_ACTIVE else "spare",
                "state": _STATES[int(record["state"])],
                "busy_percent": self._busy_percent(number),
            }
            for number, record in _alive(self._shared)
        ]

    def _busy_percent(self, number: int) -> float:
        rate = int(self._shared.workers[number]["cycles_per_s"])
        seconds = self._now[0] - self._before[0]
        if not rate or seconds <= 0:
            return 0.0
        busy = int(self._now[1][number]) - int(self._before[1][number])
        return round(max(0.0, 100 * busy / (rate * seconds)), 1)

    def _sample(self) -> tuple[float, Any]:
        return time.monotonic(), self._shared.workers["busy_cycles"].copy()


def stats(shared: Shared, slots: dict[str, int]) -> dict[str, Any]:
    """The counters of every port and worker."""
    ports = {
        name: {
            counter: int(shared.counters[counter][:, slot].sum()) for counter in NAMES
        }
        # Not part of the ledger: they never reached us.
        | {"rx_missed": int(shared.ports[slot]["missed"])}
        for name, slot in slots.items()
    }
    workers = {}
    for number, record in _alive(shared):
        frames, busy = int(record["frames"]), int(record["busy_cycles"])
        workers[str(number)] = {
            "turns": int(record["turns"]),
            "polls": int(record["polls"]),
            "frames": frames,
            "busy_cycles": busy,
            "idle_cycles": int(record["idle_cycles"]),
            "cycles_per_frame": round(busy / frames, 1) if frames else 0.0,
            "cycles_per_s": int(record["cycles_per_s"]),
            "wakeups": int(record["wakeups"]),
        }
    return {"ports": ports, "workers": workers}


def fdb_entries(shared: Shared, names: dict[int, str]) -> list[dict[str, Any]]:
    """The forwarding database, sorted by VLAN and address; aged entries left out."""
    keys, values = shared.fdb["keys"].ravel(), shared.fdb["values"].ravel()
    used = np.flatnonzero(keys)
    now_s, ageing_s = elapsed_s(shared), int(shared.header[0]["ageing_s"])
    entries = []
    for key, value in zip(keys[used].tolist(), values[used].tolist(), strict=True):
        static = bool(value & FDB_STATIC)
        age_s = (now_s - (value >> FDB_STAMP_SHIFT)) & FDB_STAMP_MASK
        # A worker's clock may be a second ahead of ours.
        age_s = 0 if static or age_s == FDB_STAMP_MASK else age_s
        name = names.get(value & FDB_PORT_MASK)
        if name is not None and (static or age_s < ageing_s):
            entries.append(
                {
                    "mac": format_mac(key),
                    "ifname": name,
                    "vlan": key >> 48,
                    "state": "static" if static else "learned",
                    "age_s": age_s,
                }
            )
    return sorted(entries, key=lambda entry: (entry["vlan"], entry["mac"]))


def _alive(shared: Shared) -> list[tuple[int, Any]]:
    records = ((number, shared.workers[number]) for number in range(MAX_WORKERS))
    return [(n, record) for n, record in records if record["state"] != WORKER_NONE]
