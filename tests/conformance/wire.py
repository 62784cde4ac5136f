"""Messages as bytes: what a front-end may send, and what comes back."""

import dataclasses
import re
import struct

from vswitch.guest import GuestError

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
