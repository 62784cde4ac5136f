"""The front-end of vhost-user: what QEMU does to attach a guest, in our order or yours.

    Frontend.connect(path) or listen(path) + accept
      negotiate   -> features both sides know
      set_memory, start_ring ..., enable_ring
      stop_ring   -> where the ring stands

Requests are synchronous. With REPLY_ACK negotiated and `ack` on, each request that has no
reply of its own asks for an acknowledgement, so an error is raised at its cause and a
return means that the back-end has done it; `request` lets tests choose per message.

vhost-user: every chapter but migration, postcopy and in-flight tracking.
"""

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from ports.vhost import virtio
from ports.vhost.messages import (
    HEADER_LEN,
    PF_MQ,
    PF_NET_MTU,
    PF_REPLY_ACK,
    PF_STATUS,
    RULES,
    U64,
    MemTable,
    Payload,
    Request,
    VringAddr,
    VringFd,
    VringState,
    decode_header,
    decode_reply,
    encode_request,
    request_name,
)
from vswitch.guest.errors import GuestError

DEFAULT_PROTOCOL: Final = PF_MQ | PF_REPLY_ACK | PF_NET_MTU | PF_STATUS
DRIVER_OK: Final = 0xF  # ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK

# The steps of one ring's start, in QEMU's order.
DEFAULT_ORDER: Final = ("num", "base", "addr", "kick", "call", "enable")


@dataclass(frozen=True)
class RingSetup:
    """What the back-end has to know of one virtqueue."""

    index: int
    size: int
    base: int
    desc: int  # our address, as are the next two
    avail: int
    used: int
    kick_fd: int
    call_fd: int


