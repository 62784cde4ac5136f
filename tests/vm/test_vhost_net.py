"""Taps by vhost-net, in a guest: this machine's kernel need not have it.

The guest sees this machine's files and runs the switch from them. Its processor is QEMU's
interpreter, for which nothing is compiled here, so Numba is off: a frame takes a
hundredth of a second, and seven checks share the guest. It has one processor, or it would
have both of this machine's, and on a loaded one they wait for each other. What the checks
are, and what is wrong when one fails, is in `vhost_net_checks`.
"""

import shlex
import sys
from pathlib import Path

import pytest

from tests.vm.conftest import prepare_image
from tests.vm.vhost_net_checks import BUSYBOX, NAMES
from vswitch.demo.image import Recipe
from vswitch.demo.qemu import Machine, QemuGuest

pytestmark = pytest.mark.timeout(480)  # of which a quiet machine takes 90 s

REPOSITORY = Path(__file__).parent.parent.parent
ENVIRONMENT = {
    "NUMBA_DISABLE_JIT": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TMPDIR": "/run",
    "VSWITCH_CACHE_DIR": "/run/cache",
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
}
# Debian's kernel for clouds has no 9p.
RECIPE = Recipe(
    kernel="linux-image-amd64",
    packages=(),
    files=(),
    modules=("virtio_pci", "9pnet_virtio", "9p", "tun", "vhost_net"),
    set_up=f"""\
mkdir /host
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000 host /host
for folder in proc sys dev; do mount -o bind /$folder /host/$folder; done
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /host/run
cp /bin/busybox /host{BUSYBOX}
""",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each check said, by its name."""
    machine = Machine("host", None, memory_mib=1024, host_files=True)
    image = prepare_image(RECIPE)
    with QemuGuest(image, machine, tmp_path_factory.mktemp("vhost-net")) as guest:
        guest.wait_ready()
        said = guest.check(in_host("-m", "tests.vm.vhost_net_checks"), timeout=400)
    lines = [line.partition(" ") for line in said.splitlines()]
    return {name: outcome for name, _, outcome in lines}


def in_host(*arguments):
    """A line of shell that runs our Python in the files of this machine."""
    variables = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
    command = ["env", *variables, sys.executable, *arguments]
    inside = f"cd {shlex.quote(str(REPOSITORY))} && {shlex.join(command)}"
    return f"chroot /host /bin/sh -c {shlex.quote(inside)}"


@pytest.mark.parametrize("name", NAMES)
def test_taps_by_vhost_net(outcomes, name):
    assert outcomes.get(name) == "ok", outcomes
