"""A guest with one network device: frames in, frames out, as bytes or arrays.

    with Guest.connect("vm1.sock") as guest:
        guest.send(frame)
        for frame in guest.receive(timeout=1.0):
            ...

Life: open -> (stop -> start | reset)* -> disconnect -> open again ... -> close. Memory,
rings and what is in them survive everything but reset and close, as in a real guest
whose front-end reconnects.

One thread may send while another receives; no two threads may do the same.
"""

import contextlib
import hashlib
import os
import select
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import numpy as np

from ports.native import Record
from ports.vhost import virtio
from ports.vhost.messages import U64, Request
from vswitch.guest import ring as driver
from vswitch.guest.errors import GuestError
from vswitch.guest.frontend import (
    DEFAULT_ORDER,
    DEFAULT_PROTOCOL,
    Frontend,
    Listener,
    RingSetup,
    eventfd,
)
from vswitch.guest.header import NetHeader, pack_headers, usable
from vswitch.guest.layout import Layout, RingShape, Shape
from vswitch.guest.memory import HOLE, Bytes, GuestMemory

DEFAULT_FEATURES: Final = (
    virtio.F_VERSION_1
    | virtio.F_MRG_RXBUF
    | virtio.F_INDIRECT_DESC
    | virtio.F_EVENT_IDX
    | virtio.F_MQ
    | virtio.F_PROTOCOL_FEATURES
)

FrameArray = np.ndarray[tuple[int, int], np.dtype[np.uint8]]
Lengths = np.ndarray[tuple[int], np.dtype[np.int64]]

_PLAIN: Final = Shape()
_ROOM: Final = 4 << 20  # bytes copied out of the rings at a time
_BURST: Final = 1024  # frames, the same
_FAULTS: Final = ("bad_used", "bad_len", "bad_header")


