"""A session as plain values and descriptors, for whoever goes on with it.

Numba-free. Descriptors are named by their place in a list that goes beside the values.
What is derived is not kept. Both sides are of one version: `FORMAT` changes with what is
written here.
"""

from collections.abc import Sequence
from typing import Any, Final

from ports.base import NO_FD
from ports.vhost.channel import close_fds
from ports.vhost.messages import (
    FLAG_NEED_REPLY,
    HEADER_LEN,
    RULES,
    Message,
    Request,
    VringAddr,
    VringFd,
    decode_header,
)
from ports.vhost.session import Session
from ports.vhost.wanted import WantedRegion, WantedRing

FORMAT: Final = 1

_PLAIN: Final = (
    *("max_pairs", "offered", "offered_protocol", "features", "protocol_features"),
    *("memory_problem", "mtu", "status", "status_given", "announced"),
)
_RING: Final = ("num", "base", "started", "enable")
_RING_FDS: Final = ("kick_fd", "call_fd", "err_fd")

_ALL: Final = ("addr", *_RING, *_RING_FDS)
_WITH_FD: Final = frozenset(
    {Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR}
)

Words = dict[str, Any]


def save_session(session: Session) -> tuple[Words, list[int]]:
    """What a session wants, and its descriptors, which stay its own."""
    fds: list[int] = []
    words: Words = {name: getattr(session, name) for name in _PLAIN}
    words["config"] = bytes(session.config.content)
    words["memory"] = [_save_region(region, fds) for region in session.memory]
    log = session.given_log
    words["log"] = log and _save_region(log, fds)
    words["rings"] = [
        [ring.index, _save_ring(ring, fds)] for ring in session.rings if _is_used(ring)
    ]
    return words, fds


def load_session(words: Words, fds: Sequence[int]) -> Session:
    """The session that was saved; `fds` become its own."""
    session = Session(words["max_pairs"], words["offered"], words["offered_protocol"])
    for name in _PLAIN:
        setattr(session, name, words[name])
    session.config.content[:] = words["config"]
    session.memory = tuple(_load_region(row, fds) for row in words["memory"])
    session.given_log = words["log"] and _load_region(words["log"], fds)
    rings = {index: _load_ring(index, ring, fds) for index, ring in words["rings"]}
    session.rings = tuple(rings.get(ring.index, ring) for ring in session.rings)
    session.judge_rings()
    return session


def load_message(data: bytes, fds: Sequence[int]) -> Message:
    """A message that was seen as a whole; of `fds`, those that belong to it are its own.

    The others, which are the next message's, are closed.
    """
    header, payload = decode_header(data[:HEADER_LEN]), data[HEADER_LEN:]
    rule = RULES.get(header.request)
    due = rule.max_fds if rule else 0
    if header.request in _WITH_FD:
        due = int(VringFd.decode(payload).has_fd)
    close_fds(fds[due:])
    need_reply = bool(header.flags & FLAG_NEED_REPLY)
    return Message(header.request, need_reply, payload, tuple(fds[:due]))


def _save_region(region: WantedRegion, fds: list[int]) -> list[int]:
    return list(region._replace(fd=_place(region.fd, fds)))


def _load_region(row: Sequence[int], fds: Sequence[int]) -> WantedRegion:
    region = WantedRegion(*row)
    return region._replace(fd=fds[region.fd])


def _is_used(ring: WantedRing) -> bool:
    """Whether anything was ever said of it; of most rings nothing is."""
    new = WantedRing(ring.index)
    return any(getattr(ring, name) != getattr(new, name) for name in _ALL)


def _save_ring(ring: WantedRing, fds: list[int]) -> Words:
    words: Words = {name: getattr(ring, name) for name in _RING}
    words |= {name: _place(getattr(ring, name), fds) for name in _RING_FDS}
    return words | {"addr": ring.addr and ring.addr.encode()}


def _load_ring(index: int, words: Words, fds: Sequence[int]) -> WantedRing:
    ring = WantedRing(index)
    for name in _RING:
        setattr(ring, name, words[name])
    for name in _RING_FDS:
        place = words[name]
        setattr(ring, name, NO_FD if place == NO_FD else fds[place])
    ring.addr = words["addr"] and VringAddr.decode(words["addr"])
    return ring


def _place(fd: int, fds: list[int]) -> int:
    if fd == NO_FD:
        return NO_FD
    fds.append(fd)
    return len(fds) - 1
