"""What asyncio does not have: waiting for descriptors, work that is not cut short."""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def readable(fd: int) -> None:
    """Wait until `fd` can be read; replaces another reader of it."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _set, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def writable(fd: int) -> None:
    """Wait until `fd` can be written."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(fd, _set, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


async def unbroken(work: Coroutine[Any, Any, None]) -> None:
    """Do `work` to its end; a cancellation meanwhile takes effect only after it."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _set(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)