class Guest:
    """A guest and its connection to the switch."""

    def __init__(
        self,
        path: str | Path,
        *,
        mode: Literal["client", "server"] = "client",
        mac: str | bytes | None = None,
        queue_pairs: int = 1,
        queue_size: int = 256,
        features: int = DEFAULT_FEATURES,
        packed: bool = False,
        protocol_features: int = DEFAULT_PROTOCOL,
        rx_buffer_len: int = 2048,
        tx_buffer_len: int = 2048,
        rx_buffers: int | None = None,
        shape: Shape = _PLAIN,
        rx_shape: Shape = _PLAIN,
        start_index: int = 0,
        regions: int = 1,
        gap: int = HOLE,
        memory_size: int | None = None,
        order: Sequence[str] = DEFAULT_ORDER,
        memory_first: bool = False,
        ack: bool = True,
        timeout: float = 10.0,
    ) -> None:
        """Prepare a guest; `open` or `with` attaches it.

        Args:
            path: The vhost-user socket.
            mode: "client" connects to the switch; "server" listens, from now on, for a
                switch whose port is in client mode.
            mac: The guest's address; by default made from the path.
            queue_pairs: Pairs of a receive and a transmit ring.
            queue_size: Descriptors a ring; a power of two, but for packed rings.
            features: Virtio features to accept where offered, and where those that
                they need are there, too. `header.OFFLOADS` are the ones for frames
                with half a checksum and for super-frames; mind the buffers' lengths.
            packed: Use packed rings, and nothing else.
            protocol_features: The same for vhost-user's own.
            rx_buffer_len: Bytes of a receive buffer, virtio header included.
            tx_buffer_len: Bytes of a transmit buffer, the same; limits frames sent.
            rx_buffers: How many receive buffers to offer a ring; by default all.
            shape: How frames to send are cut into descriptors.
            rx_shape: How receive buffers are.
            start_index: Where the free-running ring indexes begin; packed rings: as
                many descriptors later than at the first lap's begin.
            regions: How many memory regions to tell the switch.
            gap: Guest-physical hole between two regions; 0 makes buffers cross over.
            memory_size: Bytes of guest memory; by default what rings and buffers need.
            order: Steps of a ring's start, see `frontend.DEFAULT_ORDER`.
            memory_first: Send the memory table before SET_FEATURES.
            ack: Ask for an acknowledgement of each message, where negotiated.
            timeout: Seconds to wait for the switch at each message.
        """
        self.mac = mac_bytes(mac if mac is not None else _mac_for(path))
        self.frontend: Frontend | None = None
        self.layouts: list[Layout] = []
        self._path, self._order, self._ack = path, tuple(order), ack
        self._timeout, self._memory_first = timeout, memory_first
        self._wanted = features if queue_pairs > 1 else features & ~virtio.F_MQ
        self._wanted |= virtio.F_RING_PACKED if packed else 0
        self._needs_packed = packed
        self._protocol = protocol_features
        self._start_index = start_index
        plans = (
            RingShape(queue_size, rx_buffer_len, rx_shape),
            RingShape(queue_size, tx_buffer_len, shape),
        ) * queue_pairs
        self._plans = plans
        self._posted = rx_buffers if rx_buffers is not None else plans[0].slots
        # Everything may land in one region, so each must have room for all.
        needed = memory_size or regions * sum(plan.bytes for plan in plans)
        self.memory = GuestMemory(needed, regions, gap)
        self.rings = np.zeros(len(plans), driver.DRIVER_RING)
        self.rings["kick_fd"] = [eventfd() for _ in plans]
        self.rings["call_fd"] = [eventfd() for _ in plans]
        self._bases: list[int] | None = None
        self._room = np.empty(_ROOM, np.uint8)
        self._offsets = np.zeros(_BURST, np.int64)
        self._lengths = np.zeros(_BURST, np.int64)
        self._headers = np.zeros(_BURST, virtio.NET_HDR)
        self._listener = Listener(path) if mode == "server" else None

    @classmethod
    def connect(cls, path: str | Path, **options: Any) -> Self:  # noqa: ANN401
        """Make a guest and attach it; the options are the constructor's."""
        guest = cls(path, **options)
        try:
            guest.open()
        except BaseException:
            guest.close()
            raise
        return guest

    def __enter__(self) -> Self:
        if self.frontend is None:
            try:
                self.open()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- life -------------------------------------------------------------------------

    def open(self, base: int | None = None) -> None:
        """Attach to the switch and start all rings.

        Args:
            base: What to say in SET_VRING_BASE; by default where each ring stands.

        Raises:
            GuestError: Nobody answers, or something was refused.
        """
        options: dict[str, Any] = {"ack": self._ack, "timeout": self._timeout}
        if self._listener is not None:
            self.frontend = self._listener.accept(**options)
        else:
            self.frontend = Frontend.connect(self._path, **options)
        self._negotiate(self.frontend)
        if base is not None:
            self._bases = [base] * len(self.rings)
        self.start()

    def _negotiate(self, frontend: Frontend) -> None:
        frontend.negotiate(self._wanted, self._protocol, set_features=False)
        frontend.features = usable(frontend.features)
        if self._needs_packed and not frontend.features & virtio.F_RING_PACKED:
            raise GuestError(
                "cannot use packed rings: the switch does not offer them "
                "(leave packed away)"
            )
        pairs = len(self.rings) // 2
        if pairs > frontend.max_pairs:
            raise GuestError(
                f"cannot use {pairs} queue pairs: the switch allows "
                f"{frontend.max_pairs} (add the port with more --queues)"
            )
        fds = [self.memory.fd] * len(self.memory.table.regions)
        if self._memory_first:
            frontend.set_memory(self.memory.table, fds)
        frontend.request(Request.SET_FEATURES, U64(frontend.features))
        if not self._memory_first:
            frontend.set_memory(self.memory.table, fds)
        if not self.layouts:
            self._lay_out(frontend.features)

    def _lay_out(self, features: int) -> None:
        self.layouts = [
            Layout(self.memory, plan, features, ring, receives=index % 2 == 0)
            for index, (plan, ring) in enumerate(
                zip(self._plans, self.rings, strict=True)
            )
        ]
        self._empty_rings()

    def _empty_rings(self) -> None:
        """Begin anew: nothing offered but the receive buffers."""
        for layout in self.layouts:
            layout.clear(self._start_index)
        self._bases = None
        for ring in self._receive_rings():
            driver.refuse_calls(ring)
            driver.post_buffers(ring, self._posted)
        for ring in self._transmit_rings():
            driver.refuse_calls(ring)

    def start(self) -> None:
        """Hand the rings to the switch, where they were stopped."""
        frontend = self._attached()
        # After a disconnect nobody told us; what the device completed is in the ring.
        bases = self._bases or [layout.device_position() for layout in self.layouts]
        for index, (ring, base) in enumerate(zip(self.rings, bases, strict=True)):
            setup = RingSetup(
                index=index,
                size=int(ring["size"]),
                base=base,
                desc=int(ring["desc"]),
                avail=int(ring["avail"]),
                used=int(ring["used"]),
                kick_fd=int(ring["kick_fd"]),
                call_fd=int(ring["call_fd"]),
            )
            frontend.start_ring(setup, self._order)
        frontend.driver_ok()
        self._bases = None

    def stop(self) -> list[int]:
        """Take all rings back; where each stands."""
        frontend = self._attached()
        self._bases = [frontend.stop_ring(index) for index in range(len(self.rings))]
        return self._bases

    def reset(self) -> None:
        """Stop, forget everything in the rings, and start again: a driver's reset."""
        self.stop()
        self._empty_rings()
        self.start()

    def disconnect(self) -> None:
        """Hang up without a word; `open` attaches again."""
        if self.frontend is not None:
            self.frontend.close()
            self.frontend = None

    def close(self) -> None:
        """Hang up and give everything back."""
        self.disconnect()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for name in ("kick_fd", "call_fd"):
            for fd in self.rings[name]:
                if fd >= 0:
                    os.close(int(fd))
            self.rings[name] = -1
        self.memory.close()

    def enable(self, index: int, *, on: bool) -> None:
        """Let the switch use virtqueue `index`, or keep it off."""
        self._attached().enable_ring(index, enable=on)

    def wait_ready(self) -> None:
        """Return when the switch has handled everything it was told."""
        self._attached().barrier()

    @property
    def features(self) -> int:
        """Virtio features in use."""
        return self._attached().features

    @property
    def mac_text(self) -> str:
        """The guest's address as people write it."""
        return self.mac.hex(":")

    def faults(self) -> dict[str, int]:
        """What the device did wrong, by ring and kind; empty if nothing."""
        found = {
            f"ring {index} {name}": int(ring[name])
            for index, ring in enumerate(self.rings)
            for name in _FAULTS
        }
        for index, layout in enumerate(self.layouts):
            found[f"ring {index} overrun"] = layout.overrun()
        return {name: count for name, count in found.items() if count}

    # --- frames -----------------------------------------------------------------------

    def send(
        self,
        frames: bytes | Sequence[bytes] | FrameArray,
        queue: int = 0,
        headers: Sequence[NetHeader] | None = None,
    ) -> int:
        """Offer frames until the ring is full; how many were taken. Never waits.

        Args:
            frames: From destination address to payload's end, each.
            queue: The queue pair to send on.
            headers: What each frame's virtio-net header says; by default nothing. They
                go as they are, also what was not negotiated.

        Raises:
            GuestError: A frame is larger than a transmit buffer, or there are not as
                many headers as frames.
        """
        ring = self.rings[2 * queue + 1]
        data, offsets, lengths = _pack(frames)
        most = int(ring["buffer_len"] - ring["header_len"])
        if lengths.size and lengths.max() > most:
            raise GuestError(
                f"cannot send a frame of {lengths.max()} bytes: a buffer holds {most} "
                "(give the guest a larger tx_buffer_len)"
            )
        packed = None if headers is None else pack_headers(headers, lengths.size)
        return driver.send_frames(
            ring,
            int(data.ctypes.data),
            offsets,
            lengths,
            0 if packed is None else int(packed.ctypes.data),
        )

    def send_all(
        self,
        frames: bytes | Sequence[bytes] | FrameArray,
        queue: int = 0,
        timeout: float = 5.0,
        headers: Sequence[NetHeader] | None = None,
    ) -> None:
        """Send every frame, waiting for room; the arguments are those of `send`.

        Raises:
            GuestError: As in `send`, or the switch did not take them in time.
        """
        frames = [frames] if isinstance(frames, bytes) else frames
        deadline = time.monotonic() + timeout
        done = self.send(frames, queue, headers)
        while done < len(frames):
            if not self._wait([self.rings[2 * queue + 1]], deadline):
                raise GuestError(
                    f"the switch took {done} of {len(frames)} frames in {timeout} s"
                )
            left = None if headers is None else headers[done:]
            done += self.send(frames[done:], queue, left)

    def wait_sent(self, timeout: float = 5.0) -> None:
        """Wait until the switch has given back every frame sent.

        Raises:
            GuestError: It did not in time.
        """
        deadline = time.monotonic() + timeout
        for layout in self.layouts[1::2]:
            driver.reap(layout.ring)
            while layout.outstanding:
                if not self._wait([layout.ring], deadline):
                    raise GuestError(
                        f"the switch kept {layout.outstanding} frames for {timeout} s"
                    )
                driver.reap(layout.ring)

    def outstanding(self) -> int:
        """How many frames the switch has not given back yet."""
        layouts = self.layouts[1::2]
        for layout in layouts:
            driver.reap(layout.ring)
        return sum(layout.outstanding for layout in layouts)

    def receive(
        self,
        timeout: float = 1.0,
        max_frames: int | None = None,
        at_least: int = 1,
    ) -> list[bytes]:
        """Frames that have arrived, on any queue; sleeps until there are `at_least`.

        Returns fewer only when `timeout` seconds are over.
        """
        arrived = self.receive_with_headers(timeout, max_frames, at_least)
        return [frame for _, frame in arrived]

    def receive_with_headers(
        self,
        timeout: float = 1.0,
        max_frames: int | None = None,
        at_least: int = 1,
    ) -> list[tuple[NetHeader, bytes]]:
        """The same, each frame with its virtio-net header.

        A guest that takes offloads has to look: NEEDS_CSUM means that the checksum is
        not there yet, a gso_type that the frame stands for several. In a header of 10
        bytes there is no num_buffers; it is 0 then.
        """
        deadline = time.monotonic() + timeout
        frames: list[tuple[NetHeader, bytes]] = []
        while True:
            for ring in self._receive_rings():
                room = _BURST if max_frames is None else max_frames - len(frames)
                frames += self._take(ring, room)
            if len(frames) >= min(at_least, max_frames or at_least):
                return frames
            if not self._wait(self._receive_rings(), deadline):
                return frames

    def receive_array(
        self, timeout: float = 1.0, max_frames: int = _BURST, width: int = 2048
    ) -> tuple[FrameArray, Lengths]:
        """The same as rows of an array, cut or zero-filled to `width`, and lengths."""
        frames = self.receive(timeout, max_frames)
        rows = np.zeros((len(frames), width), np.uint8)
        for row, frame in zip(rows, frames, strict=True):
            part = frame[:width]
            row[: len(part)] = np.frombuffer(part, np.uint8)
        return rows, np.array([len(frame) for frame in frames], np.int64)

    def _take(self, ring: Record, most: int) -> list[tuple[NetHeader, bytes]]:
        n = driver.receive_frames(
            ring,
            int(self._room.ctypes.data),
            self._room.size,
            self._offsets[:most],
            self._lengths[:most],
            int(self._headers.ctypes.data),
        )
        spans = zip(self._offsets[:n].tolist(), self._lengths[:n].tolist(), strict=True)
        return [
            (NetHeader(*header), self._room[at : at + length].tobytes())
            for header, (at, length) in zip(
                self._headers[:n].tolist(), spans, strict=True
            )
        ]

    def _wait(self, rings: Sequence[Record], deadline: float) -> bool:
        """Sleep until the device has used something in a ring; False: deadline."""
        try:
            if any(driver.ask_for_calls(ring) for ring in rings):
                return True
            poll = select.poll()
            fds = [int(ring["call_fd"]) for ring in rings]
            for fd in fds:
                poll.register(fd, select.POLLIN)
            left = deadline - time.monotonic()
            woken = poll.poll(max(0.0, left) * 1000)
            for fd, _ in woken:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
            return bool(woken) or left > 0
        finally:
            for ring in rings:
                driver.refuse_calls(ring)

    # --- the rest ---------------------------------------------------------------------

    def _receive_rings(self) -> list[Record]:
        return [layout.ring for layout in self.layouts[::2]]

    def _transmit_rings(self) -> list[Record]:
        return [layout.ring for layout in self.layouts[1::2]]

    def _attached(self) -> Frontend:
        if self.frontend is None:
            raise GuestError("the guest is not attached (call open first)")
        return self.frontend


def _pack(
    frames: bytes | Sequence[bytes] | FrameArray,
) -> tuple[Bytes, Lengths, Lengths]:
    """Frames as one run of bytes, with the place and length of each."""
    if isinstance(frames, np.ndarray):
        count, width = frames.shape
        data = np.ascontiguousarray(frames, np.uint8).reshape(-1)
        return data, np.arange(count) * width, np.full(count, width, np.int64)
    if isinstance(frames, bytes):
        frames = [frames]
    lengths = np.array([len(frame) for frame in frames], np.int64)
    ends = np.cumsum(lengths)
    return np.frombuffer(b"".join(frames), np.uint8), ends - lengths, lengths


def _mac_for(path: str | Path) -> bytes:
    digest = hashlib.sha256(str(path).encode()).digest()
    return b"\x52\x54\x00" + digest[:3]


def mac_bytes(mac: str | bytes) -> bytes:
    """A MAC address as six bytes, also from its text."""
    raw = bytes.fromhex(mac.replace(":", "")) if isinstance(mac, str) else mac
    if len(raw) != 6:
        raise GuestError(f"cannot use {mac!r} as a MAC address: it is not 6 bytes")
    return raw
