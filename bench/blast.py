"""Small frames from one interface, as fast as one thread can make the kernel send them."""

import ctypes
import socket
import time
from typing import Final

import numpy as np

from bench.namespace import Namespace

_SOL_PACKET: Final = 263
_QDISC_BYPASS: Final = 20
_BURST: Final = 64
_MIN_FRAME: Final = 60
_libc = ctypes.CDLL(None, use_errno=True)

# C's struct mmsghdr and struct iovec, their padding as part of the words.
_MESSAGE: Final = np.dtype([(f"word{n}", "<i8") for n in range(8)])
_PIECES, _N_PIECES = "word2", "word3"


class Blaster:
    """Sends one frame again and again; use as a context manager."""

    def __init__(self, space: Namespace, interface: str, frame: bytes) -> None:
        """Open a packet socket in a namespace."""
        self._frame = np.frombuffer(frame.ljust(_MIN_FRAME, b"\0"), np.uint8).copy()
        self._piece = np.array([self._frame.ctypes.data, len(self._frame)], np.int64)
        self._messages = np.zeros(_BURST, _MESSAGE)
        self._messages[_PIECES] = self._piece.ctypes.data
        self._messages[_N_PIECES] = 1
        with space.inside():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self._socket.setsockopt(_SOL_PACKET, _QDISC_BYPASS, 1)
            self._socket.bind((interface, 0))

    def run(self, seconds: float) -> float:
        """Send for so long; the seconds that it was."""
        fd, messages = self._socket.fileno(), self._messages.ctypes.data
        begin = now = time.monotonic()
        while now < begin + seconds:
            # What is refused is dropped, as by a card whose queue is full.
            _libc.sendmmsg(fd, ctypes.c_void_p(messages), _BURST, 0)
            now = time.monotonic()
        return now - begin

    def __enter__(self) -> "Blaster":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
