"""A worker process: turns of the jitted data path, control messages between them, sleep.

    python -m vswitch.worker SOCKET_FD NUMBER RUN_DIR CPU busy|adaptive IDLE_US

It owns nothing: the manager tells it what to map where and which descriptors to put at
which numbers, the shared records say which rings are its own. It exits when the manager's
socket closes.

States: polling (turn after turn) until nothing came for the idle time, with busy polling
for as long as there is a ring to poll; then it asks the
guests for kicks, looks once more, and sleeps in epoll on kicks, taps and the manager's
socket. Descriptors are watched edge-triggered, so a kick is never read: each write to an
eventfd is an edge.
"""

import errno
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np

from ports import cache, native
from ports.base import BACKEND_URING
from ports.errors import errno_name
from ports.uring import Uring
from ports.vhost.virtio import NET_HDR_LEN
from vswitch import lifeline, privileges, syscalls
from vswitch import shared as segment
from vswitch.control import protocol
from vswitch.datapath import clock, fdb, loop, sleep
from vswitch.records import WORKER_POLLING

_TURN_NS: Final = 1_000_000
_SLEEP_MS: Final = 1000  # then the fdb is to age
_NAP_MS: Final = 1  # as long as there is a ring that nobody kicks
_PROGRESS_S: Final = 0.2
_LONGEST_WAIT_US: Final = 20_000  # of a call; in ten turns it is begun anew

_log = logging.getLogger(__name__)


