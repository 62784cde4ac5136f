"""The story's real guests: two QEMUs with Debian's kernel and busybox."""

import http.server
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Final

from vswitch.demo import image
from vswitch.demo.qemu import Machine, QemuGuest
from vswitch.demo.screen import Screen

_SIZE: Final = 16 << 20
_WEB_PORT: Final = 8000


class RealGuests:
    """Two QEMU guests and what they do.

    Args:
        directory: Where the switch's sockets are and logs go.
        screen: Where it is shown.
    """

    def __init__(self, directory: Path, screen: Screen) -> None:
        self._directory = directory
        self._screen = screen
        self._guests: list[QemuGuest] = []
        self._owned = ExitStack()

    def start(self, addresses: list[str]) -> None:
        """Boot a guest on each of vm1.sock and vm2.sock, both at once.

        Raises:
            VswitchError: There is no image, or a guest does not boot.
        """
        booted = image.prepare()
        self._screen.step("booting two QEMU guests (Debian's kernel, busybox, TCG)")
        for number, address in enumerate(addresses, start=1):
            machine = Machine(
                name=f"vm{number}",
                socket_path=self._directory / f"vm{number}.sock",
                mac=f"52:54:00:00:00:0{number}",
                address=f"{address}/24",
            )
            guest = QemuGuest(booted, machine, self._directory)
            self._guests.append(self._owned.enter_context(guest))
        with self._screen.waiting("booting"):
            for guest in self._guests:
                guest.wait_ready()
        release = self._guests[0].check("uname -sr")
        self._screen.check(f"vm1 and vm2 are up: {release}", ok=True)

    def ping(self, address: str) -> None:
        """Ping an address from vm1."""
        output = self._show(0, f"ping -c 3 -i 0.2 {address}")
        self._screen.check(f"vm1 reaches {address}", ok="3 packets received" in output)

    def transfer(self, address: str) -> None:
        """Fetch random bytes from vm2 to vm1 over TCP and compare their digests."""
        blob = f"dd if=/dev/urandom of=/www/blob bs=1M count={_SIZE >> 20}"
        self._guests[1].check(f"{blob} && httpd -h /www")
        wanted = self._show(1, "sha256sum /www/blob").split()[0]
        self._fetch(f"http://{address}/blob", wanted)

    def transfer_from_host(self, address: str) -> None:
        """Fetch random bytes from a web server on the host, through the tap."""
        content = secrets.token_bytes(_SIZE)
        folder = self._directory / "www"
        folder.mkdir()
        (folder / "blob").write_bytes(content)
        with _web_server(folder, address):
            self._screen.note(f"the host serves a file on {address}:{_WEB_PORT}")
            wanted = sha256(content).hexdigest()
            self._fetch(f"http://{address}:{_WEB_PORT}/blob", wanted)

    def stop(self) -> None:
        """Switch the guests off."""
        self._owned.close()
        self._guests.clear()

    def _fetch(self, url: str, wanted: str) -> None:
        self._guests[0].check("rm -f /tmp/blob")
        output = self._show(0, f"time wget -q -O /tmp/blob {url}")
        found = self._show(0, "sha256sum /tmp/blob").split()[0]
        rate = _SIZE * 8 / 1e6 / max(_real_seconds(output), 0.01)
        text = f"{_SIZE >> 20} MiB over TCP, {rate:.0f} Mb/s, same SHA-256"
        self._screen.check(text, ok=found == wanted)

    def _show(self, index: int, command: str) -> str:
        guest = self._guests[index]
        self._screen.command(guest.machine.name, command)
        output = guest.run(command).output
        self._screen.output(output)
        return output


def _real_seconds(output: str) -> float:
    """What `time` said: `real 0m 1.25s`."""
    found = re.search(r"real\s+(\d+)m ([\d.]+)s", output)
    return 60 * int(found[1]) + float(found[2]) if found else 0.0


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files and keeps its log to itself."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - inherited
        """Say nothing."""


@contextmanager
def _web_server(folder: Path, address: str) -> Iterator[None]:
    handler = partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer((address, _WEB_PORT), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
