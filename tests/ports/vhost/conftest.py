import gc
from pathlib import Path

import pytest


def open_fds():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def no_fd_leak():
    """Fails where a test leaves more descriptors open than it found."""
    gc.collect()  # what earlier tests left to it would be counted as ours
    before = open_fds()
    yield
    assert open_fds() == before
