"""Wait for a path to appear, told by the kernel. The only file that knows inotify."""

import asyncio
import contextlib
from pathlib import Path

_LOST = (FileNotFoundError, NotADirectoryError)


async def appeared(path: Path, timeout: float) -> None:
    """Return when something may have appeared at `path`, or after `timeout` seconds.

    The directory may be missing as well: then what is watched is the nearest one there
    is, and the return means that it is worth another look.
    """
    from asyncinotify import Inotify, Mask  # noqa: PLC0415 (only client mode needs it)

    directory = path.parent
    while not directory.is_dir():
        directory = directory.parent
    with Inotify() as inotify:
        with contextlib.suppress(*_LOST):  # gone meanwhile: look again after a while
            inotify.add_watch(directory, Mask.CREATE | Mask.MOVED_TO | Mask.ONLYDIR)
        wanted = path.relative_to(directory).parts[0]
        if (directory / wanted).exists():
            return  # before we watched
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                async for event in inotify:
                    if event.name is not None and str(event.name) == wanted:
                        return
