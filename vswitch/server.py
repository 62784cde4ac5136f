"""The control socket: msgpack maps in, msgpack maps out.

    {"command": NAME, ...arguments}  ->  {"ok": result} or {"error": {"code", "message"}}

Whatever comes in, the manager goes on: bytes that are no message end their connection,
wrong arguments are told. Who may not ask (`peer.py`) is told why, once.
"""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgpack

from ports.errors import PortError
from vswitch import peer
from vswitch.errors import EXIT_FAILED, VswitchError

_REFUSED_S: Final = 5.0
_MAX_MESSAGE: Final = 1 << 20
_READ: Final = 1 << 16
# What a value out of a message may do to whoever uses it: an infinite number, or lists in
# lists, as deep as a message may have them, when an error is to show them.
_BAD_ARGUMENTS: Final = (
    ArithmeticError,
    KeyError,
    RecursionError,
    TypeError,
    ValueError,
)

Arguments = dict[str, Any]
Commands = dict[str, Callable[[Arguments], Awaitable[Any]]]


class ControlServer:
    """Serves commands at a path, from `start` to `stop`."""

    def __init__(self, path: Path, commands: Commands) -> None:
        self._path = path
        self._commands = commands
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_unix_server(
            self._talk, self._path, limit=_MAX_MESSAGE
        )
        with contextlib.suppress(PermissionError):  # not our group: then only we may
            os.chown(self._path, -1, self._path.parent.stat().st_gid)
        self._path.chmod(0o660)

    async def stop(self) -> None:
        """Hang up on everybody."""
        self._server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    async def _talk(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        if task:
            self._clients.add(task)
            task.add_done_callback(self._clients.discard)
        unpacker = msgpack.Unpacker(max_buffer_size=_MAX_MESSAGE)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await self._check_peer(reader, writer)
            while data := await reader.read(_READ):
                await self._answer_all(unpacker, data, writer)
        writer.close()

    async def _check_peer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer the first request of somebody who may not ask, and hang up."""
        connection = writer.get_extra_info("socket")
        refusal = peer.refusal(connection, self._path.parent)
        if refusal:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(_READ), _REFUSED_S)
            writer.write(msgpack.packb(_error(EXIT_FAILED, refusal)))
            raise ConnectionError(refusal)

    async def _answer_all(
        self, unpacker: "msgpack.Unpacker", data: bytes, writer: asyncio.StreamWriter
    ) -> None:
        try:
            unpacker.feed(data)
            for request in unpacker:
                writer.write(msgpack.packb(await self._answer(request)))
                await writer.drain()
        except (ValueError, msgpack.UnpackException) as error:
            text = f"control socket: bytes that are no message: {error}"
            writer.write(msgpack.packb(_error(EXIT_FAILED, text)))
            raise ConnectionError(text) from error

    async def _answer(self, request: object) -> Arguments:
        arguments = dict(request) if isinstance(request, dict) else {}
        name = arguments.pop("command", None)
        command = self._commands.get(name) if isinstance(name, str) else None
        if command is None:
            what = repr(name) if isinstance(name, str) else "that is no text"
            text = f"control socket: unknown command {what} (is the CLI of another"
            return _error(EXIT_FAILED, f"{text} version?)")
        try:
            return {"ok": await command(arguments)}
        except VswitchError as error:
            return _error(error.code, str(error))
        except (PortError, OSError, MemoryError) as error:
            return _error(EXIT_FAILED, str(error))
        except _BAD_ARGUMENTS as error:
            text = f"control socket: {name}: bad arguments: {error!r}"
            return _error(EXIT_FAILED, text)


def _error(code: int, message: str) -> Arguments:
    return {"error": {"code": code, "message": message}}
