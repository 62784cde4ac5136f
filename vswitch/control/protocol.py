"""Messages between the manager and its workers: msgpack over a packet socket, with fds.

A packet socket keeps message boundaries, so a message is one send and one receive. Each
is a list: a word, a sequence number where an answer is due, then arguments.

    manager to worker           arguments, descriptors
    ["map", seq, mappings]      [addr, length, offset, fd number] each; one fd each
    ["unmap", seq, mappings]    [addr, length, fd number] each
    ["fds", seq, numbers]       put each descriptor at its number
    ["close", seq, numbers]
    ["sync", seq, dead]         look at the records again; repair what worker `dead`
                                (or -1) left behind
    ["fdb", seq, verb, args]    set, remove or flush: `vswitch.datapath.fdb`
    ["span", seq]               where our mappings and numbers are
    ["shed", seq, span]         give up all that were within it
    ["leave", seq]              end between two turns; the answer is when (monotonic, ns)

    worker to manager
    ["progress", done, total]   functions compiled
    ["ready", code]             the digest of the sources that it runs
    ["ack", seq, result]        result: a number, negative for -errno; span: four
"""

import array
import socket
from collections.abc import Sequence
from typing import Any, Final

import msgpack

_MAX_MESSAGE: Final = 1 << 16
MAX_FDS: Final = 128  # per message; the kernel takes 253


def pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair of packet sockets."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, message: list[Any], fds: Sequence[int] = ()) -> None:
    """Send one message.

    Raises:
        BlockingIOError: The socket is non-blocking and the peer does not read.
        OSError: The peer is gone.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    sock.sendmsg([msgpack.packb(message)], rights if fds else [])


def receive(sock: socket.socket) -> tuple[list[Any], list[int]]:
    """Receive one message and its descriptors; never waits, whatever the socket does.

    Raises:
        BlockingIOError: There is none.
        EOFError: The peer is gone.
    """
    room = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    data, control, _, _ = sock.recvmsg(_MAX_MESSAGE, room, flags)
    fds = array.array("i")
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if not data:
        message = "the peer closed its socket"
        raise EOFError(message)
    return msgpack.unpackb(data), list(fds)
