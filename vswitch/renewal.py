"""Workers of older sources make way for workers of ours, one by one, under traffic.

A spare of ours is ready before a worker that forwards leaves. That one ends between two of
its turns, so nothing is half done, and its rings change owner as after a death.
"""

import asyncio
from typing import Any, Final

from vswitch.errors import VswitchError
from vswitch.records import ROLE_ACTIVE, ROLE_SPARE
from vswitch.workers import Workers

_DUE_S: Final = 45.0  # a client waits for 60


async def renew_one(workers: Workers) -> dict[str, Any]:
    """Replace one worker of older sources; spares go first, as they are to be heirs.

    Returns:
        `worker` and `heir`, their numbers (no heir: it was a spare), and `gap_s`, how long
        nobody served its rings (None: unknown, it died by itself); nothing if no worker
        is left that is of older sources.

    Raises:
        VswitchError: No worker of ours becomes ready.
    """
    if spares := workers.numbers(ROLE_SPARE, old=True):
        gap = await workers.dismiss(spares[0])
        return {"worker": spares[0], "heir": None, "gap_s": gap}
    if not workers.numbers(ROLE_ACTIVE, old=True):
        return {}
    heir = await _spare(workers)
    if not (old := workers.numbers(ROLE_ACTIVE, old=True)):
        return {}  # the last one has died meanwhile
    gap = await workers.dismiss(old[0])
    return {"worker": old[0], "heir": heir, "gap_s": gap}


async def _spare(workers: Workers) -> int:
    try:
        return await asyncio.wait_for(workers.wait_for_spare(), _DUE_S)
    except TimeoutError:
        text = f"cannot replace workers: no new one was ready within {_DUE_S:.0f} s"
        raise VswitchError(f"{text} (the log says why; the old ones go on)") from None
