"""A vhost-user port: one guest, attached through a Unix socket.

Life cycle: `open` listens (server mode) or starts to connect (client mode). One front-end
at a time is served by a task that reads a message, lets the session change what is
*wanted*, brings the port there (`vhost/applied.py`), and only then replies. When the
front-end goes away everything it gave us is given back and the port waits for the next
one.

A manager that is killed leaves the session to its successor (`resume`). For that two things
are kept where they outlive us (`Host.keep`): the session, as it was when its last message
had been answered, and the message after that, before it is read. PORT.heard tells which
was read.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from ports.aio import readable, unbroken, writable
from ports.appear import appeared
from ports.base import KIND_NONE, KIND_VHOST_USER
from ports.burst import MAX_FRAME
from ports.errors import ProtocolError, errno_name
from ports.host import NO_CHOICE, Answer, Host, State
from ports.vhost import saved
from ports.vhost.applied import Applied
from ports.vhost.channel import Channel, close_fds
from ports.vhost.features import OFFERED_PROTOCOL, feature_names
from ports.vhost.messages import PF_CONFIG, Message
from ports.vhost.session import NOT_SHARED, Session, Step
from ports.vhost.sockets import Access, check_path, explain_refusal, listen

_CONNECT_S: Final = 0.01
_LOOK_AGAIN_S: Final = 1.0
_MEMORY_DUE_S: Final = 1.0
_LOG_WINDOW_S: Final = 10.0
_LOG_LINES: Final = 20
_BRIEF_S: Final = 1.0
_LEFT_OFTEN: Final = 3
_FAULTS_COUNT_S: Final = 3600.0  # a fault is forgotten after that
_IN_PIECES: Final = -1  # PORT.heard: a part of a message is read

_log = logging.getLogger(__name__)


class VhostUserPort:
    """Control half of a vhost-user port."""

    kind = "vhost-user"
    backend = NO_CHOICE
    warnings: Sequence[str] = ()

    def __init__(
        self,
        host: Host,
        slot: int,
        name: str,
        path: Path,
        mode: str,
        pairs: int,
        *,
        access: Access,
        config_space: bool = False,
    ) -> None:
        self.name = name
        self.path = path
        self.mode = mode
        self._host = host
        self._slot = slot
        self._pairs = pairs
        self._access = access
        self._offered_protocol = OFFERED_PROTOCOL | (PF_CONFIG if config_space else 0)
        self._listener: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._session: Session | None = None
        self._features_since = 0.0
        self._applied = Applied(host, slot, pairs, self._quarantine)
        self._serial = 0  # of the message that was kept last
        self._trouble: OSError | None = None
        self._connection: socket.socket | None = None
        self._quarantined = ""  # why, until another front-end's frames flow
        self._culprit: Session | None = None
        self._faults = 0  # workers that ended at a ring of ours
        self._fault_at = 0.0
        self._connected = 0.0
        self._left_early = 0  # front-ends in a row that soon went while negotiating
        self._log_window = 0.0
        self._logged = 0

    # --- life ---

    async def open(self) -> None:
        """Listen, or begin to look for the front-end's socket.

        Raises:
            PortError: The path cannot be used.
        """
        check_path(self.path)
        if self.mode == "server":
            self._listener = listen(self.path, self._access)
        self._record["kind"] = KIND_VHOST_USER
        self._record["max_frame"] = MAX_FRAME
        self._applied.number_rings()
        self._keep()
        self._tasks.append(asyncio.create_task(self._serve_forever()))

    async def resume(self, kept: dict[str, Any], fds: Sequence[int]) -> None:
        """Go on where a manager that was killed left off, in place of `open`.

        Its front-end notices a pause at most. When this returns nothing is used any more
        that workers were given before.

        Args:
            kept: What that manager kept last, see `_keep`.
            fds: The descriptors beside it, ours from now on.

        Raises:
            PortError: Nobody is connected, nobody can as the socket's file is gone, and
                it cannot be made.
        """
        ours = list(fds)
        if self.mode == "server":
            self._listener = socket.socket(fileno=ours.pop(0))
            if kept["session"] is None and not self.path.exists():
                self._listener.close()
                self._listener = listen(self.path, self._access)
        self._serial = kept["serial"]
        self._quarantined, self._faults = kept["quarantined"], kept["faults"]
        self._applied.load(kept["applied"])
        if kept["session"] is None:
            await self._applied.stop_all()
            self._tasks.append(asyncio.create_task(self._serve_forever()))
            return
        channel = self._begin(socket.socket(fileno=ours.pop(0)))
        heard = ours[kept["fds"] :]
        session = self._session = saved.load_session(kept["session"], ours)
        step = self._hear_again(channel, session, kept["message"], list(heard))
        self._applied.note_running(session)
        # Where rings stand is not to be seen any more when they are stopped.
        again = kept | {"applied": self._applied.save()}
        self._host.keep(self._slot, again, fds[: len(fds) - len(heard)])
        await self._applied.stop_all()
        try:
            await self._reconcile(session)
        except (OSError, MemoryError) as error:
            self._log(f"cannot take again what the front-end gave: {error}")
            channel.shut()
        if int(self._record["heard"]) == _IN_PIECES:
            self._log("a part of a message is lost")
            channel.shut()
        self._log("resumed")
        self._tasks.append(asyncio.create_task(self._go_on(channel, session, step)))

    def _hear_again(
        self,
        channel: Channel,
        session: Session,
        kept: dict[str, Any] | None,
        fds: list[int],
    ) -> Step | None:
        """Take the last message if it was read and not done with; what is left to do."""
        if not kept or kept["serial"] <= self._serial:
            close_fds(fds)
            return None
        was_read = kept["serial"] == int(self._record["heard"])
        if not was_read and channel.waits_with(kept["data"]):
            close_fds(fds)
            return None
        self._serial = kept["serial"]
        return session.handle(saved.load_message(kept["data"], fds))

    async def _go_on(
        self, channel: Channel, session: Session, begun: Step | None
    ) -> None:
        await self._attend(channel, session, begun)
        await self._serve_forever()

    async def _serve_forever(self) -> None:
        while True:
            try:
                if self._listener:
                    await self._accept(self._listener)
                else:
                    await self._connect()
            except OSError as error:  # most likely there are no more descriptors
                self._log(f"cannot take a front-end: {errno_name(error)}")
                await asyncio.sleep(_LOOK_AGAIN_S)

    def _keep(self, answer: bytes = b"") -> bool:
        """Have the port's state outlive us, after any change to it.

        With it goes the answer to the message that has changed it; False if it does not.
        """
        fds = [self._listener.fileno()] if self._listener else []
        kept: dict[str, Any] = {
            "serial": self._serial,
            "quarantined": self._quarantined,
            "faults": self._faults,
            "applied": self._applied.save(),
            "session": None,
        }
        place = len(fds)
        if self._session and self._connection:
            fds.append(self._connection.fileno())
            kept["session"], own = saved.save_session(self._session)
            kept["fds"] = len(own)
            fds += own
        done = self._host.keep(self._slot, kept, fds, Answer(place, answer))
        self._host.keep_message(self._slot, None)
        return done

    def _keep_message(self, data: bytes, fds: Sequence[int]) -> None:
        """Have a message outlive us that is about to be read."""
        self._serial += 1
        words = {"serial": self._serial, "data": data}
        self._host.keep_message(self._slot, words, fds)

    async def close(self) -> None:
        """Let the front-end go and give everything back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener:
            self._listener.close()
            self.path.unlink(missing_ok=True)
        self._record["kind"] = KIND_NONE

    # --- what users see ---

    def state(self) -> State:
        """The port's state and its reason."""
        session = self._session
        if warning := self._warning():
            return warning
        if session is None:
            return State("waiting-for-frontend", self._what_for())
        if self._applied.up:
            return State("up", self._describe_rings())
        problem = self._problem(session)
        if problem:
            return State("waiting-for-driver", problem)
        if not session.protocol_features and not session.features_known:
            return State("negotiating", "the front-end is connected")
        return State("waiting-for-driver", "the guest's driver has not started")

    def features(self) -> list[str]:
        """Names of the negotiated virtio features."""
        session = self._session
        return feature_names(session.features or 0) if session else []

    def queues(self) -> dict[str, int]:
        """Queue pairs: enabled ones, and how many a guest may have."""
        return {
            "enabled": self._applied.enabled_pairs,
            "max": self._pairs,
        }

    def note_fault(self, queue: int, what: str) -> None:
        """Part from the front-end when a second worker ends at a ring of the port.

        The first may have been any mistake of ours. The rings are stopped before
        anybody takes them up.

        Args:
            queue: The virtqueue that the worker was at.
            what: What became of it.
        """
        now = time.monotonic()
        if now - self._fault_at > _FAULTS_COUNT_S:
            self._faults = 0
        self._fault_at = now
        self._faults += 1
        reason = f"a worker {what} while it served virtqueue {queue}"
        if self._faults == 1:
            self._log(f"{reason} (once more, and the port is quarantined)")
            return
        self._applied.stop_now()
        self._quarantine(f"{reason}, and not for the first time")

    def _warning(self) -> State | None:
        """What is wrong with front-ends that come and go."""
        if self._quarantined:
            return State("quarantined", f"{self._quarantined} (start the guest anew)")
        if self._left_early >= _LEFT_OFTEN and self._is_new():
            text = "front-ends leave while negotiating (has their guest more than"
            return State("negotiating", f"{text} {self._pairs} queue pairs?)")
        return None

    def _what_for(self) -> str:
        if self.mode == "server":
            return f"listening on {self.path}"
        trouble = self._trouble and explain_refusal(self.path, self._trouble)
        return f"connecting to {self.path}: {trouble or 'no front-end yet'}"

    def _is_new(self) -> bool:
        """Whether the last front-end connected a moment ago."""
        return time.monotonic() - self._connected < _BRIEF_S

    def _describe_rings(self) -> str:
        pairs, broken = self._applied.enabled_pairs, self._applied.broken
        text = f"{pairs} queue pair{'s' if pairs != 1 else ''}"
        if broken:
            text += f"; virtqueue {broken[0]} is broken: the guest's indexes make no"
            text += " sense (reset the guest's driver)"
        return text

    def _problem(self, session: Session) -> str:
        if session.memory_problem:
            return session.memory_problem
        waited = time.monotonic() - self._features_since
        if session.features_known and not session.memory and waited > _MEMORY_DUE_S:
            return NOT_SHARED
        return session.problem

    # --- the socket ---

    async def _accept(self, listener: socket.socket) -> None:
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        await self._serve(connection)

    async def _connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A Unix socket connects at once or not at all.
            connection.setblocking(False)
            connection.connect(str(self.path))
        except OSError as error:
            connection.close()
            self._trouble = error.with_traceback(None)
            if isinstance(error, FileNotFoundError):
                await appeared(self.path, _LOOK_AGAIN_S)
            else:
                # Nothing tells when somebody begins to listen on a socket.
                await asyncio.sleep(_CONNECT_S)
            return
        await self._serve(connection)

    async def _serve(self, connection: socket.socket) -> None:
        """Serve one front-end until it goes, or breaks the protocol."""
        channel = self._begin(connection)
        session = self._session = Session(
            self._pairs, offered_protocol=self._offered_protocol
        )
        self._applied.ran.clear()
        self._record["heard"] = self._serial
        try:
            self._keep()
        except OSError:
            channel.close()
            self._session = None
            raise
        self._log("connected")
        await self._attend(channel, session, None)

    def _begin(self, connection: socket.socket) -> Channel:
        self._connection = connection
        self._features_since = 0.0
        self._connected = time.monotonic()
        return Channel(connection, self._keep_message)

    async def _attend(
        self, channel: Channel, session: Session, begun: Step | None
    ) -> None:
        """Serve a front-end to its end, once what was begun for it is done."""
        try:
            if begun:
                await self._do(channel, session, begun)
            await self._converse(channel, session)
        except EOFError:
            self._log("the front-end went away")
        except ProtocolError as error:
            self._log(f"{error}; closing the connection")
        except Exception:  # noqa: BLE001 (our mistake costs a connection, not the port)
            _log.exception("port %s: closing the connection", self.name)
        finally:
            channel.close()
            await unbroken(self._disconnect(session))

    async def _converse(self, channel: Channel, session: Session) -> None:
        while True:
            message = await self._receive(channel)
            known = session.features_known
            step = session.handle(message)
            if step.refused:
                self._log(step.refused)
            if session.features_known and not known:
                self._features_since = time.monotonic()
                asyncio.get_running_loop().call_later(
                    _MEMORY_DUE_S + 0.1, self._warn_of_missing_memory, session
                )
            await self._do(channel, session, step)

    async def _do(self, channel: Channel, session: Session, step: Step) -> None:
        """Do what a message asks for, then answer it."""
        reply = step.reply
        try:
            await unbroken(self._reconcile(session))
        except (OSError, MemoryError) as error:
            self._log(f"cannot take what the front-end gave: {error}")
            if step.nack is None:
                raise ProtocolError("cannot go on without it") from error
            reply = step.nack
        if step.base is not None:
            reply = step.base.encode(self._applied.next_index(step.base))
        for address in session.take_announced():
            await self._host.announce(self._slot, address)
        close_fds(session.take_retired())
        await self._answer(channel, reply or b"")
        if step.close:
            raise ProtocolError(step.refused or "the message cannot be answered")

    async def _answer(self, channel: Channel, reply: bytes) -> None:
        """Be done with a message; the keeper sends the answer where that cannot wait."""
        if channel.has_room:
            if not self._keep(reply) and reply:
                await self._send(channel, reply)
            return
        self._host.settle()
        if reply:
            await self._send(channel, reply)
        self._keep()

    async def _reconcile(self, session: Session) -> None:
        await self._applied.reconcile(session)
        if self._applied.up and session is not self._culprit:
            self._quarantined = ""

    async def _receive(self, channel: Channel) -> Message:
        while True:
            before = self._serial
            message = channel.receive(time.monotonic())
            if message is not None:
                self._serial = before + 1  # in pieces, too
                self._record["heard"] = self._serial
                return message
            due = channel.deadline_s
            if due is not None:
                self._record["heard"] = _IN_PIECES
            timeout = None if due is None else max(0.0, due - time.monotonic())
            try:
                await asyncio.wait_for(readable(channel.fileno()), timeout)
            except TimeoutError:
                message_text = "a message was begun and not completed"
                raise ProtocolError(message_text) from None

    async def _send(self, channel: Channel, reply: bytes) -> None:
        channel.send(reply)
        while channel.wants_write:
            await writable(channel.fileno())
            channel.flush()

    async def _disconnect(self, session: Session) -> None:
        early = not session.features_known and self._is_new()
        self._left_early = self._left_early + 1 if early else 0
        await self._applied.leave(session)
        await self._host.forget(self._slot)
        close_fds(session.take_retired())
        self._session = None
        self._keep()

    def _quarantine(self, reason: str) -> None:
        """Part from a front-end that took away what we had from it."""
        self._log(f"{reason}; closing the connection")
        self._quarantined, self._culprit = reason, self._session
        if self._connection:
            with contextlib.suppress(OSError):  # it is gone
                self._connection.shutdown(socket.SHUT_RDWR)

    @property
    def _record(self) -> np.void:
        return cast("np.void", self._host.ports[self._slot])

    def _warn_of_missing_memory(self, session: Session) -> None:
        if session is self._session and not session.memory:
            self._log(NOT_SHARED)

    def _log(self, text: str) -> None:
        """Log a line; of a storm of lines (a reconnect loop) the first, then how many."""
        now = time.monotonic()
        if now - self._log_window > _LOG_WINDOW_S and self._logged <= _LOG_LINES:
            self._log_window, self._logged = now, 0
        self._logged += 1
        if self._logged <= _LOG_LINES:
            _log.info("port %s: %s", self.name, text)
        elif self._logged == _LOG_LINES + 1:
            _log.info("port %s: more lines; they are counted for a while", self.name)
            asyncio.get_running_loop().call_later(_LOG_WINDOW_S, self._log_count)

    def _log_count(self) -> None:
        """Log how many lines were left out, and begin anew."""
        left_out = self._logged - _LOG_LINES
        _log.info("port %s: %d lines left out", self.name, left_out)
        self._log_window, self._logged = time.monotonic(), 0
