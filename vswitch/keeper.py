"""The keeper: a process that holds what must outlive the manager, and does nothing.

    python -m vswitch.keeper SOCKET_FD RUN_DIR

A kill closes a process's descriptors, unless another one has them, too. So the manager
gives a copy of each that matters to the keeper: front-ends' connections, taps, and its
own ends of the workers' sockets, for which the workers do not notice its death. The next
manager of the run directory takes all of it over. If the keeper dies the manager starts
another; if both die, everything is closed and the workers end.

Messages (`control/protocol.py`), from the manager:

    ["keep", key, words]   and descriptors, in place of what the key had before
    ["keep", key, words, place, data]
                           the same, then send `data` by the descriptor at `place`: so a
                           front-end's message is done with and answered in one step,
                           whenever the manager is killed
    ["drop", key]
    ["settle"]             say ["done"] when all before is done
    ["end"]                close everything and end

A new manager connects to the socket in the run directory, and is sent each key's "keep",
then ["done"]. From then on it is the manager.
"""

import os
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from vswitch import privileges
from vswitch.control import protocol, rundir

_LONGEST_SEND_S: Final = 5.0


class Keeper:
    """What is kept, by key."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, list[int]]] = {}

    def serve(self, manager: socket.socket) -> bool:
        """Serve a manager until it is gone; False if it has told us to end."""
        wait = select.poll()
        wait.register(manager, select.POLLIN)
        while True:
            wait.poll()
            try:
                (word, *arguments), fds = protocol.receive(manager)
            except BlockingIOError:
                continue
            except (EOFError, OSError):
                return bool(self._kept)
            if word == "end":
                return False
            if word == "settle":
                with suppress(OSError):
                    protocol.send(manager, ["done"])
                continue
            self._drop(arguments[0])
            if word == "keep":
                self._keep(fds, *arguments)

    def _keep(
        self,
        fds: list[int],
        key: str,
        words: object,
        place: int = -1,
        data: bytes = b"",
    ) -> None:
        self._kept[key] = (words, fds)
        if data:
            # The manager has seen that there is room; a peer that is gone is its business.
            with suppress(OSError), socket.socket(fileno=os.dup(fds[place])) as peer:
                peer.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _drop(self, key: str) -> None:
        for fd in self._kept.pop(key, ("", []))[1]:
            os.close(fd)

    def hand_over(self, manager: socket.socket) -> None:
        """Send everything to a new manager, which may be gone again."""
        manager.settimeout(_LONGEST_SEND_S)
        with suppress(OSError):
            for key, (words, fds) in self._kept.items():
                protocol.send(manager, ["keep", key, words], fds)
            protocol.send(manager, ["done"])


def listen(run_dir: Path) -> socket.socket:
    """Listen in a run directory, in place of a keeper that is gone."""
    path = run_dir / rundir.KEEPER
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    old = os.umask(0o177)
    listener.bind(str(path))
    os.umask(old)
    listener.listen(1)
    return listener


def main() -> None:
    """Keep until a manager says that it is over, or is gone and has kept nothing."""
    fd, run_dir = int(sys.argv[1]), Path(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the manager's business
    privileges.give_up()
    keeper, manager = Keeper(), socket.socket(fileno=fd)
    with listen(run_dir) as listener:
        protocol.send(manager, ["ready"])
        while keeper.serve(manager):
            manager.close()
            manager, _ = listener.accept()
            keeper.hand_over(manager)
        (run_dir / rundir.KEEPER).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
