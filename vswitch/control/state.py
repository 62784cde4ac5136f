"""The state file: what the next `vswitch up` brings back unless there was a `down`.

    # vswitch state 1
    [switch] ...
    [port.vm1] ...
    [[fdb]] ...
    # end

Between its first and its last line it is a configuration file like any other; a copy can
be given to `vswitch up --config`. It is in the run directory: where that does not outlive
a reboot, neither did the guests.

It is written as a whole, beside the old one, and put in its place when it is on the disk,
so a kill or a loss of power leaves the old or the new. A file that does not begin and end
so is not ours, or of another version, or half of one: it is refused and left as it is.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ports.errors import errno_name
from vswitch.control import config
from vswitch.control.config import Config, Words
from vswitch.control.rundir import STATE
from vswitch.errors import ConfigError, VswitchError

_NEW: Final = f"{STATE}.new"
_VERSION: Final = 1
_FIRST: Final = "# vswitch state"
_LAST: Final = "# end\n"
_REMARK: Final = "# Written at each change. To keep it as a configuration, copy it."
_FIRST_LINE: Final = re.compile(_FIRST + r" ([0-9]{1,9})")
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")


def read(run_dir: Path) -> Config | None:
    """What a run that did not end on purpose was set to; None if there is none.

    Raises:
        VswitchError: The file cannot be read, or is not one that we wrote.
    """
    path = run_dir / STATE
    try:
        text = path.read_bytes().decode()
        _check_frame(path, text)
        return config.parse(text, path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refused(path, f"{path}: {errno_name(error)}") from error
    except UnicodeDecodeError as error:
        raise _refused(path, f"{path}: {config.no_text(error)}") from error
    except ConfigError as error:
        raise _refused(path, str(error)) from error


def write(run_dir: Path, text: str) -> None:
    """Put `text` in the place of what was there, so that it is on the disk.

    Raises:
        VswitchError: It cannot be written; what was there is there still.
    """
    try:
        with (run_dir / _NEW).open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        (run_dir / _NEW).replace(run_dir / STATE)
        directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        text = (
            f"cannot write {run_dir / STATE}: {errno_name(error)}: the change is made,"
        )
        text += " but will not outlive the manager"
        raise VswitchError(f"{text} (make room; the next change writes all)") from error


def forget(run_dir: Path) -> None:
    """Remove the file: what was set is not wanted any more."""
    for leaf in (STATE, _NEW):
        (run_dir / leaf).unlink(missing_ok=True)


def format_text(config: Config) -> str:
    """The text of the file."""
    return "\n".join((f"{_FIRST} {_VERSION}", _REMARK, *_tables(config), _LAST))


def _tables(config: Config) -> Iterator[str]:
    if config.switch:
        yield from _table("[switch]", config.switch)
    for port in config.ports:
        words = {word: value for word, value in port.items() if word != "name"}
        yield from _table(f"[port.{_key(port['name'])}]", words)
    for address in config.fdb:
        yield from _table("[[fdb]]", address)


def _table(header: str, words: Words) -> Iterator[str]:
    yield f"\n{header}"
    yield from (f"{word} = {_value(value)}" for word, value in words.items())


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _value(name)


def _value(value: object) -> str:
    """A text, a whole number, a truth or a list of numbers, as TOML writes them.

    That is how JSON writes them, but for one character.
    """
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _check_frame(path: Path, text: str) -> None:
    """Refuse what does not begin and end as we write it."""
    first = text.partition("\n")[0]
    found = _FIRST_LINE.fullmatch(first)
    if found is None:
        what = f"is {first[:60]!r}, not '{_FIRST} {_VERSION}'"
        raise ConfigError(f"{path}: line 1 {what}: another program wrote this")
    if int(found[1]) != _VERSION:
        what = f"says version {int(found[1])}, we know {_VERSION}"
        raise ConfigError(f"{path}: line 1 {what}: another vswitch wrote this")
    if not text.endswith("\n" + _LAST):
        count = text.count("\n") + 1
        what = f"does not end with '{_LAST.strip()}'"
        raise ConfigError(f"{path}: line {count} {what}: this is half a file")


def _refused(path: Path, reason: str) -> VswitchError:
    here, there = shlex.quote(str(path)), shlex.quote(f"{path}.refused")
    text = f"cannot go on from what was set before: {reason}"
    return VswitchError(f"{text} (start without it: mv {here} {there})")
