"""What a test needs of the machine; each skip says what is missing."""

import os
import re
import shutil
import socket

import pytest

from ports import uring, vhost_net


def require_root():
    if os.geteuid() != 0:
        pytest.skip("needs root, for taps and network namespaces")


def require_command(command, package):
    if shutil.which(command) is None:
        pytest.skip(f"needs {command} (apt-get install {package})")


def require_linux(major, minor, what):
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if (int(found[1]), int(found[2])) < (major, minor):
        pytest.skip(f"needs Linux {major}.{minor}, for {what}")


def require_io_uring():
    """For sockets; `missing` looks at what taps need."""
    with socket.socket() as sock:
        if lack := uring.missing(sock.fileno()):
            pytest.skip(f"needs io_uring: {lack}")


def require_no_vhost_net():
    if not vhost_net.missing():
        pytest.skip("needs a machine without vhost-net, to see what else is chosen")
