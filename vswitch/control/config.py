"""The configuration file: what `vswitch up --config FILE` starts with.

    [switch]
    workers = 2
    cpus = [1, 2]
    ageing = 300

    [port.vm1]
    endpoint = "vm1.sock"        # relative to the file's directory
    mode = "client"

    [port.up0]
    endpoint = "tap:up0"

    [[fdb]]                      # an address pinned to a port
    mac = "52:54:00:12:34:56"
    ifname = "vm1"

Words are those of the command line and of its listings. What the command line says comes
first. The state file (`state.py`) is read here as well.
"""

import bisect
import contextlib
import tomllib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from ports.tap import BACKENDS
from vswitch.control import endpoint
from vswitch.control.mac import parse_key
from vswitch.errors import ConfigError, VswitchError

MODES: Final = ("server", "client")
POLLS: Final = ("adaptive", "busy")

Words = dict[str, Any]

# word: kind of value
_FILE: Final[dict[str, type]] = {"switch": dict, "port": dict, "fdb": list}
_SWITCH: Final[dict[str, type]] = {
    "workers": int,
    "spares": int,
    "cpus": list,
    "poll": str,
    "idle_us": int,
    "ageing": int,
    "forward_reserved": bool,
    "socket_group": str,
    "socket_mode": str,
}
_PORT: Final[dict[str, type]] = {
    "endpoint": str,
    "mode": str,
    "queues": int,
    "max_addresses": int,
    "config_space": bool,
    "backend": str,
    "socket_group": str,
    "socket_mode": str,
}
_FDB: Final[dict[str, type]] = {"mac": str, "ifname": str, "vlan": int}
_CHOICES: Final[dict[str, Collection[str]]] = {
    "mode": MODES,
    "backend": BACKENDS,
    "poll": POLLS,
}
_RANGES: Final[dict[str, range]] = {
    "ageing": range(1, 1_000_001),  # the fdb's stamps go round after 2 million seconds
    "idle_us": range(1_000_001),
}
_KINDS: Final = {
    int: "a whole number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}
_WORD_BITS: Final = 63  # of a whole number, beside its sign: as TOML has them
# What its parser does not put in words of its own.
_BEYOND: Final[dict[type[Exception], str]] = {
    ValueError: "a number has too many digits",
    RecursionError: "brackets are nested too deep",
}


class Config(NamedTuple):
    """What a file says."""

    switch: Words  # options of the manager
    ports: list[Words]  # arguments of add_port, one a port
    fdb: list[Words]  # arguments of fdb_add, one an address


NOTHING: Final = Config({}, [], [])


def read(path: Path) -> Config:
    """Read and check a file.

    Raises:
        ConfigError: It is no TOML, or says what makes no sense.
        VswitchError: It cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise VswitchError(f"cannot read {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise VswitchError(f"cannot read {path}: {no_text(error)}") from error
    return parse(text, path)


def no_text(error: UnicodeDecodeError) -> str:
    """Where a file has a byte that makes it no text, and which."""
    line = error.object[: error.start].count(b"\n") + 1
    return f"line {line}: byte {error.object[error.start]:#x} is no UTF-8"


def parse(text: str, path: Path) -> Config:
    """Check a file's text; `path` is where it came from.

    Raises:
        ConfigError: It is no TOML, or says what makes no sense.
    """
    directory = path.absolute().parent
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        kind = type(error)
        line = _first_line(text, lambda head: _failure(head) is kind)
        raise ConfigError(f"{path}: line {line}: {_BEYOND[kind]}") from error
    for fault in _faults(document, directory):
        line = _line(text, fault, directory)
        raise ConfigError(f"{path}: line {line}: {fault}")
    ports = [
        words | {"name": name, "endpoint": _full(words["endpoint"], directory)}
        for name, words in document.get("port", {}).items()
    ]
    return Config(document.get("switch", {}), ports, document.get("fdb", []))


def check_switch(words: Words) -> None:
    """Refuse options that a file could not have.

    Raises:
        ConfigError: A value cannot be.
    """
    for fault in _wrong(words, _SWITCH):
        raise ConfigError(f"cannot start: {fault}")


def port_words(wanted: Words) -> Words:
    """What describes a port in a request to add one, in the words of a file.

    Raises:
        ConfigError: A word is unknown, or its value cannot be.
    """
    said = {word: value for word, value in wanted.items() if value is not None}
    for fault in _wrong(said, {"name": str, **_PORT}):
        raise ConfigError(f"cannot add port {said.get('name')}: {fault}")
    return {
        word: _full(value, Path("/")) if word == "endpoint" else value
        for word, value in said.items()
        if value is not False
    }


def _full(where: str, directory: Path) -> str:
    return endpoint.parse(where, directory).text


# --- what can be wrong, each told in the same words whatever stands beside it ---


def _faults(document: Words, directory: Path) -> Iterator[str]:
    outermost = list(_wrong(document, _FILE))
    yield from outermost
    if outermost:
        return
    yield from _within("[switch]", _wrong(document.get("switch", {}), _SWITCH))
    ports = document.get("port", {})
    for name, port in ports.items():
        header = f"[port.{name if name.isprintable() else ascii(name)}]"
        yield from _within(header, _port_faults(name, port, directory))
    for number, address in enumerate(document.get("fdb", []), 1):
        yield from _within(f"[[fdb]] number {number}", _fdb_faults(address, ports))


def _within(where: str, faults: Iterator[str]) -> Iterator[str]:
    return (f"{where} {fault}" for fault in faults)


def _port_faults(name: str, words: object, directory: Path) -> Iterator[str]:
    if not isinstance(words, dict):
        yield "is not a table"
        return
    yield from _refusal(endpoint.check_name, name)
    yield from _wrong(words, _PORT, needed=["endpoint"])
    if isinstance(where := words.get("endpoint"), str):
        yield from _refusal(endpoint.parse, where, directory)


def _fdb_faults(words: object, ports: Collection[str]) -> Iterator[str]:
    if not isinstance(words, dict):
        yield "is not a table"
        return
    yield from _wrong(words, _FDB, needed=["mac", "ifname"])
    mac, vlan, name = words.get("mac"), words.get("vlan", 0), words.get("ifname")
    if isinstance(mac, str) and isinstance(vlan, int) and _fits(vlan):
        yield from _refusal(parse_key, mac, vlan)
    if isinstance(name, str) and name not in ports:
        yield f"ifname {name!r} is no port here"


def _wrong(
    words: Words, known: dict[str, type], needed: Collection[str] = ()
) -> Iterator[str]:
    for word, value in words.items():
        kind = type(value)
        if word not in known:
            yield f"{word!r} is unknown (known: {', '.join(known)})"
        elif kind is not known[word]:
            yield f"{word} is {_shown(value)}, not {_KINDS[known[word]]}"
        elif word == "cpus" and not _are_numbers(value):
            yield f"cpus is {_shown(value)}, not a list of whole numbers"
        elif value not in _CHOICES.get(word, [value]):
            yield f"{word} {value!r} is unknown (known: {', '.join(_CHOICES[word])})"
        elif value not in _RANGES.get(word, [value]):
            within = _RANGES[word]
            yield f"{word} is {_shown(value)}, not within {within[0]} to {within[-1]}"
        elif kind is int and not _fits(value):
            yield f"{word} has more than 64 bits"
    yield from (f"has no {word}" for word in needed if word not in words)


def _fits(number: int) -> bool:
    return number.bit_length() <= _WORD_BITS


def _are_numbers(values: list[object]) -> bool:
    return bool(values) and all(type(n) is int and _fits(n) for n in values)


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of too many digits"
    except RecursionError:
        return "a list of lists too deep"


def _refusal(check: Callable[..., object], *arguments: object) -> Iterator[str]:
    try:
        check(*arguments)
    except VswitchError as error:
        yield str(error)


def _line(text: str, fault: str, directory: Path) -> int:
    """The line at which a fault begins: read down to there, the file has it.

    The parser does not say where it found what; this holds however it is written.
    """
    lines = text.split("\n")

    def is_there(head: str) -> bool:
        count = head.count("\n")
        for end in range(count, len(lines) + 1):  # a value may go on for some lines
            with contextlib.suppress(ValueError, RecursionError):
                document = tomllib.loads("\n".join(lines[:end]) + "\n")
                return fault in _faults(document, directory)
        return True

    return _first_line(text, is_there)


def _first_line(text: str, is_there: Callable[[str], bool]) -> int:
    """The first line with which there is what then remains, given the text up to it."""
    lines = text.split("\n")

    def key(count: int) -> bool:
        return is_there("\n".join(lines[:count]) + "\n")

    return bisect.bisect_left(range(1, len(lines)), True, key=key) + 1


def _failure(text: str) -> type[Exception] | None:
    """What the parser raises, if anything."""
    try:
        tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        return type(error)
    return None
