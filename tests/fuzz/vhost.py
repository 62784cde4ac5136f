"""Front-ends that say anything: inputs for the channel, the decoder and the session.

An input is a list of messages, each with its payload, its descriptors, and how it is cut
up on its way. What has to hold is judged here after each message, from the state that the
session shows and without its own functions.
"""

import contextlib
import os
import select
import socket
import stat
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

from ports.base import MAX_REGIONS, NO_FD
from ports.errors import ProtocolError
from ports.vhost import messages, virtio
from ports.vhost.channel import MAX_QUEUED, Channel, close_fds
from ports.vhost.features import OFFERED, OFFERED_PROTOCOL
from ports.vhost.messages import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    FLAG_VERSION,
    HEADER_LEN,
    MAX_FDS,
    MAX_PAYLOAD,
    PF_CONFIG,
    PF_REPLY_ACK,
    RULES,
    U64,
    VERSION_MASK,
    Config,
    Log,
    MemoryRegion,
    MemTable,
    Request,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
)
from ports.vhost.session import Session
from tests.fuzz.source import Source

PAIRS = 2
SIZE = 1 << 16  # bytes of a region
TOP = 1 << 64
LOW = MemoryRegion(0, SIZE, 0x7F00_0000_0000, 0)
HIGH = MemoryRegion(1 << 32, SIZE, 0x7F10_0000_0000, SIZE)
ROWS = (LOW, HIGH, MemoryRegion(TOP - SIZE, SIZE, TOP - SIZE, 0))
BASES = (LOW.frontend_va, HIGH.frontend_va, TOP - SIZE, LOW.frontend_va + SIZE, 0)

SPLIT = virtio.F_VERSION_1 | virtio.F_MRG_RXBUF | virtio.F_PROTOCOL_FEATURES
PACKED = SPLIT | virtio.F_RING_PACKED
NUMBERS = (
    *(SPLIT, PACKED, SPLIT | virtio.F_LOG_ALL, PACKED | virtio.F_LOG_ALL),
    *(OFFERED, OFFERED_PROTOCOL, PF_REPLY_ACK, virtio.F_VERSION_1),
    *(0, 1, 4, 15, 67, 68, 1500, 65535, 65536, 1 << 56, TOP - 1),
)
SIZES = (256, 0, 1, 2, 3, 64, 1024, 32768, 32769, 65535, 65536, 0x8000_8000, 2**32 - 1)
LENGTHS = (0, 1, 7, 8, 9, 12, 20, 40, 255, 256, 1032, MAX_PAYLOAD, MAX_PAYLOAD + 1)
FD_COUNTS = (0, 1, 2, 3, 8, 9, 32, 33, 253)
REQUESTS = (*RULES, *range(64), 2**31, 2**32 - 1)
RING_FDS = {Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR}
CLOSED_EARLY = (EOFError, ProtocolError)


class Wire:
    """What front-ends have at hand: files of every kind, made once."""

    def __init__(self):
        read_end, write_end = os.pipe()
        os.close(write_end)
        # What these own would be closed with them.
        self._kept = one, _ = socket.socketpair()
        self._epoll = select.epoll()
        memory = _memfd(2 * SIZE)
        self.files = {
            "eventfd": os.eventfd(0),
            "memory": memory,
            "blocking eventfd": os.eventfd(7),
            "short memory": _memfd(SIZE - 1),
            "empty memory": _memfd(0),
            "memory to read": os.open(f"/proc/self/fd/{memory}", os.O_RDONLY),
            "path": os.open(f"/proc/self/fd/{memory}", os.O_PATH),
            "null": os.open("/dev/null", os.O_RDWR),
            "closed pipe": read_end,
            "directory": os.open("/", os.O_RDONLY | os.O_DIRECTORY),
            "socket": one.fileno(),
            "epoll": self._epoll.fileno(),
        }
        self.kinds = tuple(self.files)


def _memfd(size):
    fd = os.memfd_create("fuzz")
    os.ftruncate(fd, size)
    return fd


