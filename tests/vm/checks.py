"""What guests do with each other and with the host behind a tap."""

import sys

_MAKE = "dd if=/dev/urandom of=/www/blob bs=1M count=8"
_SERVE = "(pidof httpd || httpd -h /www)"


def digest(guest, path):
    return guest.check(f"sha256sum {path}").split()[0]


def assert_pings(guest, address, count=3, size=56):
    output = guest.check(f"ping -c {count} -i 0.2 -W 5 -s {size} {address}")
    assert f"{count} packets received" in output


def serve_blob(guest):
    """Make 8 MiB and serve them over HTTP."""
    guest.check(f"{_MAKE} && {_SERVE}")


def assert_moves_a_file(source, target):
    """Fetch 8 MiB over TCP and compare what came."""
    serve_blob(source)
    address = source.machine.address.split("/")[0]
    target.check(f"wget -q -O /tmp/blob http://{address}/blob")
    assert digest(target, "/tmp/blob") == digest(source, "/www/blob")


_FETCH = """
import hashlib, sys, urllib.request
with urllib.request.urlopen(sys.argv[1], timeout=30) as answer:
    print(hashlib.file_digest(answer, "sha256").hexdigest())
"""
# Serves one request, then ends; the digest comes first, when it listens.
_OFFER = """
import hashlib, http.server, os
blob = os.urandom(8 << 20)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(blob)))
        self.end_headers()
        self.wfile.write(blob)
with http.server.HTTPServer(("", 8000), Handler) as server:
    print(hashlib.sha256(blob).hexdigest(), flush=True)
    server.handle_request()
"""


def assert_moves_a_file_to_the_host(guest, namespace):
    """Fetch the guest's 8 MiB from the namespace and compare what came."""
    serve_blob(guest)
    address = guest.machine.address.split("/")[0]
    fetched = namespace.run(sys.executable, "-c", _FETCH, f"http://{address}/blob")
    assert fetched.strip() == digest(guest, "/www/blob")


def assert_moves_a_file_from_the_host(guest, namespace, address="10.77.0.254"):
    """Fetch 8 MiB from the namespace in the guest and compare what came."""
    with namespace.start(sys.executable, "-c", _OFFER) as server:
        wanted = server.stdout.readline().strip()
        guest.check(f"wget -q -O /tmp/blob http://{address}:8000/blob")
    assert digest(guest, "/tmp/blob") == wanted
