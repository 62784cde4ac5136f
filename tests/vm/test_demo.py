"""The demo as a user starts it; it must leave nothing behind, whenever it ends."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


def start(kind):
    return subprocess.Popen(
        [sys.executable, "-c", f"from vswitch.demo import run; run({kind!r})"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes():
    """Those that a demo started: each has inherited its run directory."""
    mark = f"VSWITCH_RUN_DIR={tempfile.gettempdir()}/vswitch-demo-".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes():
                yield int(entry.name), (entry / "cmdline").read_bytes()
        except OSError:
            continue


def leftovers():
    """What a demo can leave behind: processes, directories, shared memory."""
    directories = Path(tempfile.gettempdir()).glob("vswitch-demo-*")
    segments = Path("/dev/shm").glob("vswitch.*")
    return {*processes(), *directories, *segments}


@pytest.mark.parametrize("kind", ["qemu", "builtin"])
def test_the_demo_passes_its_checks_and_leaves_nothing(kind, guest_image):
    before = leftovers()
    with start(kind) as demo:
        output, _ = demo.communicate(timeout=280)
    assert demo.returncode == 0, output
    assert "0 failed" in output
    assert leftovers() <= before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
@pytest.mark.parametrize(
    "moment", ["vswitch up", "add-port vm1", "booting", "vm1$ ping", "gen2.sock"]
)
def test_interrupted_at_any_moment_it_leaves_nothing(moment, number, guest_image):
    before = leftovers()
    with start("qemu") as demo:
        seen = any(moment in line for line in demo.stdout)
        demo.send_signal(number)
        rest, _ = demo.communicate(timeout=60)
    assert seen
    assert demo.returncode == 130, rest
    assert leftovers() <= before
