"""Ask a manager: one msgpack map there, one back, over its Unix socket."""

import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgpack

from vswitch.control import rundir
from vswitch.errors import EXIT_FAILED, NoManagerError, VswitchError

_ANSWER_S: Final = 60.0


class Client:
    """A connection to the manager of a run directory; use as a context manager."""

    def __init__(self, run_dir: Path) -> None:
        """Connect.

        Raises:
            NoManagerError: Nobody listens there.
            VswitchError: We may not talk to it.
        """
        self._path = run_dir / rundir.CONTROL
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(_ANSWER_S)
        self._unpacker = msgpack.Unpacker()
        try:
            _connect(self._sock, self._path)
        except OSError as error:
            self._sock.close()
            raise _no_manager(self._path, error) from error

    def ask(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 (by command)
        """Send a command and wait for its result.

        Raises:
            VswitchError: The manager refused, or went away.
        """
        try:
            self._sock.sendall(msgpack.packb({"command": command, **arguments}))
            answer = self._receive()
        except OSError as error:
            text = f"no answer to {command} from the manager at {self._path}: {error}"
            raise VswitchError(f"{text} (is it still running? vswitch show)") from error
        if refusal := answer.get("error"):
            refused = VswitchError(refusal.get("message", "refused"))
            refused.code = refusal.get("code", EXIT_FAILED)
            raise refused
        return answer.get("ok")

    def _receive(self) -> dict[str, Any]:
        while True:
            for answer in self._unpacker:
                return dict(answer)
            data = self._sock.recv(1 << 16)
            if not data:
                message = "it closed the connection"
                raise ConnectionError(message)
            self._unpacker.feed(data)

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _connect(sock: socket.socket, path: Path) -> None:
    """Connect, also where the path is longer than an address may be."""
    directory = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


def _no_manager(path: Path, error: OSError) -> VswitchError:
    if isinstance(error, PermissionError):
        return rundir.unreachable(path.parent, path, error)
    pid = rundir.holder(path.parent)
    if pid is not None:
        text = f"no manager at {path} yet: pid {pid} is starting or stopping"
        return NoManagerError(f"{text} (try again in a moment)")
    return NoManagerError(f"no manager at {path} (start it with: vswitch up)")