class Worker:
    """One worker: its socket, its context, its poll list."""

    def __init__(
        self,
        sock: socket.socket,
        number: int,
        run_dir: Path,
        *,
        busy: bool,
        idle_us: int,
    ) -> None:
        self._sock = sock
        self._number = number
        self._busy = busy
        self._idle_ns = idle_us * 1000
        self._shared = segment.attach(run_dir, writable=True)
        self._record = self._shared.workers[number]
        self._ctx, self._keep = loop.make_context(self._shared, number)
        self._polled = np.zeros(0, np.int64)
        self._watched: set[int] = set()
        self._mapped: dict[int, tuple[int, int]] = {}  # address: length, fd number
        self._numbers: set[int] = set()  # of descriptors, beside those of mappings
        self._lost: list[int] = []  # mappings that zeroes took the place of
        self._keep_handler = native.catch_bus_errors(self._replace)
        self._uring: Uring | None = None
        self._no_uring = ""
        self._epoll = select.epoll()
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        self._bed, self._keep_bed = sleep.make_bed(self._epoll.fileno(), _SLEEP_MS)
        self._send_lock = threading.Lock()
        self._turn_cycles = 1
        self._handlers: dict[str, Callable[..., object]] = {
            "map": self._map,
            "unmap": self._unmap,
            "fds": self._take_fds,
            "close": self._close_fds,
            "sync": self._sync,
            "fdb": self._change_fdb,
            "inject": self._inject,
            "span": self._span,
            "shed": self._shed,
            "leave": self._leave,
        }

    def warm_up(self) -> None:
        """Compile everything, or load it from the cache, and say how far that is."""
        done = threading.Event()
        reporter = threading.Thread(target=self._report_progress, args=(done,))
        reporter.start()
        try:
            loop.warm_up(self._ctx, self._number)
            sleep.warm_up(self._ctx, self._number)
        finally:
            done.set()
            reporter.join()
        self._record["cycles_per_s"] = _cycles_per_s()
        self._turn_cycles = int(self._record["cycles_per_s"]) * _TURN_NS // 10**9

    def confine(self) -> None:
        """Have what nobody else gives us, then give up every right to more."""
        self._open_uring()
        privileges.give_up()
        if lack := syscalls.confine():
            text = "worker %d: no filter of system calls: %s"
            _log.warning(text, self._number, lack)

    def announce(self) -> None:
        """Tell the manager that we can begin."""
        lifeline.hold(self._shared.workers, self._number)
        self._record["state"] = WORKER_POLLING
        self._send(["ready", cache.digest()])

    def run(self) -> None:
        """Serve until the manager goes away."""
        # Nothing in a turn may wait; what a guest makes wait is interrupted.
        signal.signal(signal.SIGALRM, lambda *_: None)
        clock.let_alarm_come(self._ctx, _LONGEST_WAIT_US)
        last_frame = time.monotonic_ns()
        bell = 0
        while True:
            moved = loop.poll_turns(
                self._ctx, self._number, self._polled, self._turn_cycles, bell
            )
            now = time.monotonic_ns()
            if moved:
                last_frame = now
            self._report_lost()
            bell = int(self._record["bell"])  # whoever rings sent something before
            self._handle_messages()
            idle = not moved and now - last_frame >= self._idle_ns
            if idle and not (self._busy and self._polled.size):
                sleep.sleep(
                    *(self._ctx, self._number, self._polled),
                    *(self._bed, self._turn_cycles),
                )
                last_frame = time.monotonic_ns()

    def _handle_messages(self) -> None:
        while True:
            try:
                message, fds = protocol.receive(self._sock)
            except BlockingIOError:
                return
            except (EOFError, ConnectionError):
                raise SystemExit(0) from None
            word, seq, *arguments = message
            handler = self._handlers[word]
            result = handler(seq, *arguments, fds) if fds else handler(seq, *arguments)
            if result is not None:
                self._send(["ack", seq, result])

    def _send(self, message: list[Any]) -> None:
        """Send; waits for the manager, who always reads.

        The socket stays a blocking one: helper threads send as well, and the mode that
        they set would be the mode in which the turn's thread receives.
        """
        with self._send_lock:
            protocol.send(self._sock, message)

    # --- memory that its owner takes away ---

    def _replace(self, addr: int) -> bool:
        """Put zeroes where a file has become too short; False if it is not a guest's.

        Runs in the middle of a turn, instead of our death; the turn goes on with a
        ring that makes no sense, which it can.
        """
        for begin, (length, _) in self._mapped.items():
            if begin <= addr < begin + length:
                self._lost.append(begin)
                return native.replace_by_zeroes(begin, length) == 0
        return False

    def _report_lost(self) -> None:
        while self._lost:
            self._send(["lost", self._lost.pop()])

    # --- what the manager asks for ---

    def _map(self, _seq: int, mappings: list[list[int]], fds: list[int]) -> int:
        for (addr, length, offset, number), fd in zip(mappings, fds, strict=True):
            failed = native.map_fixed(addr, length, fd, offset)
            os.dup2(fd, number, inheritable=False)
            os.close(fd)
            if failed and failed != -errno.EEXIST:
                # Until the manager has heard of it, the records may lead us there.
                native.replace_by_zeroes(addr, length)
            if failed:
                return failed
            self._mapped[addr] = length, number
        return 0

    def _unmap(self, seq: int, mappings: list[list[int]]) -> None:
        """Unmapping a large guest outlasts a turn, so a helper thread does it."""
        for addr, _, _ in mappings:
            self._mapped.pop(addr, None)

        def unmap() -> None:
            for addr, length, number in mappings:
                native.unmap(addr, length)
                os.close(number)
            self._send(["ack", seq, 0])

        threading.Thread(target=unmap).start()

    def _take_fds(self, _seq: int, numbers: list[int], fds: list[int]) -> int:
        for number, fd in zip(numbers, fds, strict=True):
            os.dup2(fd, number, inheritable=False)
            os.close(fd)
            self._numbers.add(number)
        return 0

    def _close_fds(self, _seq: int, numbers: Iterable[int]) -> int:
        for number in numbers:
            self._unwatch(number)
            self._numbers.discard(number)
            os.close(number)
        return 0

    # --- what a manager asks for that has found us at work ---

    def _span(self, _seq: int) -> list[int]:
        """Where our mappings and our numbers begin and end; zeroes where there are none."""
        ends = [addr + length for addr, (length, _) in self._mapped.items()]
        numbers = self._numbers | {number for _, number in self._mapped.values()}
        span = [min(self._mapped, default=0), max(ends, default=0)]
        return [*span, min(numbers, default=0), max(numbers, default=-1) + 1]

    def _shed(self, seq: int, span: list[int]) -> None:
        """Give up what we had from a manager before; all that we use is new."""
        low, high, first, end = span
        self._close_fds(seq, [n for n in self._numbers if first <= n < end])
        mappings = [
            [addr, length, number]
            for addr, (length, number) in self._mapped.items()
            if low <= addr < high
        ]
        self._unmap(seq, mappings)

    def _leave(self, seq: int) -> None:
        """End between two turns, with nothing half done; say when."""
        self._send(["ack", seq, time.monotonic_ns()])
        os._exit(0)

    def _sync(self, _seq: int, dead: int) -> int:
        if self._no_uring and self._is_uring_asked_for():
            text = "worker %d: no io_uring: %s"
            _log.warning(text, self._number, self._no_uring)
            self._no_uring = ""
        if dead >= 0:
            loop.repair_rings(self._ctx, dead, self._number)
        loop.start_rings(self._ctx, self._number)
        self._polled = loop.polled_rings(self._shared, self._number)
        rings = self._shared.rings[self._polled]
        wanted = {int(fd) for fd in rings["kick_fd"] if fd >= 0}
        # vhost-user: without a kick descriptor we have to poll.
        unkicked = bool(np.any(rings["kick_fd"] < 0))
        self._bed["longest_ms"] = _NAP_MS if unkicked else _SLEEP_MS
        for fd in self._watched - wanted:
            self._unwatch(fd)
        for fd in wanted - self._watched:
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)
        self._watched = wanted
        return 0

    def _is_uring_asked_for(self) -> bool:
        return bool(np.any(self._shared.ports["backend"] == BACKEND_URING))

    def _open_uring(self) -> None:
        """Have a ring for system calls of our own; without one, each is made by itself."""
        try:
            self._uring = Uring()
        except OSError as error:
            self._no_uring = errno_name(error)
        else:
            self._ctx["uring"] = self._uring.address

    def _unwatch(self, fd: int) -> None:
        if fd in self._watched:
            self._watched.discard(fd)
            self._epoll.unregister(fd)

    def _change_fdb(self, _seq: int, verb: str, arguments: list[int]) -> int:
        changes: dict[str, Callable[..., int]] = {
            "set": fdb.set_static,
            "remove": fdb.remove,
            "flush": fdb.flush,
        }
        return int(changes[verb](self._ctx, *arguments))

    def _inject(self, _seq: int, slot: int, frame: bytes) -> int:
        """Forward a frame as if the guest behind a port had sent it."""
        data = np.frombuffer(bytes(NET_HDR_LEN) + frame, np.uint8)
        addr = data.ctypes.data + NET_HDR_LEN
        now_s = segment.elapsed_s(self._shared)
        loop.inject(self._ctx, self._number, slot, addr, len(frame), now_s)
        return 0

    def _report_progress(self, done: threading.Event) -> None:
        while not done.wait(_PROGRESS_S):
            self._send(["progress", *native.jit_progress()])


