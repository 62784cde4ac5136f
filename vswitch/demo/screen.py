"""What the demo shows: commands as one would type them, and what came of them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.text import Text

_INDENT: Final = "         "


class Screen:
    """One story on the terminal; remembers whether all was as promised."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._began = time.monotonic()
        self.passed = 0
        self.failed = 0

    @property
    def width(self) -> int:
        """Columns for the output of commands."""
        return max(60, self._console.width - len(_INDENT))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the story began."""
        return time.monotonic() - self._began

    def step(self, text: str) -> None:
        """Begin something that takes a while."""
        line = Text(f"\n{self.elapsed_s:5.1f} s  ", style="cyan")
        line.append(text, style="bold")
        self._console.print(line)

    def command(self, where: str, command: str) -> None:
        """Show a command before it runs."""
        line = Text(f"{_INDENT}{where}$ ", style="green")
        line.append(command, style="default")
        self._console.print(line)

    def output(self, text: str) -> None:
        """Show what a command said."""
        for line in text.strip("\n").splitlines():
            self._console.print(Text(_INDENT + line.rstrip(), style="dim"))

    def note(self, text: str) -> None:
        """Say something about what follows or was left out."""
        self._console.print(Text(_INDENT + text, style="yellow"))

    def check(self, text: str, *, ok: bool) -> None:
        """Show whether something is as promised, and remember it."""
        self.passed += ok
        self.failed += not ok
        mark, style = ("✓", "bold green") if ok else ("✗", "bold red")
        self._console.print(Text(f"{_INDENT}{mark} {text}", style=style))

    def error(self, text: str) -> None:
        """Show why the story cannot go on."""
        self._console.print(Text(f"\nerror: {text}", style="bold red"))

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show on a terminal that something is going on."""
        with self._console.status(f"[cyan]{text}"):
            yield
