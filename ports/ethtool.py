"""What an interface's driver is set to, by way of ethtool's ioctl.

linux/ethtool.h.
"""

import ctypes
import fcntl
import socket
import struct
from typing import Final, NamedTuple

from ports.errors import PortError, errno_name

_SIOCETHTOOL: Final = 0x8946
_GCHANNELS: Final = 0x3C


class Setting(NamedTuple):
    """A switch: what it is called, commands to get and to set it, its bit."""

    name: str
    get: int
    set: int
    bit: int


RX_VLAN: Final = Setting("rxvlan", 0x25, 0x26, 1 << 8)  # takes VLAN tags out
GRO: Final = Setting("gro", 0x2B, 0x2C, 1)  # makes one large frame of several


def count_queues(index: int) -> tuple[int, int]:
    """Queues to receive by and to transmit by; one each where the driver does not say."""
    try:
        words = _call(index, (_GCHANNELS, *[0] * 8))
    except OSError:
        return 1, 1
    rx, tx, _, combined = words[5:]
    return max(rx + combined, 1), max(tx + combined, 1)


def switch_off(index: int, setting: Setting) -> bool:
    """Switch something off; whether it was on.

    Raises:
        PortError: It stays on.
        OSError: The interface is gone.
    """
    _, before = _call(index, (setting.get, 0))
    if not before & setting.bit:
        return False
    found = "it stays on"
    try:
        _call(index, (setting.set, before & ~setting.bit))
    except OSError as error:
        found = errno_name(error)
    _, after = _call(index, (setting.get, 0))
    if after & setting.bit:
        interface = socket.if_indextoname(index)
        what = f"cannot switch {setting.name} of {interface} off: {found}"
        raise PortError(f"{what} (use eth:{interface})")
    return True


def switch_on(index: int, setting: Setting) -> None:
    """Switch something on again. Raises OSError."""
    _, before = _call(index, (setting.get, 0))
    _call(index, (setting.set, before | setting.bit))


def _call(index: int, words: tuple[int, ...]) -> tuple[int, ...]:
    """Have 32-bit words read and written by a command, which is the first of them.

    By index, as an interface may be renamed.
    """
    interface = socket.if_indextoname(index)
    shape = f"{len(words)}I"
    memory = ctypes.create_string_buffer(struct.pack(shape, *words), 4 * len(words))
    request = struct.pack("16sP16x", interface.encode(), ctypes.addressof(memory))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCETHTOOL, request)
    return struct.unpack(shape, memory.raw)
