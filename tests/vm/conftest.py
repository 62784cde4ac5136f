import shutil
import tempfile
from pathlib import Path

import pytest

from bench.namespace import Namespace
from tests import requirements
from tests.vm import testpmd
from tests.vm.lab import Lab
from vswitch.demo import image, qemu


def prepare_image(recipe=image.PLAIN):
    requirements.require_command(qemu.QEMU, "qemu-system-x86")
    if image.cached(recipe) is None:
        requirements.require_command("apt-get", "apt")
    return image.prepare(recipe)


@pytest.fixture(scope="session")
def guest_image():
    """Debian's kernel and busybox; the first time they are downloaded."""
    return prepare_image()


@pytest.fixture(scope="session")
def tools_image():
    """The same with Python, iperf3 and VLANs."""
    return prepare_image(image.TOOLS)


@pytest.fixture
def short_path():
    """A directory with a short name: a socket's path has 107 bytes at most."""
    directory = Path(tempfile.mkdtemp(prefix="vsw-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def lab(short_path, guest_image):
    """A switch for QEMU guests."""
    with Lab(short_path, guest_image) as it:
        yield it


@pytest.fixture
def namespace():
    requirements.require_root()
    with Namespace() as it:
        yield it


@pytest.fixture
def uplink_lab(short_path, guest_image, namespace):
    """A switch in a namespace, where its tap is."""
    with Lab(short_path, guest_image, prefix=namespace.prefix) as it:
        yield it


@pytest.fixture
def dpdk_lab(short_path):
    """A switch for testpmds."""
    requirements.require_command(testpmd.TESTPMD, "dpdk-dev")
    with Lab(short_path) as it:
        yield it
