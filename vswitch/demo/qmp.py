"""QEMU's machine protocol, as far as the rig needs it: one command, one answer."""

import json
import socket
from typing import Any

from vswitch.errors import VswitchError


class Qmp:
    """One connection to a QEMU.

    Args:
        sock: Connected to QEMU's monitor in control mode; closed by `close`.
        timeout: Longest wait for an answer, seconds.
    """

    def __init__(self, sock: socket.socket, timeout: float = 10.0) -> None:
        sock.settimeout(timeout)
        self._sock = sock
        self._lines = sock.makefile("rb")
        self._greeted = False
        self._events: list[dict[str, Any]] = []

    def execute(self, command: str, **arguments: object) -> Any:  # noqa: ANN401
        """Run one command and return its result.

        Raises:
            VswitchError: QEMU refused it.
            OSError: QEMU is gone or does not answer.
        """
        if not self._greeted:
            self._greeted = True
            self.execute("qmp_capabilities")
        request = {"execute": command, "arguments": arguments}
        self._sock.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = self._read()
            if "error" in answer:
                said = answer["error"]["desc"]
                message = f"cannot run QMP command {command}: QEMU said {said!r}"
                raise VswitchError(message)
            if "return" in answer:  # else the greeting or an event
                return answer["return"]

    def human(self, line: str) -> None:
        """Run a command of the human monitor: those take options as QEMU's own line does.

        Raises:
            VswitchError: It said anything, which is what commands that fail do.
            OSError: QEMU is gone or does not answer.
        """
        said = self.execute("human-monitor-command", **{"command-line": line})
        if said:
            message = f"cannot run monitor command {line!r}: QEMU said {said!r}"
            raise VswitchError(message)

    def wait_for_event(self, name: str, **data: object) -> dict[str, Any]:
        """Return what an event says when it comes, or came since the last of these calls.

        Args:
            name: The event's name.
            data: What it has to say, among other things.

        Raises:
            OSError: It does not come, or QEMU is gone.
        """
        while True:
            while self._events:
                event = self._events.pop(0)
                said: dict[str, Any] = event.get("data", {})
                if event["event"] == name and data.items() <= said.items():
                    return said
            self._read()

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            text = "QEMU closed its monitor"
            raise ConnectionError(text)
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self._events.append(message)
        return message

    def close(self) -> None:
        """Close the connection; QEMU goes on."""
        self._lines.close()
        self._sock.close()
