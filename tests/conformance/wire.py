"""Messages as bytes: what a front-end may send, and what comes back."""

import dataclasses
import re
import struct

from ports.vhost.features import OFFERED_PROTOCOL
from ports.vhost.messages import (
    RULES,
    U64,
    Config,
    Log,
    MemTable,
    Request,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
)
from vswitch.guest import GuestError
from vswitch.guest.frontend import DEFAULT_PROTOCOL

SERVED = [n for n, rule in RULES.items() if not rule.needs & ~OFFERED_PROTOCOL]
NATURAL = [n for n in SERVED if RULES[n].reply is not None]
VERSION, REPLY, NEED_REPLY = 1, 4, 8
HUNG_UP = re.compile("hung up|Broken pipe|reset by peer")
REFUSED = "the switch refused"


def raw(request, payload=b"", flags=VERSION | NEED_REPLY, size=None):
    """A message of any kind; `size` is what its header claims."""
    size = len(payload) if size is None else size
    return struct.pack("=III", request, flags, size) + payload


def number(value):
    return struct.pack("=Q", value)


def read(frontend):
    """The next reply, as (request, flags, payload)."""
    request, flags, size = struct.unpack("=III", frontend._read(12, 0))
    return request, flags, frontend._read(size, 0)


def ask(frontend, request, payload=b"", fds=(), flags=VERSION | NEED_REPLY):
    """Send one message and read one reply; it is to this request. Its payload."""
    frontend.send_raw(raw(request, payload, flags), fds)
    answered, answer_flags, answer = read(frontend)
    assert (answered, answer_flags) == (request, VERSION | REPLY)
    return answer


def is_cut_off(frontend, data, fds=()):
    """Send bytes; whether the connection ended instead of going on."""
    try:
        frontend.send_raw(data, fds)
        frontend.barrier()
    except GuestError as error:
        return bool(HUNG_UP.search(str(error)))
    return False


def is_refused(frontend, request, payload=b"", fds=()):
    """Send a message that asks for an answer; whether it was refused or cut off."""
    try:
        return ask(frontend, request, payload, fds) != bytes(8)
    except GuestError as error:
        return bool(HUNG_UP.search(str(error)))


def cut_region(region, at):
    """A region in two that touch only for the guest; the front-end has them apart."""
    first = dataclasses.replace(region, size=at)
    second = dataclasses.replace(
        region,
        gpa=region.gpa + at,
        size=region.size - at,
        frontend_va=0x1000_0000,
        mmap_offset=at,
    )
    return first, second


def good_message(guest, request):
    """A payload and descriptors with which `request` is fine on a fresh connection."""
    (region,) = guest.table.regions
    desc, avail, used = (guest.va + offset for offset in guest.rx.addresses())
    ring = guest.rx.index
    payload = {
        U64: U64(1500),
        VringState: VringState(ring, 1),
        VringAddr: VringAddr(ring, 0, desc, used, avail, 0),
        VringFd: VringFd(ring, has_fd=True),
        MemTable: guest.table,
        SingleRegion: SingleRegion(region),
        Log: Log(1 << 16, 0),
        Config: Config(0, 0, bytes(6)),
        None: None,
    }[RULES[request].payload]
    special = {
        Request.SET_FEATURES: U64(guest.features),
        Request.SET_PROTOCOL_FEATURES: U64(DEFAULT_PROTOCOL),
        Request.SET_STATUS: U64(0xF),
        Request.SET_VRING_NUM: VringState(ring, guest.size),
    }
    fd = {
        MemTable: guest.fd,
        SingleRegion: guest.fd,
        Log: guest.fd,
        VringFd: guest.rx.ends.call,
    }.get(RULES[request].payload)
    return special.get(request, payload), [] if fd is None else [fd]
