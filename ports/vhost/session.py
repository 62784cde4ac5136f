"""What one vhost-user front-end wants: a state machine fed with messages.

A session has no socket, maps nothing and stops no ring. `handle` changes the *wanted*
state and says what to answer; the caller first makes the running state match, then
sends the answer, since to a front-end the answer means that it is done.

Front-ends disagree about the order of messages, so there is none here. Each message
records what it says, and after each one every ring is judged anew: it is *runnable*
once features, size, addresses inside guest memory and the kick are known, in whatever
order they came. Facts that shaped the rest:

- VRING_ENABLE arrives before everything else and is not repeated after a stop, so it
  is kept apart from started and stopped, and GET_VRING_BASE does not touch it.
- SET_STATUS 0 arrives before the rings are stopped, so the status is only recorded.
- The position in SET_VRING_BASE may be wrong (0 after a reconnect, or past the posted
  buffers), so it is not needed to start: the ring itself knows where it was.
- The same memory table comes at every start with new descriptors of the same files.
  Rows that say the same thing keep their old descriptor, so nothing is mapped again.

A message that cannot be honoured changes nothing. It is answered with a failure where
the front-end asked for an answer; else the connection is closed, as a front-end that
believes it succeeded would go wrong later and elsewhere.

Descriptors: `handle` takes over all that came with a message. Those it keeps are in the
wanted state; those it replaces wait in `take_retired` until no worker uses them; the
rest are closed at once.

Pages that we write are logged once both are known, the log and the feature LOG_ALL, in
whatever order they come; and until LOG_ALL is taken back, which ends a migration.

Not here: a reverse channel; the tracking of descriptors in flight, which we, who give
chains back in the order in which they came, do not need to find our place again.

vhost-user: Back-end Program Conventions, Ring states, Communication.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ports.base import MAX_REGIONS, NO_FD
from ports.errors import ProtocolError
from ports.vhost import virtio
from ports.vhost.channel import close_fds
from ports.vhost.device_config import DeviceConfig
from ports.vhost.features import (
    OFFERED,
    OFFERED_PROTOCOL,
    feature_names,
    protocol_feature_names,
)
from ports.vhost.messages import (
    PF_REPLY_ACK,
    RULES,
    U64,
    VRING_F_LOG,
    Config,
    Log,
    MemTable,
    Message,
    Payload,
    Request,
    Rule,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
    decode_payload,
    encode_reply,
    request_name,
)
from ports.vhost.wanted import (
    NOT_SHARED,
    Place,
    RingAreas,
    WantedRegion,
    WantedRing,
    check_addresses,
    check_apart,
    check_log,
    check_num,
    check_region,
    check_table,
    find_areas,
    take_eventfd,
    translate,
)

# What the state consists of is a part of this module's interface.
__all__ = [
    "NOT_SHARED",
    "BaseReply",
    "Place",
    "RingAreas",
    "Session",
    "Step",
    "WantedRegion",
    "WantedRing",
]

MAX_RING_PAIRS: Final = 128  # a ring's index has 8 bits in the messages with an fd

# NET_SET_MTU: what virtio 1.2 §5.1.4.1 allows.
MIN_MTU: Final = 68
MAX_MTU: Final = 65535

_MAC_LEN: Final = 6

# virtio 1.2 §2.1
STATUS_DRIVER_OK: Final = 4
STATUS_FEATURES_OK: Final = 8
MAX_STATUS: Final = 0xFF


@dataclass(frozen=True, slots=True)
class BaseReply:
    """The reply to GET_VRING_BASE, which only who stopped the ring can complete."""

    index: int
    fallback: int  # position to report where the ring never ran
    packed: bool = False

    def encode(self, position: int) -> bytes:
        """The reply's bytes, `position` being the first entry that was not taken.

        Packed rings have a position for each side; we complete in order, so they are
        the same.
        """
        position &= 0xFFFF
        both = position << 16 | position if self.packed else position
        return encode_reply(Request.GET_VRING_BASE, VringState(self.index, both))


class Step(NamedTuple):
    """What to do about one message once the wanted state runs."""

    reply: bytes | None = None  # to be sent
    base: BaseReply | None = None  # to be completed and sent instead
    nack: bytes | None = None  # to be sent instead where the wanted state cannot run;
    # where that is None, close the connection then
    refused: str = ""  # what was wrong with the message
    close: bool = False  # end the connection


class Session:
    """The wanted state of one connection. Owns every descriptor that it names."""

    def __init__(
        self,
        max_pairs: int,
        offered: int = OFFERED,
        offered_protocol: int = OFFERED_PROTOCOL,
    ) -> None:
        if not 1 <= max_pairs <= MAX_RING_PAIRS:
            text = f"max_pairs is {max_pairs}, not 1 to {MAX_RING_PAIRS}"
            raise ValueError(text)
        self.max_pairs = max_pairs
        self.offered = offered
        self.offered_protocol = offered_protocol
        self.features: int | None = None
        self.protocol_features = 0
        self.memory: tuple[WantedRegion, ...] = ()
        self.memory_problem = ""
        self.rings = tuple(WantedRing(index) for index in range(2 * max_pairs))
        self.mtu: int | None = None
        self.status = 0
        self.config = DeviceConfig(max_pairs)
        self.given_log: WantedRegion | None = None
        self.status_given = False
        self.announced: list[bytes] = []
        self._retired: list[int] = []

    # --- what the caller reads ---

    @property
    def features_known(self) -> bool:
        """Whether SET_FEATURES was seen; the driver has made up its mind."""
        return self.features is not None

    @property
    def packed(self) -> bool:
        """Whether the driver chose packed rings."""
        return bool((self.features or 0) & virtio.F_RING_PACKED)

    @property
    def log(self) -> WantedRegion | None:
        """The log of written pages, while it is to be kept; its `gpa` means nothing."""
        return self.given_log if (self.features or 0) & virtio.F_LOG_ALL else None

    @property
    def header_len(self) -> int:
        """Bytes of virtio-net header before each frame, virtio 1.2 §5.1.6."""
        with_num_buffers = virtio.F_VERSION_1 | virtio.F_MRG_RXBUF
        if (self.features or 0) & with_num_buffers:
            return virtio.NET_HDR_LEN
        return virtio.NET_HDR_LEN_LEGACY

    @property
    def driver_ok(self) -> bool:
        """Whether a driver is at work, as far as one can tell: for people to read."""
        if self.status_given:
            return bool(self.status & STATUS_DRIVER_OK)
        return any(ring.runnable for ring in self.rings)

    @property
    def problem(self) -> str:
        """Why a started ring cannot run with what it was given; empty: none such."""
        problems = (ring.problem for ring in self.rings if ring.started)
        return next(filter(None, problems), "")

    def translate(self, frontend_va: int, length: int) -> Place | None:
        """Where `length` bytes at an address of the front-end's are, if in one region.

        Only for set-up: descriptors hold guest-physical addresses.
        """
        return translate(self.memory, frontend_va, length)

    def take_announced(self) -> list[bytes]:
        """Addresses of a guest that has just arrived here, to be told to everybody."""
        announced, self.announced = self.announced, []
        return announced

    def take_retired(self) -> list[int]:
        """Descriptors no longer wanted, now the caller's to close.

        Do so once no worker can use them, that is when the wanted state runs.
        """
        retired, self._retired = self._retired, []
        return retired

    def close(self) -> None:
        """Want nothing any more, and close every descriptor."""
        self._retire(*(region.fd for region in self.memory))
        self.memory = ()
        self._drop_log()
        for ring in self.rings:
            self._stop(ring)
            self._retire(ring.err_fd)
            ring.err_fd = NO_FD
        self.judge_rings()
        close_fds(self.take_retired())

    # --- a message's way through ---

    def handle(self, message: Message) -> Step:
        """Take one message into the wanted state; never raises for what a peer sent.

        The message's descriptors are the session's from here on, whatever it says.
        """
        fds = list(message.fds)
        try:
            answer = self._apply(message, fds)
        except ProtocolError as error:
            return self._refuse(message, str(error))
        finally:
            close_fds(fds)  # those that no handler took
            self.judge_rings()
        return self._answer(message, answer)

    def _apply(self, message: Message, fds: list[int]) -> "_Answer":
        rule = self._rule(message.request)
        name = request_name(message.request)
        if rule is None:
            raise ProtocolError(f"{name}: not offered")
        if len(fds) > rule.max_fds:
            text = f"{name}: {len(fds)} descriptors, at most {rule.max_fds} belong"
            raise ProtocolError(text)
        payload = decode_payload(message.request, message.payload)
        try:
            return _HANDLERS[message.request](self, payload, fds)
        except ProtocolError as error:
            raise ProtocolError(f"{name}: {error}") from None

    def _rule(self, request: int) -> Rule | None:
        """The request's rule if we serve it.

        Offered is enough, acknowledged it need not be: nothing is gained by refusing a
        front-end that asks before it acknowledges.
        """
        rule = RULES.get(request)
        if rule is None or request not in _HANDLERS:
            return None
        if rule.needs & ~self.offered_protocol:
            return None
        return rule

    def _answer(self, message: Message, answer: "_Answer") -> Step:
        if isinstance(answer, BaseReply):
            return Step(base=answer)
        if answer is not None:
            return Step(reply=encode_reply(message.request, answer))
        if self._wants_ack(message):
            done = encode_reply(message.request, U64(0))
            return Step(reply=done, nack=_failure(message))
        return Step()

    def _refuse(self, message: Message, reason: str) -> Step:
        rule = self._rule(message.request)
        has_reply = rule is not None and rule.reply is not None
        # In a reply of another shape a failure could not be told from a value.
        if self._wants_ack(message) and not has_reply:
            return Step(reply=_failure(message), refused=reason)
        return Step(refused=reason, close=True)

    def _wants_ack(self, message: Message) -> bool:
        return message.need_reply and bool(self.protocol_features & PF_REPLY_ACK)

    # --- features and the device ---

    def _get_features(self, _payload: None, _fds: list[int]) -> U64:
        return U64(self.offered)

    def _set_features(self, payload: U64, _fds: list[int]) -> None:
        features = payload.value
        if surplus := features & ~self.offered:
            self.status &= ~STATUS_FEATURES_OK
            raise ProtocolError(f"not offered: {_joined(feature_names(surplus))}")
        before = features if self.features is None else self.features
        # The log may be switched at any time; all else is agreed upon before the start.
        if (before ^ features) & ~virtio.F_LOG_ALL and self._any_started():
            raise ProtocolError(
                f"changed from {before:#x} to {features:#x} while a ring runs"
            )
        if before & ~features & virtio.F_LOG_ALL:
            self._drop_log()
        self.features = features

    def _get_protocol_features(self, _payload: None, _fds: list[int]) -> U64:
        return U64(self.offered_protocol)

    def _set_protocol_features(self, payload: U64, _fds: list[int]) -> None:
        if surplus := payload.value & ~self.offered_protocol:
            names = _joined(protocol_feature_names(surplus))
            raise ProtocolError(f"not offered: {names}")
        self.protocol_features = payload.value

    def _ignore(self, _payload: None, _fds: list[int]) -> None:
        """Nothing to do.

        SET_OWNER may be missing or late. RESET_OWNER is deprecated, and peers that send
        it do not set things up again. SET_LOG_FD brings what we never signal.
        """

    def _reset_device(self, _payload: None, _fds: list[int]) -> None:
        """Begin anew; the connection, what was agreed upon and the memory remain."""
        for ring in self.rings:
            self._stop(ring)
            ring.enable = None
        self.status = 0

    def _get_queue_num(self, _payload: None, _fds: list[int]) -> U64:
        return U64(self.max_pairs)

    def _net_set_mtu(self, payload: U64, _fds: list[int]) -> None:
        if not MIN_MTU <= payload.value <= MAX_MTU:
            text = f"{payload.value} is not within {MIN_MTU} to {MAX_MTU}"
            raise ProtocolError(text)
        self.mtu = payload.value

    def _get_status(self, _payload: None, _fds: list[int]) -> U64:
        return U64(self.status)

    def _set_status(self, payload: U64, _fds: list[int]) -> None:
        if payload.value > MAX_STATUS:
            raise ProtocolError(f"{payload.value:#x} does not fit a status byte")
        self.status = payload.value
        self.status_given = True

    def _get_config(self, payload: Config, _fds: list[int]) -> Config:
        return self.config.read(payload)

    def _set_config(self, payload: Config, _fds: list[int]) -> None:
        self.config.write(payload)

    # --- migration ---

    def _set_log_base(self, payload: Log, fds: list[int]) -> Log:
        """Keep a log, maybe in another's place.

        The answer, after which nobody writes to the old one, repeats the request: some
        front-ends insist on its size, others do not look.
        """
        if len(fds) != 1:
            raise ProtocolError(f"{len(fds)} descriptors, not 1")
        log = check_log(payload, fds[0], self.memory)
        if self.given_log is None or not log.same_as(self.given_log):
            self._drop_log()
            self.given_log = log
            fds.clear()
        return payload

    def _drop_log(self) -> None:
        if self.given_log is not None:
            self._retire(self.given_log.fd)
            self.given_log = None

    def _send_rarp(self, payload: U64, _fds: list[int]) -> None:
        self.announced.append(payload.encode()[:_MAC_LEN])

    # --- memory ---

    def _set_mem_table(self, payload: MemTable, fds: list[int]) -> None:
        try:
            regions = check_table(payload.regions, fds)
        except ProtocolError as error:
            self.memory_problem = str(error)
            raise
        self.memory_problem = ""
        rows = tuple(self._known(region) or region for region in regions)
        kept = {row.fd for row in rows}
        fds[:] = [fd for fd in fds if fd not in kept]
        if rows != self.memory:
            self._retire(*(row.fd for row in self.memory if row.fd not in kept))
            self.memory = rows

    def _get_max_mem_slots(self, _payload: None, _fds: list[int]) -> U64:
        return U64(MAX_REGIONS)

    def _add_mem_reg(self, payload: SingleRegion, fds: list[int]) -> None:
        """Add a row; a front-end of several queue pairs says so for each of them."""
        if len(fds) != 1:
            raise ProtocolError(f"{len(fds)} descriptors, not 1")
        region = check_region(payload.region, fds[0])
        if self._known(region):
            return
        if len(self.memory) == MAX_REGIONS:
            raise ProtocolError(f"more than {MAX_REGIONS} regions")
        for row in self.memory:
            check_apart(row, region)
        fds.clear()
        self.memory += (region,)
        self.memory_problem = ""

    def _rem_mem_reg(self, payload: SingleRegion, _fds: list[int]) -> None:
        """Take a row out; it may be out already, see `_add_mem_reg`."""
        gone = payload.region
        wanted = (gone.gpa, gone.frontend_va, gone.size)
        out = [r for r in self.memory if (r.gpa, r.frontend_va, r.size) == wanted]
        self._retire(*(row.fd for row in out))
        self.memory = tuple(row for row in self.memory if row not in out)

    def _known(self, region: WantedRegion) -> WantedRegion | None:
        return next((old for old in self.memory if old.same_as(region)), None)

    # --- rings ---

    def _ring(self, index: int) -> WantedRing:
        if index >= len(self.rings):
            raise ProtocolError(f"ring {index}: there are {len(self.rings)}")
        return self.rings[index]

    def _any_started(self) -> bool:
        return any(ring.started for ring in self.rings)

    def _set_vring_num(self, payload: VringState, _fds: list[int]) -> None:
        ring, num = self._ring(payload.index), payload.num
        # Whether a power of two is due is judged later where features are unknown.
        check_num(ring.index, num, packed=self.packed or not self.features_known)
        if ring.runnable and num != ring.num:
            raise ProtocolError(f"ring {ring.index}: new size while it runs")
        ring.num = num

    def _set_vring_addr(self, payload: VringAddr, _fds: list[int]) -> None:
        ring = self._ring(payload.index)
        check_addresses(payload)
        if ring.runnable and ring.addr is not None and _moves(ring.addr, payload):
            raise ProtocolError(f"ring {ring.index}: new addresses while it runs")
        ring.addr = payload

    def _set_vring_base(self, payload: VringState, _fds: list[int]) -> None:
        ring, base = self._ring(payload.index), payload.num & 0xFFFF
        if ring.runnable and ring.base not in {None, base}:
            raise ProtocolError(f"ring {ring.index}: new position while it runs")
        ring.base = base

    def _get_vring_base(self, payload: VringState, _fds: list[int]) -> BaseReply:
        ring = self._ring(payload.index)  # `num` means nothing in this request
        reply = BaseReply(ring.index, ring.base or 0, self.packed)
        self._stop(ring)
        return reply

    def _set_vring_kick(self, payload: VringFd, fds: list[int]) -> None:
        ring = self._ring(payload.index)
        new = take_eventfd(payload, fds)
        self._retire(ring.kick_fd)
        ring.kick_fd, ring.started = new, True

    def _set_vring_call(self, payload: VringFd, fds: list[int]) -> None:
        ring = self._ring(payload.index)
        new = take_eventfd(payload, fds)
        self._retire(ring.call_fd)
        ring.call_fd = new

    def _set_vring_err(self, payload: VringFd, fds: list[int]) -> None:
        ring = self._ring(payload.index)
        new = take_eventfd(payload, fds)
        self._retire(ring.err_fd)
        ring.err_fd = new

    def _set_vring_enable(self, payload: VringState, _fds: list[int]) -> None:
        if payload.num > 1:
            raise ProtocolError(f"ring {payload.index}: {payload.num}, not 0 or 1")
        self._ring(payload.index).enable = bool(payload.num)

    def _stop(self, ring: WantedRing) -> None:
        """Forget what a start gives anew.

        The addresses first of all: after a reboot they may lead to memory that went
        away. Size and `enable` stay, as front-ends do not repeat them; err does too.
        """
        self._retire(ring.kick_fd, ring.call_fd)
        ring.kick_fd = ring.call_fd = NO_FD
        ring.addr = ring.base = None
        ring.started = False

    def _retire(self, *fds: int) -> None:
        self._retired += [fd for fd in fds if fd != NO_FD]

    def judge_rings(self) -> None:
        """Derive of every ring what follows from what was said."""
        features = self.features or 0
        by_default = self.features_known and not features & virtio.F_PROTOCOL_FEATURES
        for ring in self.rings:
            ring.enabled = by_default if ring.enable is None else ring.enable
            ring.logged = ring.addr is not None and bool(ring.addr.flags & VRING_F_LOG)
            ring.areas, ring.problem = find_areas(ring, self.memory, packed=self.packed)
            ready = self.features_known and ring.started
            ring.runnable = ready and ring.areas is not None


# --- which method serves which request ---

_Answer = Payload | BaseReply | None
# Each method is given the kind of payload that RULES promises it.
_Handler = Callable[[Session, Any, list[int]], _Answer]

# ruff: noqa: SLF001 -- the table is a part of the class, below it to name its methods
_HANDLERS: Final[dict[int, _Handler]] = {
    Request.GET_FEATURES: Session._get_features,
    Request.SET_FEATURES: Session._set_features,
    Request.SET_OWNER: Session._ignore,
    Request.RESET_OWNER: Session._ignore,
    Request.SET_MEM_TABLE: Session._set_mem_table,
    Request.SET_LOG_BASE: Session._set_log_base,
    Request.SET_LOG_FD: Session._ignore,
    Request.SET_VRING_NUM: Session._set_vring_num,
    Request.SET_VRING_ADDR: Session._set_vring_addr,
    Request.SET_VRING_BASE: Session._set_vring_base,
    Request.GET_VRING_BASE: Session._get_vring_base,
    Request.SET_VRING_KICK: Session._set_vring_kick,
    Request.SET_VRING_CALL: Session._set_vring_call,
    Request.SET_VRING_ERR: Session._set_vring_err,
    Request.GET_PROTOCOL_FEATURES: Session._get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: Session._set_protocol_features,
    Request.GET_QUEUE_NUM: Session._get_queue_num,
    Request.SET_VRING_ENABLE: Session._set_vring_enable,
    Request.GET_CONFIG: Session._get_config,
    Request.SET_CONFIG: Session._set_config,
    Request.SEND_RARP: Session._send_rarp,
    Request.NET_SET_MTU: Session._net_set_mtu,
    Request.RESET_DEVICE: Session._reset_device,
    Request.GET_MAX_MEM_SLOTS: Session._get_max_mem_slots,
    Request.ADD_MEM_REG: Session._add_mem_reg,
    Request.REM_MEM_REG: Session._rem_mem_reg,
    Request.SET_STATUS: Session._set_status,
    Request.GET_STATUS: Session._get_status,
}


def _moves(old: VringAddr, new: VringAddr) -> bool:
    return (old.desc, old.avail, old.used) != (new.desc, new.avail, new.used)


def _failure(message: Message) -> bytes:
    return encode_reply(message.request, U64(1))


def _joined(names: Sequence[str]) -> str:
    return ", ".join(names)