def _cycles_per_s() -> int:
    """The cycle counter's rate, measured over one turn."""
    begin_ns, begin = time.monotonic_ns(), loop.read_cycles()
    while time.monotonic_ns() - begin_ns < _TURN_NS:
        pass
    cycles = loop.read_cycles() - begin
    return max(1, cycles * 10**9 // (time.monotonic_ns() - begin_ns))


def _has_hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def main() -> None:
    """Run a worker on the socket that the manager passed."""
    fd, number, run_dir, cpu, poll, idle_us = sys.argv[1:]
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", level=logging.INFO)
    # The manager decides when we go; Ctrl-C reaches the whole foreground group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=int(fd))
    worker = Worker(
        sock, int(number), Path(run_dir), busy=poll == "busy", idle_us=int(idle_us)
    )
    if _has_hung_up(sock):
        return  # that may be the segment of our manager's successor
    try:
        worker.warm_up()
        # Not before: loading is a second's work, and somebody forwards on that CPU.
        os.sched_setaffinity(0, {int(cpu)})
        worker.confine()
        worker.announce()
        # Nothing below makes cycles; a collection would only lengthen a turn.
        gc.freeze()
        gc.disable()
        worker.run()
    except (BrokenPipeError, ConnectionError):
        _log.info("worker %s: the manager is gone", number)


if __name__ == "__main__":
    main()
