"""The command as users type it: what it prints, its exit codes, and its JSON."""

import json
import signal
from pathlib import Path

import pytest

from tests.system.shell import FAILED, NO_MANAGER, Shell
from vswitch.guest import Guest

USAGE, INTERRUPTED = 2, 130

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    """A running switch, shared by tests that leave it as it was."""
    shell = Shell(tmp_path_factory.mktemp("cli"))
    shell.ok("up")
    yield shell
    shell.ok("down")


def test_up_says_what_runs_and_down_leaves_nothing_but_the_log(shell):
    said = shell.ok("up", "--spares", "2", "--poll", "busy")
    assert "1 worker on cpu" in said
    assert "2 spares, busy polling" in said
    roles = [worker["role"] for worker in shell.json("show")["workers"]]
    assert roles.count("active") == 1
    shell.ok("add-port", "vm1.sock")
    assert (shell.directory / "vm1.sock").exists()
    assert shell.ok("down") == "down\n"
    assert [path.name for path in shell.run_dir.iterdir()] == ["log"]
    assert not (shell.directory / "vm1.sock").exists()


def test_without_a_manager_every_command_says_so_with_code_3(shell):
    for command in (
        ["show"],
        ["stats"],
        ["fdb", "show"],
        ["add-port", "vm1.sock"],
        ["del-port", "vm1"],
        ["down"],
    ):
        code, said = shell.error(*command)
        assert code == NO_MANAGER
        assert "vswitch up" in said


def test_usage_errors_end_with_code_2(shell):
    for command in (
        ["frobnicate"],
        ["up", "--poll", "lazy"],
        ["up", "--cpus", "one"],
        ["up", "--workers", "0"],
        ["up", "--cpus", "4095"],
        ["up", "--ageing", str(10**19)],
        ["up", "--idle-us", "-1"],
        ["up", "--socket-mode", "rw"],
        ["add-port"],
        ["add-port", "tapp:up0"],
        ["add-port", "vm1.sock", "--name", "a b"],
        ["add-port", "tap:up0", "--backend", "fast"],
    ):
        code, _, err = shell.run(*command)
        assert code == USAGE, (command, err)
    assert not (shell.run_dir / "pid").exists()


def test_a_second_up_is_refused_with_the_pid_of_the_first(up):
    pid = int((up.run_dir / "pid").read_text())
    code, said = up.error("up")
    assert code == FAILED
    assert f"pid {pid}" in said
    assert up.json("show")["workers"]


def test_add_port_prints_arguments_that_lead_to_its_socket(up):
    said = up.ok("add-port", "vm1.sock")
    assert said.startswith("port vm1: added\n")
    for part in (
        "-object memory-backend-memfd,id=mem,size=1G,share=on",
        "-machine memory-backend=mem",
        f"-chardev socket,id=chr-vm1,path={up.directory}/vm1.sock,reconnect=1",
        "-netdev vhost-user,id=net-vm1,chardev=chr-vm1",
        "-device virtio-net-pci,netdev=net-vm1,mac=52:54:00:",
    ):
        assert part in said
    assert up.ok("add-port", "vm1.sock").startswith("port vm1: unchanged\n")
    again = up.json("add-port", "vm1.sock")
    assert (again["changed"], again["mode"]) == (False, "server")
    assert "<interface type='vhostuser'>" in up.ok("add-port", "vm1.sock", "--libvirt")
    code, said = up.error("add-port", "other.sock", "--name", "vm1")
    assert code == FAILED
    assert "--name" in said
    assert up.ok("del-port", "vm1") == "port vm1: removed\n"
    code, said = up.error("del-port", "vm1")
    assert (code, "no port vm1" in said) == (FAILED, True)


def test_a_guest_is_seen_in_every_listing(up):
    up.ok("add-port", "vm2.sock")
    with Guest.connect(up.directory / "vm2.sock") as guest:
        guest.send_all(b"\xff" * 6 + guest.mac + b"\x88\xb5" + bytes(46))
        guest.wait_sent()
        (port,) = up.json("show")["ports"]
        assert (port["name"], port["state"]) == ("vm2", "up")
        assert {"kind", "endpoint", "reason", "since", "features", "queues"} <= set(
            port
        )
        assert "vhost-user  up" in up.ok("show")
        (entry,) = up.json("fdb", "show")
        assert entry == {
            "mac": guest.mac_text,
            "ifname": "vm2",
            "vlan": 0,
            "state": "learned",
            "age_s": entry["age_s"],
        }
        counters = up.json("stats")["ports"]["vm2"]
        assert (counters["rx_frames"], counters["rx_flooded"]) == (1, 1)
        (worker,) = [
            worker
            for worker in up.json("stats")["workers"].values()
            if worker["frames"]
        ]
        assert worker["busy_cycles"] > 0
    assert up.ok("fdb", "add", "52:54:00:00:00:99", "vm2") == ""
    states = {entry["mac"]: entry["state"] for entry in up.json("fdb", "show")}
    assert states["52:54:00:00:00:99"] == "static"
    assert up.ok("fdb", "del", "52:54:00:00:00:99") == ""
    up.ok("del-port", "vm2")
    assert up.json("fdb", "show") == []
    assert up.ok("fdb", "flush") == "0 addresses forgotten\n"


def test_watch_prints_a_line_of_json_a_second_until_ctrl_c(up):
    with up.start("stats", "--watch", "-j") as process:
        first, second = (json.loads(process.stdout.readline()) for _ in range(2))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert set(first) == set(second) == {"ports", "workers"}
    assert process.returncode == INTERRUPTED
    assert err == ""


def test_in_the_foreground_ctrl_c_takes_everything_down(shell):
    with shell.start("up", "--foreground") as process:
        assert any(" up pid=" in line for line in process.stderr)
        assert shell.json("show")["workers"]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert list(shell.run_dir.iterdir()) == []


def test_ctrl_c_while_it_compiles_leaves_no_manager(shell, tmp_path, monkeypatch):
    monkeypatch.setenv("VSWITCH_CACHE_DIR", str(tmp_path / "cold"))
    with shell.start("up") as process:
        assert "compiling" in process.stderr.readline()
        pid = int((shell.run_dir / "pid").read_text())
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert not Path(f"/proc/{pid}").exists()
    assert [path.name for path in shell.run_dir.iterdir()] == ["log"]


def test_a_configuration_file_brings_its_ports(shell):
    config = shell.directory / "lab.toml"
    config.write_text('[switch]\nageing = 60\n[port.web1]\nendpoint = "web1.sock"\n')
    shell.ok("up", "--config", "lab.toml")
    (port,) = shell.json("show")["ports"]
    assert (port["name"], port["state"]) == ("web1", "waiting-for-frontend")
    assert (shell.directory / "web1.sock").exists()


def test_a_port_of_the_file_that_cannot_be_opened_ends_up(shell):
    config = shell.directory / "lab.toml"
    config.write_text('[port.web1]\nendpoint = "missing/web1.sock"\n')
    code, said = shell.error("up", "--config", "lab.toml")
    assert code == FAILED
    assert "port web1: cannot listen on" in said
    assert "mkdir -p" in said
    assert not (shell.run_dir / "pid").exists()


def test_a_run_directory_that_cannot_be_made_is_told(shell):
    (shell.directory / "run").touch()
    code, said = shell.error("up")
    assert code == FAILED
    assert "--run-dir" in said
