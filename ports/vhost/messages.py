"""vhost-user messages: bytes to values and back, for both directions.

A message is a header of 12 bytes (`u32 request, u32 flags, u32 size`) and `size` bytes
of payload, all in host byte order; descriptors ride along as SCM_RIGHTS. `RULES` has a
row for each request that a network back-end may serve: what it carries and whether it
has a reply of its own. Requests without a row are refused like unknown ones.

Numba-free, and knows neither sockets nor what a message means: `channel` moves the
bytes, `session` acts on them.

vhost-user: Message Specification.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple, Self

from ports.base import MAX_REGIONS
from ports.errors import ProtocolError

_HEADER: Final = struct.Struct("=III")
HEADER_LEN: Final = _HEADER.size
MAX_PAYLOAD: Final = 4096  # the largest legitimate one is a memory table, 1032
MAX_FDS: Final = 253  # SCM_MAX_FD: what the kernel lets one message carry

VERSION_MASK: Final = 3
FLAG_VERSION: Final = 1
FLAG_REPLY: Final = 1 << 2
FLAG_NEED_REPLY: Final = 1 << 3

# Front-ends compare a reply's flags for equality, so no other bit may be set.
REPLY_FLAGS: Final = FLAG_VERSION | FLAG_REPLY

# Protocol feature bits, as masks.
PF_MQ: Final = 1 << 0
PF_LOG_SHMFD: Final = 1 << 1
PF_RARP: Final = 1 << 2
PF_REPLY_ACK: Final = 1 << 3
PF_NET_MTU: Final = 1 << 4
PF_BACKEND_REQ: Final = 1 << 5
PF_CONFIG: Final = 1 << 9
PF_RESET_DEVICE: Final = 1 << 13
PF_CONFIGURE_MEM_SLOTS: Final = 1 << 15
PF_STATUS: Final = 1 << 16


class Request(IntEnum):
    """What a front-end may ask for; names as in the specification."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


def request_name(request: int) -> str:
    """The specification's name of a request, or its number where it has none."""
    try:
        return Request(request).name
    except ValueError:
        return f"request {request}"


# --- payloads -------------------------------------------------------------------------


def _unpack(layout: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) != layout.size:
        text = f"payload has {len(data)} bytes, not {layout.size}"
        raise ProtocolError(text)
    values: tuple[int, ...] = layout.unpack(data)
    return values


