"""A machine that does not let us have taps, and what we say of it."""

import subprocess
import sys

import pytest

from tests import requirements
from tests.forbid import ROOT

ATTACH = """
import sys
from ports import tap_device
from ports.errors import PortError
try:
    tap_device.attach("none0", 1)
except PortError as error:
    print(error)
"""
RIGHTS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-net_admin")


def told(prepare, rights=()):
    """What attaching says after some commands in a /dev/net of our own."""
    requirements.require_root()
    script = f'mount -t tmpfs none /dev/net && {prepare} && exec "$@"'
    command = (*rights, sys.executable, "-c", ATTACH)
    ran = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", script, "sh", *command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    return ran.stdout.strip()


@pytest.mark.parametrize(
    ("prepare", "found"),
    [
        ("true", "ENOENT: there is no /dev/net/tun (modprobe tun)"),
        (
            "mknod /dev/net/tun c 10 254",
            "ENODEV: there is no driver behind /dev/net/tun (modprobe tun)",
        ),
        ("mknod /dev/net/tun c 1 3", "ENOTTY: Inappropriate ioctl for device"),
        (
            "mknod --mode=000 /dev/net/tun c 10 200",
            "EACCES: we may not open /dev/net/tun (run as root)",
        ),
        (
            "mknod --mode=666 /dev/net/tun c 10 200",
            "EPERM: we have no CAP_NET_ADMIN (run as root, or grant the capability)",
        ),
    ],
)
def test_what_is_missing_is_named(prepare, found):
    assert told(prepare, RIGHTS) == f"cannot make tap none0: {found}"
