"""Rows of the switch's shared tables, as jitted code sees them."""

from typing import Final

from ports.base import MAX_PORTS
from ports.counters import COUNTERS
from ports.native import Record, jit, records_at
from vswitch.records import HEADER, WORKER

header_at: Final = records_at(HEADER)
worker_at: Final = records_at(WORKER)
_counters_at: Final = records_at(COUNTERS)


@jit
def tally_at(ctx: Record, worker: int, port: int) -> Record:
    """Counters that `worker` keeps for `port`; only that worker writes them."""
    return _counters_at(int(ctx["counters"]), worker * MAX_PORTS + port)
