"""A multiprocess shared-memory packet switch for virtual machines."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vswitch.records import Shared

__version__ = "0.1.0"


def attach(run_dir: str | Path | None = None) -> "Shared":
    """A running switch's tables (ports, rings, fdb, counters, workers) to read.

    Args:
        run_dir: Its run directory; by default the one that the command line takes.

    Returns:
        NumPy arrays over the shared segment, by the names of `vswitch.records.Shared`;
        they change as frames flow and cannot be written.

    Raises:
        VswitchError: There is no switch, or it was built from other sources.
    """
    # Imported here: the command line needs none of it.
    from vswitch import shared  # noqa: PLC0415
    from vswitch.control import rundir  # noqa: PLC0415

    chosen = rundir.choose(Path(run_dir) if run_dir is not None else None)
    return shared.attach(chosen)
