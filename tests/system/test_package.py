"""What a user installs: the wheel, in an environment with nothing of ours in it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(300)


def run(*command, **options):
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=250, **options
    ).stdout


def test_the_wheel_in_a_clean_environment_gives_a_working_vswitch(tmp_path):
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("vswitch-*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(tmp_path / "venv/bin/pip", "--quiet", "install", wheel)
    vswitch = tmp_path / "venv/bin/vswitch"
    # Neither the checkout nor its caches are in reach.
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "VSWITCH_RUN_DIR": str(tmp_path / "run"),
    }
    options = {"cwd": tmp_path, "env": environment}
    assert run(vswitch, "--version", **options).startswith("vswitch ")
    assert "--systems" in run(vswitch, "bench", "--help", **options)
    run(vswitch, "up", **options)
    try:
        assert "-netdev vhost-user" in run(vswitch, "add-port", "vm1.sock", **options)
        assert "waiting-for-frontend" in run(vswitch, "show", **options)
    finally:
        run(vswitch, "down", **options)
    assert list((tmp_path / ".cache/vswitch/jit").iterdir())
