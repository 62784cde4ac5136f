"""The demo as a user starts it; it must leave nothing behind, whenever it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vswitch.shared import segment_name

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


class Demo:
    """A demo that makes its directory in one of ours, so that its traces are its own."""

    def __init__(self, kind, directory):
        self._directory = directory
        self._segments = set()
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from vswitch.demo import run; run({kind!r})"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(directory)},
        )
        self.said = ""

    def read_until(self, text):
        """Read what it says up to a line with `text`, or to its end."""
        for line in self._process.stdout:
            self.said += line
            for directory in self._directory.glob("vswitch-demo-*"):
                name = segment_name(directory / "run").lstrip("/")
                self._segments.add(Path("/dev/shm", name))
            if text in line:
                return

    def interrupt(self, number):
        self._process.send_signal(number)

    def wait_ended(self, timeout=60):
        """Its exit code, once it has one."""
        rest, _ = self._process.communicate(timeout=timeout)
        self.said += rest
        return self._process.returncode

    def leftovers(self):
        """What it can leave behind: processes, directories, shared memory."""
        assert self._segments
        directories = self._directory.iterdir()
        segments = (path for path in self._segments if path.exists())
        return [*self._processes(), *directories, *segments]

    def _processes(self):
        """Those that it started: each has inherited its run directory."""
        mark = f"VSWITCH_RUN_DIR={self._directory}/vswitch-demo-".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes():
                    yield int(entry.name), (entry / "cmdline").read_bytes()
            except OSError:
                continue

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


@pytest.mark.parametrize("kind", ["qemu", "builtin"])
def test_the_demo_passes_its_checks_and_leaves_nothing(kind, guest_image, short_path):
    with Demo(kind, short_path) as demo:
        demo.read_until("0 failed")
        assert demo.wait_ended() == 0, demo.said
        assert "0 failed" in demo.said
        assert demo.leftovers() == []


@pytest.mark.parametrize(
    ("moment", "number"),  # one handler serves both signals
    [
        ("vswitch up", signal.SIGINT),
        ("add-port vm1", signal.SIGTERM),
        ("booting", signal.SIGINT),
        ("vm1$ ping", signal.SIGTERM),
        ("gen2.sock", signal.SIGINT),
    ],
)
def test_interrupted_at_any_moment_it_leaves_nothing(
    moment, number, guest_image, short_path
):
    with Demo("qemu", short_path) as demo:
        demo.read_until(moment)
        assert moment in demo.said
        demo.interrupt(number)
        assert demo.wait_ended() == 130, demo.said
        assert demo.leftovers() == []
