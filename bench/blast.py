"""Small frames from one interface, as fast as one thread can make the kernel send them."""

import socket
import time
from typing import Final

import numpy as np

from bench.namespace import Namespace
from ports.burst import MESSAGE, SEGMENT
from ports.native import sendmmsg_fd

_SOL_PACKET: Final = 263
_QDISC_BYPASS: Final = 20
_BURST: Final = 64
_MIN_FRAME: Final = 60


class Blaster:
    """Sends one frame again and again; use as a context manager."""

    def __init__(self, space: Namespace, interface: str, frame: bytes) -> None:
        """Open a packet socket in a namespace."""
        self._frame = np.frombuffer(frame.ljust(_MIN_FRAME, b"\0"), np.uint8).copy()
        self._piece = np.zeros(1, SEGMENT)
        self._piece["addr"] = self._frame.ctypes.data
        self._piece["len"] = len(self._frame)
        self._messages = np.zeros(_BURST, MESSAGE)
        self._messages["pieces"] = self._piece.ctypes.data
        self._messages["n_pieces"] = 1
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
            sendmmsg_fd(fd, messages, _BURST)
            now = time.monotonic()
        return now - begin

    def __enter__(self) -> "Blaster":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
