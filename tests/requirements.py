"""What a test needs of the machine; each skip says what is missing."""

import os
import re
import shutil

import pytest


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