def say(request, *choices, manner=1, form=0):
    """A message as inputs have it; see `Conversation._say` for what is chosen."""
    return bytes([REQUESTS.index(request), manner, form, *choices])


def start_up(features, manner):
    """What QEMU says until rings run, and how it stops one."""
    messages = [
        say(Request.GET_FEATURES, manner=manner & ~1),
        say(Request.SET_PROTOCOL_FEATURES, NUMBERS.index(OFFERED_PROTOCOL)),
        say(Request.SET_FEATURES, NUMBERS.index(features)),
        say(Request.SET_MEM_TABLE, 2, 0, 1, manner=manner),
    ]
    for ring in range(2 * PAIRS):
        page = 0x30 * ring
        places = (0, page, 0), (0, page + 0x10, 0), (0, page + 0x20, 0)
        messages += [
            say(Request.SET_VRING_NUM, ring, 0),
            say(Request.SET_VRING_BASE, ring, SIZES.index(0)),
            say(Request.SET_VRING_ADDR, ring, 0, *sum(places, ()), 0),
            say(Request.SET_VRING_KICK, ring, 0, manner=manner),
            say(Request.SET_VRING_CALL, ring, 0),
            say(Request.SET_VRING_ENABLE, ring, SIZES.index(1)),
        ]
    return b"\0" + b"".join([*messages, say(Request.GET_VRING_BASE, 1, 0)])


def seeds():
    """Inputs to begin with: what real front-ends say, whole and glued together."""
    memory = (
        say(Request.SET_PROTOCOL_FEATURES, NUMBERS.index(OFFERED_PROTOCOL)),
        *(say(Request.ADD_MEM_REG, 0), say(Request.ADD_MEM_REG, 1)),
        say(Request.SET_LOG_BASE, 0, 0),
        *(say(Request.REM_MEM_REG, 0), say(Request.SET_STATUS, NUMBERS.index(15))),
    )
    return (
        *(start_up(features, 1) for features in NUMBERS[:4]),
        start_up(SPLIT, 4 | 1),
        b"\1" + b"".join(memory),
    )


class Conversations:
    """A target of `guided`: the front-end's side of a connection."""

    SEEDS = seeds()

    def __init__(self):
        self._wire = Wire()
        self.counts = Counter()

    def close(self):
        """The files end with the process."""

    def one(self, data):
        before = open_fds()
        with contextlib.closing(Conversation(self._wire, data, self.counts)) as it:
            it.run()
        assert open_fds() == before, "descriptors leaked"


class Payloads:
    """A target of `guided`: the decoders alone, a request's number before its payload."""

    SEEDS = tuple(
        bytes([request]) + messages.encode_reply(request, U64(1)) for request in RULES
    )

    def __init__(self):
        self.counts = Counter()

    def close(self):
        """There is nothing to give back."""

    def one(self, data):
        request, rest = int.from_bytes(data[:1]), data[1:]
        for decode in (messages.decode_payload, messages.decode_reply):
            try:
                value = decode(request, rest)
            except ProtocolError:
                self.counts["refused"] += 1
                continue
            self.counts["decoded"] += 1
            if value is not None:  # what is left out is padding
                assert type(value).decode(value.encode()) == value


