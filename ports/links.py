"""Network interfaces through netlink: bring one up, hear of changes.

The only file that knows pyroute2, which is loaded when the first uplink is added.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from ports.errors import PortError, errno_name

_RTMGRP_LINK: Final = 1
_IFF_UP: Final = 1
_AGAIN_S: Final = 0.1

_log = logging.getLogger(__name__)


class LinkMonitor:
    """Whether one interface is up, from now on.

    `changed` is called with "up", "down", "gone", or "moved" (to another network
    namespace, where we do not see it) at once and at every change.
    """

    def __init__(self, name: str, changed: Callable[[str], None]) -> None:
        self._name = name
        self._changed = changed
        self._index = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Subscribe, then look: no change can fall between.

        Raises:
            PortError: The interface is gone already, or netlink refuses us.
        """
        started = asyncio.get_running_loop().create_future()
        try:
            self._index = socket.if_nametoindex(self._name)
            self._task = asyncio.create_task(self._watch(started))
            await started
        except OSError as error:
            text = f"cannot watch interface {self._name}: {errno_name(error)}"
            raise PortError(text) from error

    async def stop(self) -> None:
        """Unsubscribe."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self, started: "asyncio.Future[None]") -> None:
        """Follow the link; begin anew when the kernel had no room for an event."""
        while True:
            try:
                await self._follow(started)
            except OSError as error:
                if not started.done():
                    started.set_exception(error)
                    return
                cause = errno_name(error)
                _log.warning("interface %s: looking anew: %s", self._name, cause)
                await asyncio.sleep(_AGAIN_S)

    async def _follow(self, started: "asyncio.Future[None]") -> None:
        async with _netlink() as netlink:
            await netlink.bind(groups=_RTMGRP_LINK)
            self._changed(await _look(netlink, self._index))
            if not started.done():
                started.set_result(None)
            while True:
                async for event in netlink.get():
                    self._look_at(event)

    def _look_at(self, event: Any) -> None:  # noqa: ANN401 (pyroute2 has no types)
        if event.get("index") != self._index:
            return
        if event.get("event") == "RTM_DELLINK":
            moved = event.get("new_ifindex") is not None
            self._changed("moved" if moved else "gone")
        elif event.get("event") == "RTM_NEWLINK":
            self._changed("up" if int(event["flags"]) & _IFF_UP else "down")


async def bring_up(name: str) -> None:
    """Set an interface up unless it is, since only that takes a capability.

    Raises:
        PortError: We may not, or it is gone.
    """
    try:
        index = socket.if_nametoindex(name)
        async with _netlink() as netlink:
            if await _look(netlink, index) == "down":
                await netlink.link("set", index=index, state="up")
    except PermissionError as error:
        text = f"cannot set {name} up: EPERM: we have no CAP_NET_ADMIN"
        raise PortError(f"{text} (ip link set {name} up)") from error
    except OSError as error:
        raise PortError(f"cannot set {name} up: {errno_name(error)}") from error


@contextlib.asynccontextmanager
async def _netlink() -> AsyncIterator[Any]:
    """A netlink socket whose errors are OSErrors."""
    from pyroute2 import AsyncIPRoute  # noqa: PLC0415 (0.1 s that most never need)
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    try:
        async with AsyncIPRoute() as netlink:
            yield netlink
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error


async def _look(netlink: Any, index: int) -> str:  # noqa: ANN401 (no types)
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    try:
        links = [link async for link in await netlink.get_links(index)]
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise
        links = []
    if not links:
        return "gone"
    return "up" if links[0]["flags"] & _IFF_UP else "down"
