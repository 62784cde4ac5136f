"""What must outlive the manager, as the manager sees it: kept in the keeper, taken over.

A copy of each descriptor stays here as well, so that a keeper that dies can be replaced.
"""

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from ports.host import Answer
from ports.vhost.channel import close_fds
from vswitch.control import protocol, rundir
from vswitch.errors import VswitchError

_ANSWER_S: Final = 10.0
_UCRED: Final = struct.Struct("3i")  # unix(7): pid, uid, gid

_log = logging.getLogger(__name__)

Words = dict[str, Any]


class Item(NamedTuple):
    """What is kept under a key."""

    words: Words
    fds: tuple[int, ...]


class Kept:
    """All that a keeper of a run directory has; `start` or `take_over` one first."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._sock: socket.socket | None = None
        self._pidfd = -1  # of the keeper
        self._child = 0  # its pid, if we have started it
        self._items: dict[str, Item] = {}

    def start(self) -> None:
        """Start a keeper.

        Raises:
            VswitchError: It did not start.
        """
        ours, theirs = protocol.pair()
        theirs.set_inheritable(True)
        command = [sys.executable, "-m", "vswitch.keeper", str(theirs.fileno())]
        null = os.open(os.devnull, os.O_RDONLY)
        self._child = os.posix_spawn(
            sys.executable,
            [*command, str(self._run_dir)],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, null, 0)],
        )
        os.close(null)
        theirs.close()
        self._connect(ours, self._child)
        try:
            self._receive()
        except (EOFError, OSError) as error:
            self._disconnect()
            message = f"the keeper did not start: {error} (see the log)"
            raise VswitchError(message) from error

    @classmethod
    def take_over(cls, run_dir: Path) -> Self | None:
        """What a manager that was killed left with its keeper; None if there is none."""
        kept = cls(run_dir)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(str(run_dir / rundir.KEEPER))
        except OSError:
            sock.close()
            return None
        try:
            kept._connect(sock, _peer(sock))
            while (message := kept._receive())[0][0] == "keep":
                (_, key, words), fds = message
                kept._items[key] = Item(words, tuple(fds))
        except (EOFError, OSError):
            kept._disconnect()
            kept.forget()
            return None
        return kept

    def items(self, kind: str) -> dict[str, Item]:
        """What is kept under keys "`kind`.NAME", by NAME. Its descriptors stay ours."""
        prefix = f"{kind}."
        return {
            key.removeprefix(prefix): item
            for key, item in self._items.items()
            if key.startswith(prefix)
        }

    def keep(
        self,
        kind: str,
        name: object,
        words: Words,
        fds: Sequence[int],
        answer: Answer | None = None,
    ) -> bool:
        """Keep copies of descriptors, and words about them, in place of what was kept.

        Returns:
            Whether the keeper has it, and sends the answer.

        Raises:
            OSError: There are no more descriptors; what was kept before is.
        """
        key = f"{kind}.{name}"
        item = Item(words, _copies(fds))
        self._close(key)
        self._items[key] = item
        return self._send(["keep", key, words, *(answer or ())], item.fds)

    def drop(self, kind: str, name: object) -> None:
        """Keep it no more."""
        key = f"{kind}.{name}"
        if key in self._items:
            self._close(key)
            self._send(["drop", key])

    def settle(self) -> None:
        """Return when the keeper has closed what was dropped."""
        if self._sock is None:
            return
        try:
            protocol.send(self._sock, ["settle"])
            self._receive()
        except (EOFError, OSError):
            self._replace()

    def watch(self) -> None:
        """Replace the keeper when it dies."""
        if self._sock:
            loop = asyncio.get_running_loop()
            loop.add_reader(self._sock.fileno(), self._replace)

    def end(self) -> None:
        """Have the keeper close everything and end, and wait for that."""
        self.forget()
        if self._sock is None:
            return
        with contextlib.suppress(OSError, EOFError):
            protocol.send(self._sock, ["end"])
            self._receive()
        self._disconnect()
        (self._run_dir / rundir.KEEPER).unlink(missing_ok=True)

    def forget(self) -> None:
        """Close our own copies."""
        for key in list(self._items):
            self._close(key)

    # --- the keeper ---

    def _connect(self, sock: socket.socket, pid: int) -> None:
        sock.settimeout(_ANSWER_S)
        self._sock, self._pidfd = sock, os.pidfd_open(pid)

    def _receive(self) -> tuple[list[Any], list[int]]:
        assert self._sock is not None  # noqa: S101 (whoever calls has connected it)
        is_readable(self._sock.fileno(), _ANSWER_S)
        return protocol.receive(self._sock)

    def _send(self, message: list[Any], fds: Sequence[int] = ()) -> bool:
        if self._sock is None:
            return False
        try:
            protocol.send(self._sock, message, fds)
        except OSError:
            self._replace()
            return False
        return True

    def _replace(self) -> None:
        """Start another keeper in place of one that is gone, and give it everything."""
        _log.warning("the keeper is gone; starting another")
        self._disconnect()
        try:
            self.start()
        except VswitchError as error:
            _log.warning("%s; a kill of the manager would end the switch", error)
            return
        for key, item in self._items.items():
            self._send(["keep", key, item.words], item.fds)
        self.watch()

    def _disconnect(self) -> None:
        """Part from the keeper, which has ended, or does not do what it is there for."""
        if self._sock:
            with contextlib.suppress(RuntimeError):  # no loop runs
                asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._child:
            os.waitpid(self._child, 0)
            self._child = 0

    def _close(self, key: str) -> None:
        close_fds(self._items.pop(key, Item({}, ())).fds)


def _peer(sock: socket.socket) -> int:
    """The pid of the process that listens where a socket is connected to."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, _, _ = _UCRED.unpack(data)
    return int(pid)


def is_readable(fd: int, seconds: float) -> bool:
    """Whether something can be read by a descriptor of any number within some time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def _copies(fds: Sequence[int]) -> tuple[int, ...]:
    copies: list[int] = []
    try:
        copies.extend(map(os.dup, fds))
    except OSError:
        close_fds(copies)
        raise
    return tuple(copies)
