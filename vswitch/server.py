"""The control socket: msgpack maps in, msgpack maps out.

    {"command": NAME, ...arguments}  ->  {"ok": result} or {"error": {"code", "message"}}

Whatever comes in, the manager goes on: bytes that are no message end their connection,
wrong arguments are told.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgpack

from ports.errors import PortError
from vswitch.errors import EXIT_FAILED, VswitchError

_MAX_MESSAGE: Final = 1 << 20
_READ: Final = 1 << 16

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
            while data := await reader.read(_READ):
                await self._answer_all(unpacker, data, writer)
        writer.close()

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
            message = {"error": {"code": EXIT_FAILED, "message": text}}
            writer.write(msgpack.packb(message))
            raise ConnectionError(text) from error

    async def _answer(self, request: object) -> Arguments:
        name = request.get("command") if isinstance(request, dict) else None
        command = self._commands.get(str(name))
        if command is None or not isinstance(request, dict):
            text = f"control socket: unknown command {name!r} (is the CLI of another"
            return {"error": {"code": EXIT_FAILED, "message": f"{text} version?)"}}
        try:
            return {"ok": await command(request)}
        except VswitchError as error:
            return {"error": {"code": error.code, "message": str(error)}}
        except (PortError, OSError, MemoryError) as error:
            return {"error": {"code": EXIT_FAILED, "message": str(error)}}
        except (KeyError, TypeError, ValueError) as error:
            text = f"control socket: {name}: bad arguments: {error!r}"
            return {"error": {"code": EXIT_FAILED, "message": text}}
