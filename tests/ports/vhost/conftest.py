import os

import pytest


def open_fds():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def no_fd_leak():
    """Fails where a test leaves more descriptors open than it found."""
    before = open_fds()
    yield
    assert open_fds() == before
