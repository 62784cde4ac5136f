"""The demo's switch: driven by the commands that a user would type, gone at the end."""

import json
import os
import select
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from vswitch import shared
from vswitch.demo.screen import Screen
from vswitch.errors import VswitchError

_COMMAND_S: Final = 300.0  # the first `up` compiles
_END_S: Final = 10.0
_CLI: Final = "from vswitch.cli import main; main()"


class Switch:
    """A run directory, and `vswitch` commands in it; use as a context manager.

    Args:
        directory: Where sockets and the run directory live; private and temporary.
        screen: Where commands and their output are shown.
    """

    def __init__(self, directory: Path, screen: Screen) -> None:
        self.directory = directory
        self._run_dir = directory / "run"
        self._screen = screen
        # Inherited by all that we start, guests too: `end` finds them by it.
        os.environ["VSWITCH_RUN_DIR"] = str(self._run_dir)
        os.environ["COLUMNS"] = str(screen.width)

    def up(self) -> None:
        """Start the switch; its progress goes straight to the terminal.

        Raises:
            VswitchError: It did not start; it has said why.
        """
        self._screen.command("host", "vswitch up")
        if self._call(("up",), capture=False).returncode:
            message = "the switch did not start"
            raise VswitchError(message)

    def show(self, *arguments: str) -> None:
        """Run a command and show what it says.

        Raises:
            VswitchError: It failed.
        """
        self._screen.command("host", shlex.join(("vswitch", *arguments)))
        self._screen.output(self._output(arguments))

    def do(self, *arguments: str) -> None:
        """Run a command that has nothing to show.

        Raises:
            VswitchError: It failed.
        """
        self._screen.command("host", shlex.join(("vswitch", *arguments)))
        self._output(arguments)

    def ask(self, *arguments: str) -> dict[str, Any]:
        """Run a command quietly and return its JSON."""
        answer: dict[str, Any] = json.loads(self._output((*arguments, "-j")))
        return answer

    def down(self) -> None:
        """End the switch as a user would."""
        self.do("down")

    def end(self) -> None:
        """Leave nothing behind, wherever we were interrupted."""
        if (self._run_dir / "control.sock").exists():
            with suppress(VswitchError, subprocess.TimeoutExpired):
                self._output(("down",), timeout=_END_S)
        mark = f"VSWITCH_RUN_DIR={self._run_dir}".encode()
        _end_processes(mark, signal.SIGTERM)
        _end_processes(mark, signal.SIGKILL)
        with suppress(OSError):
            shared.remove(self._run_dir)

    def _output(self, arguments: tuple[str, ...], timeout: float = _COMMAND_S) -> str:
        done = self._call(arguments, capture=True, timeout=timeout)
        if done.returncode:
            said = done.stderr.strip() or f"exit code {done.returncode}"
            raise VswitchError(said)
        return done.stdout

    def _call(
        self, arguments: tuple[str, ...], *, capture: bool, timeout: float = _COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        # In a session of its own, as the terminal's Ctrl-C is ours to act on.
        return subprocess.run(
            [sys.executable, "-c", _CLI, *arguments],
            cwd=self.directory,
            capture_output=capture,
            text=True,
            check=False,
            timeout=timeout,
            start_new_session=True,
        )


def _end_processes(mark: bytes, how: signal.Signals) -> None:
    """Signal every process whose environment has the mark, and wait for them to end."""
    with ExitStack() as handles:
        marked = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # ended meanwhile, or not ours
                handle = os.pidfd_open(int(entry.name))
                handles.callback(os.close, handle)
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    signal.pidfd_send_signal(handle, how)
                    marked.append(handle)
        for handle in marked:
            select.select([handle], [], [], _END_S)