class Conversation:
    """One connection from its first message to its end."""

    def __init__(self, wire, data, counts):
        self._wire, self._counts = wire, counts
        self._source = Source(data)
        self._peer, ours = socket.socketpair()
        # So that replies nobody reads fill it.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self._peer.setblocking(False)
        self._others = open_fds()
        self._channel = Channel(ours)
        protocol = OFFERED_PROTOCOL | (PF_CONFIG if self._source.byte() & 1 else 0)
        self._session = Session(PAIRS, offered_protocol=protocol)
        self._sent = []  # messages that were not received yet
        self._followed = True  # until a header lies about what comes behind it
        self._clock = 0.0

    def close(self):
        self._session.close()
        assert not any(ring.runnable or ring.started for ring in self._session.rings)
        self._channel.close()
        self._peer.close()

    def run(self):
        try:
            while self._source:
                self._say()
            self._peer.shutdown(socket.SHUT_WR)
            self._hear()
        except CLOSED_EARLY as error:
            self._counts[f"ended: {type(error).__name__}"] += 1

    # --- the front-end's side ---

    def _say(self):
        """Send a message in pieces; the back-end looks after each, or later."""
        source = self._source
        request = source.pick(REQUESTS)
        manner, form = source.byte(), source.byte()
        payload = make_payload(source, request, form)
        fds = self._choose_fds(request, payload, form)
        flags = FLAG_VERSION | (FLAG_NEED_REPLY if manner & 1 else 0)
        size = len(payload)
        if manner & 0xE0 == 0xE0:  # seldom: a header nothing can follow
            flags, size = source.number(4), source.known(LENGTHS, 4)
        header = b"".join(n.to_bytes(4, "little") for n in (request, flags, size))
        self._sent.append((request, flags, size, payload, [_file(fd) for fd in fds]))
        known = request in RULES
        self._counts[messages.request_name(request) if known else "unknown"] += 1
        data = header + payload
        cut = source.byte() if manner & 2 else len(data)
        first = source.byte() % (len(data) if manner & 2 else 1)
        for begin, end in _pieces(len(data), max(1, cut), first):
            self._push(data[begin:end], fds if begin == first else [])
            if not manner & 4:
                self._hear()
        if not manner & 8:
            self._read_replies()

    def _push(self, data, fds):
        try:
            socket.send_fds(self._peer, [data], fds)
        except BlockingIOError:  # we are told to wait; a hurried peer hangs up
            raise EOFError from None
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError from None
        self._clock += 0.001

    def _choose_fds(self, request, payload, form):
        """What belongs to the request; in another form, anything."""
        files, source = self._wire.files, self._source
        if form & 0x10:
            kinds = [source.pick(self._wire.kinds) for _ in range(2)]
            count = source.pick(FD_COUNTS)
            fds = [files[kinds[n % 2]] for n in range(count)]
            for kind in kinds:
                self._counts[f"sent: {kind}"] += 1
            return fds
        if request in RING_FDS:
            return [] if len(payload) == 8 and payload[1] & 1 else [files["eventfd"]]
        if request == Request.SET_MEM_TABLE:
            return [files["memory"]] * min(payload[0] if payload else 0, MAX_FDS)
        one = {Request.ADD_MEM_REG, Request.SET_LOG_BASE, Request.SET_LOG_FD}
        return [files["memory"]] if request in one else []

    def _read_replies(self):
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while self._peer.recv(1 << 16):
                pass

    # --- the back-end's side ---

    def _hear(self):
        while True:
            message = self._channel.receive(self._clock)
            self._check_channel()
            if message is None:
                return
            self._check_message(message)
            self._serve(message)

    def _check_channel(self):
        channel = self._channel
        assert len(channel._data) <= MAX_PAYLOAD
        assert len(channel._fds) <= MAX_FDS
        assert len(channel._unsent) <= MAX_QUEUED
        under_way = bool(channel._header or channel._data)
        assert (channel.deadline_s is not None) == under_way

    def _check_message(self, message):
        """It is the next one that was sent, with its own bytes and files."""
        assert len(message.payload) <= MAX_PAYLOAD
        if not self._followed:
            return
        request, flags, size, payload, files = self._sent.pop(0)
        assert flags & VERSION_MASK == FLAG_VERSION
        assert not flags & FLAG_REPLY
        assert size <= MAX_PAYLOAD
        assert message.request == request
        assert message.need_reply == bool(flags & FLAG_NEED_REPLY)
        assert len(message.payload) == size
        if size == len(payload):
            assert message.payload == payload
            assert [_file(fd) for fd in message.fds] == files
        self._followed = size == len(payload)

    def _serve(self, message):
        session = self._session
        before = snapshot(session)
        step = session.handle(message)
        self._counts["refused" if step.refused else "taken"] += 1
        assert not step.refused or snapshot(session) == before, "refused, but changed"
        assert len(session.take_announced()) <= 1
        self._check_step(message, step)
        self._check_fds()
        judge(session)
        self._counts["rings that run"] += sum(r.runnable for r in session.rings)
        retired = session.take_retired()
        assert len(retired) <= MAX_REGIONS + 3 * len(session.rings) + 1
        close_fds(retired)
        answer = step.base.encode(5) if step.base else step.reply
        if answer is not None:
            assert HEADER_LEN <= len(answer) <= HEADER_LEN + MAX_PAYLOAD
            messages.decode_reply(message.request, answer)
            self._channel.send(answer)
        if step.close:
            raise ProtocolError(step.refused)

    def _check_step(self, message, step):
        """There is one answer where one is due, and a failure says so."""
        rule = RULES.get(message.request, messages.Rule())
        acks = message.need_reply and self._session.protocol_features & PF_REPLY_ACK
        answers = (step.reply is not None) + (step.base is not None)
        assert answers <= 1
        assert not step.close or (step.refused and not answers)
        if not step.refused:
            assert answers == (rule.reply is not None or bool(acks))
        elif not step.close:
            assert acks
            failed = messages.decode_reply(message.request, step.reply)
            assert failed == U64(1)

    def _check_fds(self):
        session = self._session
        owned = [row.fd for row in session.memory] + list(session._retired)
        owned += [session.given_log.fd] if session.given_log else []
        for ring in session.rings:
            owned += [
                fd for fd in (ring.kick_fd, ring.call_fd, ring.err_fd) if fd != NO_FD
            ]
        assert len(set(owned)) == len(owned), "a descriptor has two owners"
        ours = {self._channel.fileno(), *self._channel._fds, *owned}
        assert open_fds() == self._others | ours, "descriptors leaked"


