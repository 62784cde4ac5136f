"""Network interfaces through netlink: look at one, bring it up, hear of changes.

The only file that knows pyroute2, which is loaded when the first uplink is added.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, NamedTuple

from ports.errors import PortError, errno_name

_RTMGRP_LINK: Final = 1
_IFF_UP: Final = 1
# Frames pass from then on. It follows the carrier, which the kernel has to act on first.
_IFF_RUNNING: Final = 1 << 6
_RT_SCOPE_LINK: Final = 253
_LONGEST_NAME: Final = 15
_AGAIN_S: Final = 0.1

_log = logging.getLogger(__name__)


class Link(NamedTuple):
    """An interface as it is now."""

    ifindex: int
    is_up: bool  # set up by whoever runs the machine
    has_carrier: bool
    mtu: int
    hardware: int  # ARPHRD_*, linux/if_arp.h
    master: int  # index of the bridge or bond that has it, or 0
    kind: str  # of what the kernel makes up, as veth; empty for hardware
    attached: int = 0  # queues that programs have, of a tap that has many


class LinkMonitor:
    """Whether one interface is up, from now on.

    `changed` is called with "up", "down", "gone", or "moved" (to another network
    namespace, where we do not see it) at once and at every change. `link` is the
    interface as it was last seen. With `returns`, another interface that gets the name
    of one that is gone or moved is followed in its place.
    """

    def __init__(
        self, name: str, changed: Callable[[str], None], *, returns: bool = False
    ) -> None:
        self.link: Link | None = None
        self._name = name
        self._changed = changed
        self._returns = returns
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
            self._note(await self._find(netlink))
            if not started.done():
                started.set_result(None)
            while True:
                async for event in netlink.get():
                    self._look_at(event)

    async def _find(self, netlink: Any) -> Link | None:  # noqa: ANN401 (no types)
        link = await _look(netlink, self._index)
        if link is None and self._returns:
            with contextlib.suppress(OSError):  # there is none
                self._index = socket.if_nametoindex(self._name)
                link = await _look(netlink, self._index)
        return link

    def _look_at(self, event: Any) -> None:  # noqa: ANN401 (pyroute2 has no types)
        kind = event.get("event")
        if event.get("index") != self._index:
            vacant = self._returns and self.link is None
            if not (
                vacant and kind == "RTM_NEWLINK" and event.get("ifname") == self._name
            ):
                return
            self._index = int(event["index"])
        if kind == "RTM_DELLINK":
            self.link = None
            moved = event.get("new_ifindex") is not None
            self._changed("moved" if moved else "gone")
        elif kind == "RTM_NEWLINK":
            self._note(_link(event))

    def _note(self, link: Link | None) -> None:
        self.link = link
        if link is None:
            self._changed("gone")
        else:
            self._changed("up" if link.is_up else "down")


def check_name(kind: str, interface: str) -> None:
    """Refuse a name that no interface can have.

    Raises:
        PortError: It is empty, too long, or has a character the kernel refuses.
    """
    cannot = f"cannot use {kind} {interface!r}"
    if not 0 < len(interface.encode()) <= _LONGEST_NAME:
        message = f"{cannot}: a name has 1 to {_LONGEST_NAME} bytes"
        raise PortError(f"{message} (choose another)")
    if interface in {".", ".."} or any(c.isspace() or c in "/:%\0" for c in interface):
        message = f"{cannot}: it has a character the kernel refuses"
        raise PortError(f"{message} (use letters, digits, - and _)")


async def find(name: str) -> Link | None:
    """An interface as it is now, if there is one of that name."""
    with contextlib.suppress(OSError):  # there is none
        index = socket.if_nametoindex(name)
        async with _netlink() as netlink:
            return await _look(netlink, index)
    return None


async def look_up(name: str) -> Link:
    """An interface as it is now.

    Raises:
        PortError: There is none of that name.
    """
    link = await find(name)
    if link is None:
        cannot = f"cannot use interface {name}"
        raise PortError(f"{cannot}: there is none (choose one of: ip link show)")
    return link


async def addresses(index: int) -> list[str]:
    """The interface's IP addresses, as 192.0.2.1/24, but for those of its link alone.

    Raises:
        OSError: Netlink refuses us.
    """
    async with _netlink() as netlink:
        return [
            f"{found.get('local') or found.get('address')}/{found['prefixlen']}"
            async for found in await netlink.get_addr(index=index)
            if found["scope"] != _RT_SCOPE_LINK
        ]


async def bring_up(name: str) -> None:
    """Set an interface up unless it is, since only that takes a capability.

    Raises:
        PortError: We may not, or it is gone.
    """
    try:
        index = socket.if_nametoindex(name)
        async with _netlink() as netlink:
            link = await _look(netlink, index)
            if link and not link.is_up:
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


async def _look(netlink: Any, index: int) -> Link | None:  # noqa: ANN401 (no types)
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    try:
        links = [link async for link in await netlink.get_links(index)]
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise
        links = []
    return _link(links[0]) if links else None


def _link(message: Any) -> Link:  # noqa: ANN401 (pyroute2 has no types)
    flags = int(message["flags"])
    return Link(
        ifindex=int(message["index"]),
        is_up=bool(flags & _IFF_UP),
        has_carrier=bool(flags & _IFF_RUNNING),
        mtu=int(message.get("mtu") or 0),
        hardware=int(message["ifi_type"]),
        master=int(message.get("master") or 0),
        kind=str(message.get(("linkinfo", "kind")) or ""),
        attached=_attached(message),
    )


def _attached(message: Any) -> int:  # noqa: ANN401 (pyroute2 has no types)
    """The kernel itself keeps two programs from a tap of one queue."""
    about = message.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
    if not about or not about.get("IFLA_TUN_MULTI_QUEUE"):
        return 0
    queues = ("IFLA_TUN_NUM_QUEUES", "IFLA_TUN_NUM_DISABLED_QUEUES")
    return sum(int(about.get(name) or 0) for name in queues)
