"""Short runs of the guided fuzzers, the same each time; the long ones are `make soak`."""

import importlib.util
import subprocess
import sys

import pytest

RUNS = {"payloads": 3000, "session": 1000, "config": 1000}


@pytest.mark.parametrize("target", RUNS)
def test_no_bytes_are_too_odd(target):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("needs atheris, which there is for x86-64 up to Python 3.13")
    command = [sys.executable, "-m", "tests.fuzz.guided", target]
    done = subprocess.run(
        [*command, "--runs", str(RUNS[target]), "--seed", "1"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{target}: {RUNS[target]} inputs;" in done.stdout
