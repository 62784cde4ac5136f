"""QEMU's machine protocol, as far as the rig needs it: one command, one answer."""

import json
import socket

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

    def execute(self, command: str, **arguments: object) -> object:
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
            line = self._lines.readline()
            if not line:
                message = "QEMU closed its monitor"
                raise ConnectionError(message)
            answer = json.loads(line)
            if "error" in answer:
                said = answer["error"]["desc"]
                message = f"cannot run QMP command {command}: QEMU said {said!r}"
                raise VswitchError(message)
            if "return" in answer:  # else the greeting or an event
                return answer["return"]

    def close(self) -> None:
        """Close the connection; QEMU goes on."""
        self._lines.close()
        self._sock.close()
