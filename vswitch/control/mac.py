"""Addresses as users write them, and as the forwarding database keeps them."""

import re
from typing import Final

from vswitch.errors import VswitchError

_MAC: Final = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")
_LAST_VLAN: Final = 4094


def parse_key(mac: str, vlan: int) -> int:
    """The fdb's key for an address as users write it.

    Raises:
        VswitchError: It is no address of a station, or no VLAN.
    """
    if not _MAC.fullmatch(mac.lower()):
        text = f"cannot use address {mac!r}: not six hexadecimal bytes"
        raise VswitchError(f"{text} (write it as 52:54:00:12:34:56)")
    address = bytes.fromhex(mac.replace(":", ""))
    if address[0] & 1 or not any(address):
        text = f"cannot use address {mac}: a group's or zero (give a station's)"
        raise VswitchError(text)
    if not 0 <= vlan <= _LAST_VLAN:
        text = f"cannot use VLAN {vlan}: not within 0 to {_LAST_VLAN} (0: untagged)"
        raise VswitchError(text)
    return vlan << 48 | int.from_bytes(address, "little")


def format_mac(key: int) -> str:
    """An address as users write it."""
    return (key & 0xFFFFFFFFFFFF).to_bytes(6, "little").hex(":")
