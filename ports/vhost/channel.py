"""A vhost-user socket: whole messages in, replies out, never blocking.

A stream socket glues messages together and cuts them anywhere, and descriptors belong
to the message whose bytes they came with. What this means for us: a read never asks
for more than is missing of the *current* message; the kernel then cannot hand us the
next one's descriptors. A peer may take its time over a message but not for ever
(`deadline_s`), and may not let replies pile up (`send`).

Numba-free. Time is passed in. What messages mean is `session`'s business.
"""

import array
import fcntl
import os
import socket
import termios
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from ports.errors import ProtocolError
from ports.vhost.messages import (
    FLAG_NEED_REPLY,
    HEADER_LEN,
    MAX_FDS,
    Header,
    Message,
    check_request,
    decode_header,
    request_name,
)

MESSAGE_TIMEOUT_S: Final = 10.0  # from a message's first byte to its last
MAX_QUEUED: Final = 16 * 1024  # bytes of replies that the peer has not read

_FD_SIZE: Final = array.array("i").itemsize
_CONTROL_LEN: Final = socket.CMSG_SPACE(MAX_FDS * _FD_SIZE)
_GONE: Final = (BrokenPipeError, ConnectionResetError)


class Channel:
    """One connection to a front-end. Owns the socket and what half a message brought.

    Every error leaves the channel fit only for `close`, which closes all that it owns.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_whole: Callable[[bytes, list[int]], None] | None = None,
    ) -> None:
        """`on_whole` is shown each message that came in one piece before it is read.

        The descriptors beside it are the channel's.
        """
        self._sock = sock
        self._on_whole = on_whole
        sock.setblocking(False)
        self._header: Header | None = None  # of the message being read, when complete
        self._data = bytearray()  # of its header, then of its payload
        self._fds: list[int] = []
        self._deadline_s: float | None = None
        self._unsent = bytearray()

    def fileno(self) -> int:
        """The socket's descriptor, to wait for."""
        return self._sock.fileno()

    @property
    def deadline_s(self) -> float | None:
        """When the message that has begun must be complete; None between messages."""
        return self._deadline_s

    def receive(self, now_s: float) -> Message | None:
        """The next message, or None where it is not all there yet.

        The message's descriptors are the caller's from then on.

        Raises:
            EOFError: The peer is gone.
            ProtocolError: The stream cannot be followed any further.
        """
        try:
            most = HEADER_LEN
            if self._on_whole and self._deadline_s is None:
                most = self._show_whole(self._on_whole)
            return self._receive(now_s, most)
        except (ProtocolError, EOFError):
            self._drop_fds()
            raise

    def _show_whole(self, show: Callable[[bytes, list[int]], None]) -> int:
        """Show the next message before it is read, if all of it came in one piece.

        Returns how much to read at once: then all of it, so whoever comes after a kill
        finds either the whole message in the socket or nothing of it.

        What is shown with it are the first descriptors that wait. Linux has a look also
        behind a message that has none; whose they are, reading tells.
        """
        head, _ = self._peek(HEADER_LEN, 0)
        if len(head) < HEADER_LEN:
            return HEADER_LEN
        try:
            size = decode_header(head).size
        except ProtocolError:
            return HEADER_LEN  # reading says it
        whole = HEADER_LEN + size
        data, fds = self._peek(whole, _CONTROL_LEN)
        complete = len(data) == whole
        if complete:
            show(data, fds)
        close_fds(fds)
        return whole if complete else HEADER_LEN

    def _peek(self, length: int, room: int) -> tuple[bytes, list[int]]:
        flags = socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC
        with suppress(BlockingIOError, InterruptedError, ConnectionResetError):
            data, control, _, _ = self._sock.recvmsg(length, room, flags)
            return data, _fds_of(control)
        return b"", []

    def _receive(self, now_s: float, most: int) -> Message | None:
        if self._header is None:
            if not self._fill(HEADER_LEN, most, now_s):
                return None
            header = decode_header(bytes(self._data[:HEADER_LEN]))
            check_request(header)
            self._header = header
            del self._data[:HEADER_LEN]
        if not self._fill(self._header.size, self._header.size, now_s):
            return None
        return self._take_message(self._header)

    def _take_message(self, header: Header) -> Message:
        need_reply = bool(header.flags & FLAG_NEED_REPLY)
        fds = tuple(self._fds)
        message = Message(header.request, need_reply, bytes(self._data), fds)
        self._header = None
        self._data.clear()
        self._fds.clear()
        self._deadline_s = None
        return message

    def _fill(self, wanted: int, most: int, now_s: float) -> bool:
        """Read until `wanted` bytes are there; False where the rest is yet to come.

        No more than `most` bytes are taken, which may be more than those.
        """
        while len(self._data) < wanted:
            try:
                data, control, flags, _ = self._sock.recvmsg(
                    most - len(self._data), _CONTROL_LEN, socket.MSG_CMSG_CLOEXEC
                )
            except (BlockingIOError, InterruptedError):
                return False
            except ConnectionResetError:
                raise EOFError("front-end closed the connection") from None
            self._fds += _fds_of(control)
            self._check_fds(flags)
            if not data:
                raise EOFError(f"front-end closed the connection{self._where()}")
            if self._deadline_s is None:
                self._deadline_s = now_s + MESSAGE_TIMEOUT_S
            self._data += data
        return True

    def _check_fds(self, flags: int) -> None:
        # What the kernel could not install it has closed; the first ones are ours.
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError(
                "descriptors were lost on the way: more than "
                f"{MAX_FDS}, or no free ones here (raise the limit of open files)"
            )
        if len(self._fds) > MAX_FDS:
            raise ProtocolError(f"more than {MAX_FDS} descriptors with one message")

    def _where(self) -> str:
        if self._header is not None:
            return f" in the middle of {request_name(self._header.request)}"
        return " in the middle of a message" if self._data else ""

    def waits_with(self, data: bytes) -> bool:
        """Whether a message is the next one in the socket; it is not read."""
        return self._peek(len(data), 0)[0] == data

    @property
    def has_room(self) -> bool:
        """Whether the peer has read everything that was sent."""
        unread = array.array("i", [0])
        fcntl.ioctl(self._sock, termios.TIOCOUTQ, unread)
        return not self._unsent and unread[0] == 0

    @property
    def wants_write(self) -> bool:
        """Whether replies wait for the socket to become writable; then call `flush`."""
        return bool(self._unsent)

    def send(self, data: bytes) -> None:
        """Send a message, or keep what the socket does not take for `flush`.

        Raises:
            EOFError: The peer is gone.
            ProtocolError: The peer asks without reading the answers.
        """
        if len(self._unsent) + len(data) > MAX_QUEUED:
            raise ProtocolError(
                f"front-end does not read its replies: {len(self._unsent)} bytes wait"
            )
        self._unsent += data
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it.

        Raises:
            EOFError: The peer is gone.
        """
        while self._unsent:
            try:
                sent = self._sock.send(self._unsent, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            except _GONE:
                raise EOFError("front-end closed the connection") from None
            del self._unsent[:sent]

    def shut(self) -> None:
        """Let the conversation end; the peer, and who receives, hear of it."""
        with suppress(OSError):  # it is gone
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket and the descriptors of a message that never completed.

        The peer hears of it, even if another process has the socket as well.
        """
        self._drop_fds()
        self.shut()
        self._sock.close()

    def _drop_fds(self) -> None:
        close_fds(self._fds)
        self._fds.clear()


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors that a peer sent; an error on one does not keep the others."""
    for fd in fds:
        # Linux releases the number whatever close() reports of a peer's odd file.
        with suppress(OSError):
            os.close(fd)


def _fds_of(control: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _FD_SIZE])
    return fds.tolist()