def _pieces(length, cut, first):
    """Where to cut: every `cut` bytes, and where descriptors are attached."""
    ends = sorted({0, first, length, *range(cut, length, cut)})
    return pairwise(ends)


# --- payloads ---


def make_payload(source, request, form):
    """What the request carries by the rules, with any values; or any bytes."""
    if form & 0xE0 == 0xE0:
        length = source.pick(LENGTHS)
        return source.take(min(length, 64)).ljust(length, b"\1")
    rule = RULES.get(request)
    if rule is None or rule.payload is None:
        return b""
    data = PAYLOADS[rule.payload](source).encode()
    if form & 0xE0 == 0xC0:
        return data[:-1] if form & 1 else data + b"\0"
    return data


def _index(source):
    at = source.byte()
    return at % (2 * PAIRS) if at < 240 else source.known((255, 256, 65536), 4)


def _address(source):
    return (source.known(BASES, 8) + (source.byte() << 8) + (source.byte() & 31)) % TOP


def _region(source):
    at = source.byte()
    if at < len(ROWS):
        return ROWS[at]
    return MemoryRegion(
        source.known((0, SIZE, 1 << 32, TOP - 1), 8),
        source.known((SIZE, 0, 1, 4096, 2 * SIZE, TOP - 1), 8),
        source.known((LOW.frontend_va, HIGH.frontend_va, 0, SIZE), 8),
        source.known((0, 1, 4096, SIZE, 2 * SIZE, TOP - 1), 8),
    )


def _table(source):
    count = source.byte()
    count = count % 4 if count < 224 else source.pick((4, 8, 32, 33, 127))
    return MemTable(tuple(_region(source) for _ in range(count)))


PAYLOADS = {
    U64: lambda s: U64(s.known(NUMBERS, 8)),
    VringState: lambda s: VringState(_index(s), s.known(SIZES, 4)),
    VringAddr: lambda s: VringAddr(
        *(_index(s), s.byte() & 3, _address(s), _address(s), _address(s)),
        s.known((0, TOP - 1), 8),
    ),
    VringFd: lambda s: VringFd(_index(s) & 0xFF, not s.byte() & 1),
    MemTable: _table,
    SingleRegion: lambda s: SingleRegion(_region(s)),
    Log: lambda s: Log(
        s.known((SIZE, 0, 1, 2 * SIZE, TOP - 1), 8), s.known((0, SIZE, TOP - 1), 8)
    ),
    Config: lambda s: Config(
        s.known((0, 5, 6, 255, 256, 2**32 - 1), 4), 0, bytes(s.pick((1, 6, 0, 60, 257)))
    ),
}


