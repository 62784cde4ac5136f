import socket
import threading

import pytest

from tests.guest.backend import EchoBackend
from vswitch.guest import Guest


class Host:
    """Listens where a guest connects; a fresh back-end for each connection."""

    def __init__(self, path):
        self.path, self.backends, self.options = path, [], {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()

    def expect(self):
        """Serve the next connection, from a thread."""
        arrived = threading.Thread(target=self._accept, daemon=True)
        arrived.start()
        return arrived

    def _accept(self):
        sock, _ = self._listener.accept()
        backend = EchoBackend(sock, **self.options)
        self.backends.append(backend)
        backend.start()

    def close(self):
        self._listener.close()
        for backend in self.backends:
            backend.finish()


@pytest.fixture
def host(tmp_path):
    it = Host(tmp_path / "guest.sock")
    yield it
    it.close()


@pytest.fixture
def attach(host):
    """Make guests that are connected to an echoing back-end."""
    guests = []

    def make(**options):
        host.expect()
        guest = Guest.connect(host.path, **options)
        guests.append(guest)
        return guest

    yield make
    for guest in guests:
        guest.close()
