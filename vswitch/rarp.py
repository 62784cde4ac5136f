"""The frame that tells a network where a guest lives now.

Hypervisors announce a guest that has just moved by a reverse ARP request in its name:
every switch on the way learns the address, and nobody answers. RFC 903.
"""

import struct
from typing import Final

_BROADCAST: Final = b"\xff" * 6
_ETHERTYPE: Final = 0x8035
_ETHERNET: Final = 1
_IPV4: Final = 0x0800
_REQUEST_REVERSE: Final = 3
_NO_ADDRESS: Final = bytes(4)
_SHORTEST: Final = 60  # a frame without its check sequence, IEEE 802.3 §3.2.8


def frame(address: bytes) -> bytes:
    """A reverse ARP request of the station `address` (6 bytes) about itself."""
    head = _BROADCAST + address + _ETHERTYPE.to_bytes(2)
    kind = struct.pack(">HHBBH", _ETHERNET, _IPV4, 6, 4, _REQUEST_REVERSE)
    body = kind + (address + _NO_ADDRESS) * 2
    return (head + body).ljust(_SHORTEST, b"\0")
