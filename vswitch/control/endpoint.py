"""Endpoints and port names, as users write them and as the manager keeps them.

    vm1.sock, ./vm1.sock, vhost:vm1.sock   a vhost-user socket, name vm1
    tap:uplink0                            a Linux tap device, name uplink0
    eth:eth1, xdp:eth1                     an interface that is there, name eth1

Kept in full: `vhost:` and an absolute path, or the kind and the interface's name.
"""

import re
from pathlib import Path
from typing import Final, NamedTuple

from vswitch.errors import ConfigError

VHOST: Final = "vhost"
TAP: Final = "tap"
ETH: Final = "eth"
XDP: Final = "xdp"
KNOWN: Final = (VHOST, TAP, ETH, XDP)

_SOCKET_SUFFIX: Final = ".sock"
_KIND: Final = re.compile(r"([a-z]+):(.*)", re.DOTALL)
_LONGEST_NAME: Final = 64


class Endpoint(NamedTuple):
    """Where a port leads."""

    kind: str
    rest: str  # absolute path or interface

    @property
    def text(self) -> str:
        """As the manager keeps and shows it."""
        return f"{self.kind}:{self.rest}"

    @property
    def default_name(self) -> str:
        """What the port is called unless somebody says otherwise."""
        return (
            Path(self.rest).name.removesuffix(_SOCKET_SUFFIX)
            if self.kind == VHOST
            else self.rest
        )


def parse(text: str, directory: Path) -> Endpoint:
    """An endpoint as a user wrote it; relative paths start at `directory`.

    Raises:
        ConfigError: Its kind is unknown, nothing follows, or what cannot be shown.
    """
    found = _KIND.fullmatch(text)
    kind, rest = (found[1], found[2]) if found else (VHOST, text)
    if kind not in KNOWN:
        known = "PATH, " + ", ".join(f"{known}:..." for known in KNOWN)
        message = f"cannot use endpoint {text!r}: kind {kind!r} is unknown"
        raise ConfigError(f"{message} (known: {known})")
    if not rest:
        raise ConfigError(f"cannot use endpoint {text!r}: it leads nowhere")
    if not rest.isprintable():
        message = f"cannot use endpoint {text!r}: a character of it cannot be printed"
        raise ConfigError(f"{message} (choose another name)")
    if kind == VHOST:
        rest = str(_absolute(directory / rest))
    return Endpoint(kind, rest)


def check_name(name: str) -> str:
    """The name, if a port may have it.

    Raises:
        ConfigError: It is empty, too long, or has a space, a slash or a control
            character.
    """
    bad = not name.isprintable() or any(c.isspace() or c == "/" for c in name)
    if bad or not 0 < len(name) <= _LONGEST_NAME:
        message = (
            f"cannot use port name {name!r}: 1 to {_LONGEST_NAME} printable characters"
        )
        raise ConfigError(f"{message}, no space or slash (choose one with --name)")
    return name


def _absolute(path: Path) -> Path:
    """Absolute and without dots, but with links as they are: the name is the user's."""
    parts: list[str] = []
    for part in path.absolute().parts[1:]:
        if part == "..":
            del parts[-1:]
        else:
            parts.append(part)
    return Path("/", *parts)
