"""Errors that end in one line for the user.

    VswitchError            exit code 1: refused or failed
    ├── ConfigError         exit code 2: what was asked for makes no sense
    └── NoManagerError      exit code 3: nobody to ask

`ports.errors` has the ones of ports; the manager turns them into these at its socket.
"""

from typing import Final

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NO_MANAGER: Final = 3


class VswitchError(Exception):
    """What failed: what was found (what to do)."""

    code = EXIT_FAILED


class ConfigError(VswitchError):
    """An option, a name or an endpoint that cannot be right."""

    code = EXIT_USAGE


class NoManagerError(VswitchError):
    """No manager answers in the run directory."""

    code = EXIT_NO_MANAGER