_U64: Final = struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class U64:
    """One number; as the reply to a request without one of its own, 0 means done."""

    value: int

    def encode(self) -> bytes:
        """The payload's bytes."""
        return _U64.pack(self.value)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a payload; ProtocolError where the size is wrong."""
        return cls(*_unpack(_U64, data))


_VRING_STATE: Final = struct.Struct("=II")


@dataclass(frozen=True, slots=True)
class VringState:
    """A number for one ring: its size, its position, or whether it is enabled."""

    index: int
    num: int

    def encode(self) -> bytes:
        """The payload's bytes."""
        return _VRING_STATE.pack(self.index, self.num)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a payload; ProtocolError where the size is wrong."""
        return cls(*_unpack(_VRING_STATE, data))


VRING_F_LOG: Final = 1  # mark in the log what is written to the used ring
_VRING_ADDR: Final = struct.Struct("=IIQQQQ")


@dataclass(frozen=True, slots=True)
class VringAddr:
    """Where one ring's parts are, as the front-end's virtual addresses."""

    index: int
    flags: int  # VRING_F_LOG
    desc: int
    used: int  # before avail, unlike everywhere else
    avail: int
    log: int  # guest-physical address under which used-ring writes are logged

    def encode(self) -> bytes:
        """The payload's bytes."""
        return _VRING_ADDR.pack(
            self.index, self.flags, self.desc, self.used, self.avail, self.log
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a payload; ProtocolError where the size is wrong."""
        return cls(*_unpack(_VRING_ADDR, data))


_REGION: Final = struct.Struct("=QQQQ")


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """One piece of guest memory and where it lies in the file that comes with it."""

    gpa: int
    size: int  # bytes
    frontend_va: int
    mmap_offset: int  # of the first byte in the file

    def encode(self) -> bytes:
        """The row's bytes."""
        return _REGION.pack(self.gpa, self.size, self.frontend_va, self.mmap_offset)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a row; ProtocolError where the size is wrong."""
        return cls(*_unpack(_REGION, data))


_COUNT: Final = struct.Struct("=II")  # u32 n, u32 padding


@dataclass(frozen=True, slots=True)
class MemTable:
    """All of a guest's memory; one descriptor a region, in the same order."""

    regions: tuple[MemoryRegion, ...]

    def encode(self) -> bytes:
        """The payload's bytes."""
        rows = b"".join(region.encode() for region in self.regions)
        return _COUNT.pack(len(self.regions), 0) + rows

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a payload; ProtocolError where size and count disagree."""
        count = _COUNT.unpack_from(data)[0] if len(data) >= _COUNT.size else 0
        wanted = _COUNT.size + count * _REGION.size
        if len(data) != wanted:
            text = f"payload has {len(data)} bytes, not {wanted} for {count} regions"
            raise ProtocolError(text)
        rows = _REGION.iter_unpack(data[_COUNT.size :])
        return cls(tuple(MemoryRegion(*row) for row in rows))


@dataclass(frozen=True, slots=True)
class SingleRegion:
    """One region to add to the memory table or to take out."""

    region: MemoryRegion

    def encode(self) -> bytes:
        """The payload's bytes."""
        return bytes(_U64.size) + self.region.encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a payload; ProtocolError where the size is wrong."""
        if len(data) != _U64.size + _REGION.size:
            text = f"payload has {len(data)} bytes, not {_U64.size + _REGION.size}"
            raise ProtocolError(text)
        return cls(MemoryRegion.decode(data[_U64.size :]))


_NO_FD_BIT: Final = 1 << 8


@dataclass(frozen=True, slots=True)
class VringFd:
    """A ring's kick, call or err descriptor, which comes along unless `has_fd` is 0."""

    index: int  # 8 bits
    has_fd: bool

    def encode(self) -> bytes:
        """The payload's bytes."""
        return _U64.pack(self.index | (0 if self.has_fd else _NO_FD_BIT))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a payload; ProtocolError where the size is wrong."""
        (value,) = _unpack(_U64, data)
        return cls(value & 0xFF, not value & _NO_FD_BIT)


_LOG: Final = struct.Struct("=QQ")


@dataclass(frozen=True, slots=True)
class Log:
    """Where the log of written pages lies in the file that comes with it."""

    mmap_size: int
    mmap_offset: int

    def encode(self) -> bytes:
        """The payload's bytes."""
        return _LOG.pack(self.mmap_size, self.mmap_offset)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a payload; ProtocolError where the size is wrong."""
        return cls(*_unpack(_LOG, data))


_CONFIG: Final = struct.Struct("=III")  # offset, size, flags


@dataclass(frozen=True, slots=True)
class Config:
    """A piece of the device's configuration space."""

    offset: int
    flags: int  # 0: writable fields, 1: for migration
    data: bytes

    def encode(self) -> bytes:
        """The payload's bytes."""
        return _CONFIG.pack(self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a payload; ProtocolError where its sizes disagree."""
        if len(data) < _CONFIG.size:
            text = f"payload has {len(data)} bytes, less than {_CONFIG.size}"
            raise ProtocolError(text)
        offset, size, flags = _CONFIG.unpack_from(data)
        rest = data[_CONFIG.size :]
        if len(rest) != size:
            text = f"payload has {len(rest)} bytes of configuration, not {size}"
            raise ProtocolError(text)
        return cls(offset, flags, rest)


# An empty payload is None.
Payload = (
    U64 | VringState | VringAddr | MemTable | SingleRegion | VringFd | Log | Config
)
PayloadKind = type[Payload] | None


class Rule(NamedTuple):
    """What one request carries, and what it is answered with."""

    payload: PayloadKind = None
    max_fds: int = 0
    # A reply that is sent whether or not the front-end asks for one.
    reply: PayloadKind = None
    # Protocol feature that the request belongs to; 0: always legal.
    needs: int = 0


RULES: Final[dict[int, Rule]] = {
    Request.GET_FEATURES: Rule(reply=U64),
    Request.SET_FEATURES: Rule(U64),
    Request.SET_OWNER: Rule(),
    Request.RESET_OWNER: Rule(),
    Request.SET_MEM_TABLE: Rule(MemTable, max_fds=MAX_REGIONS),
    Request.SET_LOG_BASE: Rule(Log, max_fds=1, reply=Log, needs=PF_LOG_SHMFD),
    Request.SET_LOG_FD: Rule(max_fds=1),
    Request.SET_VRING_NUM: Rule(VringState),
    Request.SET_VRING_ADDR: Rule(VringAddr),
    Request.SET_VRING_BASE: Rule(VringState),
    Request.GET_VRING_BASE: Rule(VringState, reply=VringState),
    Request.SET_VRING_KICK: Rule(VringFd, max_fds=1),
    Request.SET_VRING_CALL: Rule(VringFd, max_fds=1),
    Request.SET_VRING_ERR: Rule(VringFd, max_fds=1),
    Request.GET_PROTOCOL_FEATURES: Rule(reply=U64),
    Request.SET_PROTOCOL_FEATURES: Rule(U64),
    Request.GET_QUEUE_NUM: Rule(reply=U64, needs=PF_MQ),
    Request.SET_VRING_ENABLE: Rule(VringState),
    Request.SEND_RARP: Rule(U64, needs=PF_RARP),
    Request.NET_SET_MTU: Rule(U64, needs=PF_NET_MTU),
    Request.SET_BACKEND_REQ_FD: Rule(max_fds=1, needs=PF_BACKEND_REQ),
    Request.GET_CONFIG: Rule(Config, reply=Config, needs=PF_CONFIG),
    Request.SET_CONFIG: Rule(Config, needs=PF_CONFIG),
    Request.RESET_DEVICE: Rule(needs=PF_RESET_DEVICE),
    Request.GET_MAX_MEM_SLOTS: Rule(reply=U64, needs=PF_CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Rule(SingleRegion, max_fds=1, needs=PF_CONFIGURE_MEM_SLOTS),
    # Older front-ends attach a descriptor, which is of no use.
    Request.REM_MEM_REG: Rule(SingleRegion, max_fds=1, needs=PF_CONFIGURE_MEM_SLOTS),
    Request.SET_STATUS: Rule(U64, needs=PF_STATUS),
    Request.GET_STATUS: Rule(reply=U64, needs=PF_STATUS),
}


# --- messages -------------------------------------------------------------------------


class Header(NamedTuple):
    """The first 12 bytes of a message."""

    request: int
    flags: int
    size: int  # of the payload, bytes


class Message(NamedTuple):
    """A whole request as it came off the socket; whoever holds it owns `fds`."""

    request: int
    need_reply: bool
    payload: bytes
    fds: tuple[int, ...]


def encode_request(
    request: int, payload: Payload | None = None, *, need_reply: bool = False
) -> bytes:
    """A request as a front-end sends it: in one piece, its descriptors attached."""
    flags = FLAG_VERSION | (FLAG_NEED_REPLY if need_reply else 0)
    return _encode(request, flags, payload)


def encode_reply(request: int, payload: Payload | None) -> bytes:
    """The reply to `request` as a back-end sends it."""
    return _encode(request, REPLY_FLAGS, payload)


def _encode(request: int, flags: int, payload: Payload | None) -> bytes:
    data = b"" if payload is None else payload.encode()
    return _HEADER.pack(request, flags, len(data)) + data


def decode_header(data: bytes) -> Header:
    """Read a header without judging it; `data` is HEADER_LEN bytes."""
    return Header(*_HEADER.unpack(data))


def check_request(header: Header) -> None:
    """Refuse a header after which the stream cannot be followed any further.

    Raises:
        ProtocolError: Wrong version, a reply where a request is due, or a payload
            beyond MAX_PAYLOAD.
    """
    name = request_name(header.request)
    if header.flags & VERSION_MASK != FLAG_VERSION:
        version = header.flags & VERSION_MASK
        text = f"{name}: message has version {version}, not {FLAG_VERSION}"
        raise ProtocolError(text)
    if header.flags & FLAG_REPLY:
        raise ProtocolError(f"{name}: message is a reply, not a request")
    if header.size > MAX_PAYLOAD:
        text = f"{name}: payload of {header.size} bytes, more than {MAX_PAYLOAD}"
        raise ProtocolError(text)


def decode_payload(request: int, data: bytes) -> Payload | None:
    """Read the payload of a request.

    Raises:
        ProtocolError: The request has no row in RULES, or the size is wrong.
    """
    rule = RULES.get(request)
    if rule is None:
        raise ProtocolError(f"{request_name(request)}: not known")
    return _decode(request, rule.payload, data)


def decode_reply(request: int, data: bytes) -> Payload | None:
    """Read a back-end's reply to `request`, header included.

    Where the request has no reply of its own, this is the acknowledgement: a U64,
    0 for done.

    Raises:
        ProtocolError: It answers something else, or is malformed.
    """
    if len(data) < HEADER_LEN:
        text = f"{request_name(request)}: reply has {len(data)} bytes"
        raise ProtocolError(text)
    header = decode_header(data[:HEADER_LEN])
    name = request_name(request)
    if header.request != request:
        text = f"{name}: reply is to {request_name(header.request)}"
        raise ProtocolError(text)
    if header.flags != REPLY_FLAGS:
        text = f"{name}: reply has flags {header.flags:#x}, not {REPLY_FLAGS:#x}"
        raise ProtocolError(text)
    if header.size != len(data) - HEADER_LEN:
        text = f"{name}: reply has {len(data) - HEADER_LEN} bytes, not {header.size}"
        raise ProtocolError(text)
    return _decode(request, RULES.get(request, Rule()).reply or U64, data[HEADER_LEN:])


def _decode(request: int, kind: PayloadKind, data: bytes) -> Payload | None:
    try:
        if kind is not None:
            return kind.decode(data)
        if data:
            raise ProtocolError(f"payload has {len(data)} bytes, not 0")
    except ProtocolError as error:
        raise ProtocolError(f"{request_name(request)}: {error}") from None
    return None