class Frontend:
    """One vhost-user connection, seen from the guest's side."""

    def __init__(
        self, sock: socket.socket, *, ack: bool = True, timeout: float = 10.0
    ) -> None:
        self._sock = sock
        self._ack = ack
        sock.settimeout(timeout)
        self.features = 0
        self.protocol_features = 0
        self.max_pairs = 1

    @classmethod
    def connect(
        cls, path: str | Path, *, ack: bool = True, timeout: float = 10.0
    ) -> Self:
        """Connect to a back-end that listens at `path`.

        Raises:
            GuestError: Nobody listens there.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
        except OSError as error:
            sock.close()
            raise GuestError(
                f"cannot connect to {path}: {error.strerror} "
                "(is the port there, and in server mode?)"
            ) from error
        return cls(sock, ack=ack, timeout=timeout)

    def close(self) -> None:
        """Hang up, as a guest that is killed does."""
        self._sock.close()

    def request(
        self,
        request: int,
        payload: Payload | None = None,
        fds: Sequence[int] = (),
        *,
        ack: bool | None = None,
    ) -> Payload | None:
        """Send one request; its reply, if it has one.

        Args:
            request: Which; also one that we do not know.
            payload: What goes with it.
            fds: Descriptors to send along; they stay ours.
            ack: Ask for an acknowledgement where the request has no reply of its own;
                by default as the connection was told, and only with REPLY_ACK.

        Raises:
            GuestError: The back-end refused, hung up, or did not answer in time.
        """
        wants_ack = self._ack if ack is None else ack
        wants_ack = wants_ack and bool(self.protocol_features & PF_REPLY_ACK)
        rule = RULES.get(request)
        has_reply = rule is not None and rule.reply is not None
        data = encode_request(request, payload, need_reply=wants_ack and not has_reply)
        self.send_raw(data, fds)
        if not has_reply and not wants_ack:
            return None
        reply = self._receive(request)
        if not has_reply and reply != U64(0):
            raise GuestError(f"the switch refused {request_name(request)}: {reply}")
        return reply

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send any bytes at all, `fds` on the first of them."""
        try:
            sent = socket.send_fds(self._sock, [data], list(fds))
            if sent < len(data):
                self._sock.sendall(data[sent:])
        except OSError as error:
            raise GuestError(
                f"cannot send to the switch: {error} (it closed the connection)"
            ) from error

    def negotiate(
        self,
        wanted: int,
        protocol: int = DEFAULT_PROTOCOL,
        *,
        set_features: bool = True,
    ) -> int:
        """Agree on features; the ones both sides know.

        Args:
            wanted: Virtio features the driver can use.
            protocol: The same for vhost-user's own.
            set_features: Also send SET_FEATURES; else the caller does, some time.
        """
        offered = self._number(Request.GET_FEATURES)
        self.features = offered & wanted
        if self.features & virtio.F_PROTOCOL_FEATURES:
            known = self._number(Request.GET_PROTOCOL_FEATURES) & protocol
            self.request(Request.SET_PROTOCOL_FEATURES, U64(known), ack=False)
            self.protocol_features = known
            if known & PF_MQ:
                self.max_pairs = self._number(Request.GET_QUEUE_NUM)
        self.request(Request.SET_OWNER)
        if set_features:
            self.request(Request.SET_FEATURES, U64(self.features))
        return self.features

    def set_memory(self, table: MemTable, fds: Sequence[int]) -> None:
        """Tell where guest memory is, one descriptor a region."""
        self.request(Request.SET_MEM_TABLE, table, fds)

    def start_ring(self, ring: RingSetup, order: Sequence[str] = DEFAULT_ORDER) -> None:
        """Hand one ring over, steps in the given order."""
        for step in order:
            self._ring_step(ring, step)

    def _ring_step(self, ring: RingSetup, step: str) -> None:
        index = ring.index
        if step == "num":
            self.request(Request.SET_VRING_NUM, VringState(index, ring.size))
        elif step == "base":
            self.request(Request.SET_VRING_BASE, VringState(index, ring.base))
        elif step == "addr":
            areas = VringAddr(index, 0, ring.desc, ring.used, ring.avail, 0)
            self.request(Request.SET_VRING_ADDR, areas)
        elif step == "kick":
            self._send_fd(Request.SET_VRING_KICK, index, ring.kick_fd)
        elif step == "call":
            self._send_fd(Request.SET_VRING_CALL, index, ring.call_fd)
        elif self.features & virtio.F_PROTOCOL_FEATURES:
            self.enable_ring(index, enable=True)

    def _send_fd(self, request: Request, index: int, fd: int) -> None:
        self.request(request, VringFd(index, fd >= 0), (fd,) if fd >= 0 else ())

    def enable_ring(self, index: int, *, enable: bool) -> None:
        """Let the back-end use a ring, or keep it off."""
        self.request(Request.SET_VRING_ENABLE, VringState(index, int(enable)))

    def stop_ring(self, index: int) -> int:
        """Take a ring back; the next index the back-end would have looked at."""
        reply = self.request(Request.GET_VRING_BASE, VringState(index, 0))
        if not isinstance(reply, VringState) or reply.index != index:
            raise GuestError(f"GET_VRING_BASE of ring {index} was answered: {reply}")
        return reply.num

    def driver_ok(self) -> None:
        """Report that the driver is up, where the back-end wants to know."""
        if self.protocol_features & PF_STATUS:
            self.request(Request.SET_STATUS, U64(DRIVER_OK))

    def barrier(self) -> None:
        """Return when the back-end has handled everything that was sent."""
        self._number(Request.GET_FEATURES)

    def _number(self, request: Request) -> int:
        reply = self.request(request)
        if not isinstance(reply, U64):
            raise GuestError(f"{request_name(request)} was answered: {reply}")
        return reply.value

    def _receive(self, request: int) -> Payload | None:
        head = self._read(HEADER_LEN, request)
        return decode_reply(
            request, head + self._read(decode_header(head).size, request)
        )

    def _read(self, length: int, request: int) -> bytes:
        data = b""
        while len(data) < length:
            try:
                more = self._sock.recv(length - len(data))
            except OSError as error:
                raise GuestError(
                    f"no answer to {request_name(request)}: {error}"
                ) from error
            if not more:
                raise GuestError(
                    f"no answer to {request_name(request)}: the switch hung up"
                )
            data += more
        return data


class Listener:
    """A socket at which a switch in client mode finds the guest."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(str(path))
        self._sock.listen(1)

    def accept(self, *, ack: bool = True, timeout: float = 10.0) -> Frontend:
        """Wait for the switch.

        Raises:
            GuestError: It did not come.
        """
        self._sock.settimeout(timeout)
        try:
            sock, _ = self._sock.accept()
        except TimeoutError as error:
            raise GuestError(
                f"nobody connected to {self._path} within {timeout} s "
                "(add the port with --mode client)"
            ) from error
        return Frontend(sock, ack=ack, timeout=timeout)

    def close(self) -> None:
        """Stop listening and take the socket file away."""
        self._sock.close()
        self._path.unlink(missing_ok=True)


def eventfd() -> int:
    """A fresh event counter for a kick or a call."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
