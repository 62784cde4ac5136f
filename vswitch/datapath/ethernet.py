"""Ethernet addresses as numbers: the six bytes, first byte lowest.

IEEE 802.3 §3.2.3: the lowest bit of the first byte marks a group address.
"""

from typing import Final

from ports.native import jit, load_any_u64, store_any_u32, store_any_u64

# Offsets within a frame.
DESTINATION: Final = 0
SOURCE: Final = 6
_ADDRESS_MASK: Final = 0xFFFFFFFFFFFF
_GROUP_BIT: Final = 1
# 01:80:c2:00:00:00 to 0f, IEEE 802.1Q §8.6.3: bridges keep these to the link.
_RESERVED: Final = 0x0000C28001
_RESERVED_MASK: Final = 0xF0FFFFFFFFFF


@jit
def read_address(frame: int, offset: int) -> int:
    """The address at DESTINATION or SOURCE of the frame at `frame`, read once."""
    # Two bytes more than the address; all of them lie within the smallest frame.
    return load_any_u64(frame + offset) & _ADDRESS_MASK


@jit
def keep_addresses(at: int, destination: int, source: int) -> None:
    """Write both addresses to `at`, in our own memory."""
    store_any_u64(at, destination | (source << 48))
    store_any_u32(at + 8, source >> 16)


@jit
def is_group(address: int) -> bool:
    """Whether an address is a multicast or the broadcast address."""
    return (address & _GROUP_BIT) != 0


@jit
def is_reserved(address: int) -> bool:
    """Whether an address belongs to protocols of the link itself (LACP, LLDP, STP)."""
    return (address & _RESERVED_MASK) == _RESERVED