# --- what has to hold ---


def open_fds():
    fds = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
    return {fd for fd in fds if _is_open(fd)}  # not the one that listed them


def _is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _file(fd):
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)


def snapshot(session):
    """All that the session wants, without what it says about refusals."""
    rings = tuple(
        (
            *(ring.num, ring.addr, ring.base, ring.started, ring.enable, ring.enabled),
            *(ring.kick_fd, ring.call_fd, ring.err_fd, ring.areas, ring.runnable),
        )
        for ring in session.rings
    )
    return (
        *(session.features, session.protocol_features, session.memory, session.mtu),
        *(session.given_log, tuple(session.announced), rings),
    )


def judge(session):
    """The wanted state makes sense."""
    memory = session.memory
    assert len(memory) <= MAX_REGIONS
    for row in memory:
        assert row.size > 0
        assert row.gpa + row.size <= TOP
        assert row.frontend_va + row.size <= TOP
        assert row.mmap_offset + row.size <= os.fstat(row.fd).st_size
    for one, other in combinations(memory, 2):
        assert apart((one.gpa, one.size), (other.gpa, other.size))
        assert apart((one.frontend_va, one.size), (other.frontend_va, other.size))
    assert (session.features or 0) & ~OFFERED == 0
    assert session.log is None or (session.features or 0) & virtio.F_LOG_ALL
    for ring in session.rings:
        judge_ring(session, ring)


def judge_ring(session, ring):
    features = session.features
    if ring.enable is None:
        by_default = features is not None and not features & virtio.F_PROTOCOL_FEATURES
        assert ring.enabled == by_default
    else:
        assert ring.enabled == ring.enable
    for fd in (ring.kick_fd, ring.call_fd, ring.err_fd):
        assert fd == NO_FD or Path(f"/proc/self/fd/{fd}").readlink() == EVENTFD
        assert fd == NO_FD or not os.get_blocking(fd)
    assert ring.kick_fd == NO_FD or ring.started
    told = ring.addr is not None and ring.num > 0 and session.memory
    places = right_places(session, ring) if told else None
    assert (places is not None) == (ring.areas is not None), ring
    assert bool(ring.problem) == bool(told and not places), ring
    if places is not None:
        assert [tuple(place) for place in ring.areas] == places
    runs = features is not None and ring.started and places is not None
    assert ring.runnable == runs


EVENTFD = Path("anon_inode:[eventfd]")


def right_places(session, ring):
    """Row and offset of a ring's three parts; None where it cannot run."""
    num, packed = ring.num, bool((session.features or 0) & virtio.F_RING_PACKED)
    assert num <= 32768
    if packed:  # virtio 1.2 §2.8
        fits = (ring.base or 0) % 32768 < num
        lengths = 16 * num, 4, 4
    else:  # §2.7
        fits = num in {1 << n for n in range(16)}
        lengths = 16 * num, 6 + 2 * num, 6 + 8 * num
    starts = ring.addr.desc, ring.addr.avail, ring.addr.used
    assert [at % by for at, by in zip(starts, (16, 2, 4), strict=True)] == [0, 0, 0]
    parts = list(zip(starts, lengths, strict=True))
    places = [
        (row, start - region.frontend_va)
        for start, length in parts
        for row, region in enumerate(session.memory)
        if region.frontend_va <= start
        and start + length <= region.frontend_va + region.size
    ]
    whole = len(places) == len(parts)
    separate = all(apart(*two) for two in combinations(parts, 2))
    return places if fits and whole and separate else None


def apart(one, other):
    return one[0] + one[1] <= other[0] or other[0] + other[1] <= one[0]
