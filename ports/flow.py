"""Which flow a frame belongs to, as a number: the same for all frames of a flow.

It chooses the receive queue of a guest that has several, so the order within a flow is
kept while different flows are spread over the guest's processors. What a guest writes
meanwhile may change the number and nothing else.

A flow is the two addresses and, where each frame tells them, the two ports of TCP or
UDP; fragments do not, and other protocols have none. What is not IP is known by its
Ethernet addresses. virtio 1.2 §5.1.6.5.6 (automatic receive steering).
"""

from typing import Final

from ports.native import (
    Record,
    jit,
    load_any_u16,
    load_any_u64,
    load_u8,
)
from ports.vhost.chain import gather

# The longest way to the ports: two tags and an IPv4 header with all its options.
PEEK_LEN: Final = 14 + 8 + 60 + 4
_ETHERTYPE: Final = 12
_TAG: Final = 4
_MAX_TAGS: Final = 2
# As they lie in memory, read little-endian.
_IPV4: Final = 0x0008
_IPV6: Final = 0xDD86
_VLAN: Final = 0x0081
_SERVICE_VLAN: Final = 0xA888
_FRAGMENT: Final = 0xFF3F  # more fragments, or not the first

_IPV4_HEADER: Final = 20
_IPV6_HEADER: Final = 40
_TCP: Final = 6
_UDP: Final = 17

# A product's upper bits depend on all of the factor's lower ones. 64-bit primes would
# not fit the signed product of the interpreter's twin.
_MIX: Final = 0x9E3779B1
_MASK: Final = 0xFFFFFFFF


@jit
def flow_of(ctx: Record, frame: Record) -> int:
    """A number of 32 bits."""
    length = min(int(frame["length"]), PEEK_LEN)
    at = int(frame["addr"])
    if int(frame["segments"]) > 1:
        at = int(ctx["peek"])
        begin = int(frame["first_segment"])
        end = begin + int(frame["segments"])
        gather(int(ctx["segments"]), begin, end, 0, at, length)
    return _hash(at, length)


@jit
def _hash(frame: int, length: int) -> int:
    network = _ETHERTYPE + 2
    for _ in range(_MAX_TAGS):
        ethertype = load_any_u16(frame + network - 2)
        tagged = ethertype == _VLAN or ethertype == _SERVICE_VLAN  # noqa: PLR1714
        if not tagged or length < network + _TAG:
            break
        network += _TAG
    ethertype = load_any_u16(frame + network - 2)
    header = frame + network
    if ethertype == _IPV4 and length >= network + _IPV4_HEADER:
        mixed = _mix(load_any_u64(header + 12), 0)
        protocol = load_u8(header + 9)
        whole = load_any_u16(header + 6) & _FRAGMENT == 0
        ports = network + 4 * (load_u8(header) & 0xF)
    elif ethertype == _IPV6 and length >= network + _IPV6_HEADER:
        mixed = 0
        for word in range(8, _IPV6_HEADER, 8):
            mixed = _mix(load_any_u64(header + word), mixed)
        protocol = load_u8(header + 6)
        whole = True
        ports = network + _IPV6_HEADER
    else:
        return _mix(load_any_u64(frame), _load_u32(frame + 8))
    has_ports = protocol == _TCP or protocol == _UDP  # noqa: PLR1714
    if whole and has_ports and length >= ports + 4:
        mixed = _mix(_load_u32(frame + ports), mixed)
    return mixed


@jit
def _load_u32(addr: int) -> int:
    return load_any_u16(addr) | load_any_u16(addr + 2) << 16


@jit
def _mix(word: int, before: int) -> int:
    low = ((word & _MASK) ^ before) * _MIX
    low = (low ^ (low >> 15)) & _MASK
    high = (((word >> 32) & _MASK) ^ low) * _MIX
    return (high ^ (high >> 15)) & _MASK
