import gc
from pathlib import Path

import pytest


def open_fds():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(scope="module")
def no_garbage():
    """What tests of other modules left would be counted as closed by ours."""
    gc.collect()


@pytest.fixture
def no_fd_leak(no_garbage):
    """Fails where a test leaves more descriptors open than it found."""
    before = open_fds()
    yield
    assert open_fds() == before
