import os
import subprocess
import sys

import pytest

from vswitch.control import rundir
from vswitch.errors import ConfigError, VswitchError

HOLD = """
import sys
from pathlib import Path
from vswitch.control import rundir
with rundir.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_holder(tmp_path):
    """Another process that holds the directory."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_held_directory_is_refused_with_the_holders_pid(tmp_path, other_holder):
    assert rundir.holder(tmp_path) == other_holder.pid
    with (
        pytest.raises(
            VswitchError, match=f"running in {tmp_path}: pid {other_holder.pid}"
        ),
        rundir.hold(tmp_path),
    ):
        pass


def test_a_killed_holder_holds_nothing_any_more(tmp_path, other_holder):
    other_holder.kill()
    other_holder.wait()
    assert (tmp_path / "pid").exists()
    assert rundir.holder(tmp_path) is None
    with rundir.hold(tmp_path):
        assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / "pid").exists()


def test_nobody_holds_a_directory_that_is_not_there(tmp_path):
    assert rundir.holder(tmp_path / "missing") is None


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(VswitchError, match=r"file/run: Not a directory.*--run-dir"):
        rundir.make(tmp_path / "file" / "run")


def test_a_directory_in_which_all_may_write_is_refused(tmp_path):
    tmp_path.chmod(0o1777)
    found = (
        rf"{tmp_path} belongs .*, with mode 1777, we are uid .*--run-dir {tmp_path}/v"
    )
    with pytest.raises(VswitchError, match=found), rundir.hold(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_option_comes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("VSWITCH_RUN_DIR", str(tmp_path / "environment"))
    assert rundir.choose(tmp_path / "option") == tmp_path / "option"
    assert rundir.choose(None) == tmp_path / "environment"


def test_the_usual_directory_depends_on_who_asks(tmp_path, monkeypatch):
    monkeypatch.delenv("VSWITCH_RUN_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert str(rundir.choose(None)) == "/run/vswitch"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert rundir.choose(None) == tmp_path / "vswitch"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(ConfigError, match="XDG_RUNTIME_DIR is not set"):
        rundir.choose(None)
