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

Words are those of the command line. What the command line says comes first.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from ports.tap import BACKENDS
from vswitch.control import endpoint
from vswitch.errors import ConfigError, VswitchError

MODES: Final = ("server", "client")
POLLS: Final = ("adaptive", "busy")

# word: kind of value
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
_KINDS: Final = {
    int: "a whole number",
    str: "text",
    bool: "true or false",
    list: "a list",
}


class Config(NamedTuple):
    """What a file says."""

    switch: dict[str, Any]  # options of the manager
    ports: list[dict[str, Any]]  # arguments of add_port, one a port


NOTHING: Final = Config({}, [])


def read(path: Path) -> Config:
    """Read and check a file.

    Raises:
        ConfigError: It is no TOML, or says what makes no sense.
        VswitchError: It cannot be read.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise VswitchError(f"cannot read {path}: {error}") from error
    return parse(text, path)


def parse(text: str, path: Path) -> Config:
    """Check a file's text; `path` is where it came from.

    Raises:
        ConfigError: It is no TOML, or says what makes no sense.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    _check_words(path, "", document, {"switch": dict, "port": dict})
    switch = document.get("switch", {})
    _check_words(path, "[switch] ", switch, _SWITCH)
    _check_choice(path, "[switch] ", switch, "poll", POLLS)
    if "cpus" in switch and not all(type(cpu) is int for cpu in switch["cpus"]):
        raise ConfigError(f"{path}: [switch] cpus are not whole numbers")
    ports = list(_ports(path, document.get("port", {})))
    return Config(dict(switch), ports)


def _ports(path: Path, tables: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, table in tables.items():
        where = f"[port.{name}] "
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {where}is not a table")
        _check_words(path, where, table, _PORT)
        _check_choice(path, where, table, "mode", MODES)
        _check_choice(path, where, table, "backend", BACKENDS)
        if "endpoint" not in table:
            raise ConfigError(f"{path}: {where}has no endpoint")
        try:
            leads_to = endpoint.parse(table["endpoint"], path.absolute().parent)
            endpoint.check_name(name)
        except ConfigError as error:
            raise ConfigError(f"{path}: {where}{error}") from error
        yield {**table, "name": name, "endpoint": leads_to.text}


def _check_words(
    path: Path, where: str, table: dict[str, Any], known: dict[str, type]
) -> None:
    for word, value in table.items():
        if word not in known:
            text = f"{path}: {where}{word!r} is unknown"
            raise ConfigError(f"{text} (known: {', '.join(known)})")
        if type(value) is not known[word]:
            kind = _KINDS.get(known[word], "a table")
            raise ConfigError(f"{path}: {where}{word} is {value!r}, not {kind}")


def _check_choice(
    path: Path, where: str, table: dict[str, Any], word: str, choices: tuple[str, ...]
) -> None:
    value = table.get(word, choices[0])
    if value not in choices:
        text = f"{path}: {where}{word} {value!r} is unknown"
        raise ConfigError(f"{text} (known: {', '.join(choices)})")
