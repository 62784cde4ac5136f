"""What guests do with each other."""

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
