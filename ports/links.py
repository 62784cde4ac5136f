"""Network interfaces through netlink: bring one up, hear of changes.

The only file that knows pyroute2, which is loaded when the first uplink is added.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from ports.errors import PortError

_RTMGRP_LINK: Final = 1
_IFF_UP: Final = 1


class LinkMonitor:
    """Whether one interface is up, from now on.

    `changed` is called with "up", "down" or "gone" at once and at every change.
    """

    def __init__(self, name: str, changed: Callable[[str], None]) -> None:
        self._name = name
        self._changed = changed
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Subscribe, then look: no change can fall between."""
        started = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._watch(started))
        await started

    async def stop(self) -> None:
        """Unsubscribe."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self, started: "asyncio.Future[None]") -> None:
        from pyroute2 import AsyncIPRoute  # noqa: PLC0415 (0.1 s that most never need)

        async with AsyncIPRoute() as netlink:
            await netlink.bind(groups=_RTMGRP_LINK)
            found = await netlink.link_lookup(ifname=self._name)
            index = found[0] if found else 0
            async for link in await netlink.get_links(index):
                self._changed("up" if link["flags"] & _IFF_UP else "down")
            started.set_result(None)
            while True:
                async for event in netlink.get():
                    self._look_at(event, index)

    def _look_at(self, event: dict[str, object], index: int) -> None:
        if event.get("index") != index:
            return
        if event.get("event") == "RTM_DELLINK":
            self._changed("gone")
        elif event.get("event") == "RTM_NEWLINK":
            self._changed("up" if int(str(event["flags"])) & _IFF_UP else "down")


async def bring_up(name: str) -> None:
    """Set an interface up.

    Raises:
        PortError: We may not, or it is gone.
    """
    from pyroute2 import AsyncIPRoute  # noqa: PLC0415 (0.1 s that most never need)
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    try:
        async with AsyncIPRoute() as netlink:
            (index,) = await netlink.link_lookup(ifname=name)
            await netlink.link("set", index=index, state="up")
    except (NetlinkError, ValueError) as error:
        message = f"cannot set {name} up: {error} (this needs CAP_NET_ADMIN)"
        raise PortError(message) from error
