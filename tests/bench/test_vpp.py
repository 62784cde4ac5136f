"""What VPP is told, and what is made of what it says, with a stand-in for its `vppctl`."""

from pathlib import Path

import pytest

from bench import vpp
from bench.daemon import DaemonError
from bench.vpp import Vpp

INTERFACES = """\
Name               Idx    State  MTU (L3/IP4/IP6/MPLS)     Counter          Count
VirtualEthernet0/0/0    1      up          9000/0/0/0     rx packets        700
                                                          rx bytes        44800
VirtualEthernet0/0/1    2      up          9000/0/0/0     rx packets         32
                                                          tx packets        700
                                                          drops              24
"""
# A node of the main thread; one that had frames, and one that also looked in vain.
RUNTIME = """\
Thread 0 vpp_main (lcore 0)
             Name       State   Calls   Vectors  Suspends  Packet-Clocks  Vectors/Call
unix-cli-process-0   "running"      8        9        16         1.57e8          1.12
---------------
Thread 1 vpp_wk_0 (lcore 1)
             Name       State   Calls   Vectors  Suspends  Packet-Clocks  Vectors/Call
l2-fwd                 active      20      700         0          3.89e1         35.00
vhost-user-input      polling  290657      700         0          1.20e2           .01
"""
ANSWERS = {
    "create vhost-user socket /p0 server packed": "VirtualEthernet0/0/0",
    "create vhost-user socket /p1 server packed": "unknown input `packed'",
    "set interface l2 bridge VirtualEthernet0/0/0 1": "",
    "set interface state VirtualEthernet0/0/0 up": "",
    "show interface": INTERFACES,
    "show runtime": RUNTIME,
    "show version": "vpp v26.06-release built by somebody",
}


@pytest.fixture
def asked(tmp_path):
    """A VPP that is not there; what its `vppctl` was asked is in a file."""
    answers = tmp_path / "answers"
    answers.mkdir()
    for command, answer in ANSWERS.items():
        (answers / command.replace("/", "_")).write_text(answer)
    control = tmp_path / "vppctl"
    control.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "-s {tmp_path}/cli.sock" ] || exit 1\nshift 2\n'
        f'echo "$*" >> {tmp_path}/asked\n'
        f'exec cat "{answers}/$(echo "$*" | tr / _)"\n'
    )
    control.chmod(0o755)
    return Vpp(tmp_path, str(tmp_path / "vpp"), 0), tmp_path / "asked"


def test_a_port_listens_in_the_bridge_and_is_up(asked):
    it, log = asked
    it.add_port(Path("/p0"))
    assert log.read_text().splitlines() == [
        "create vhost-user socket /p0 server packed",
        "set interface l2 bridge VirtualEthernet0/0/0 1",
        "set interface state VirtualEthernet0/0/0 up",
    ]


def test_what_vpp_does_not_understand_is_an_error(asked):
    it, _ = asked
    with pytest.raises(DaemonError, match="no port of VPP at /p1: unknown input"):
        it.add_port(Path("/p1"))
    with pytest.raises(DaemonError, match="vppctl show version failed: vpp v26"):
        it.tell("show version")
    with pytest.raises(DaemonError, match="vppctl clear runtime failed"):
        it.forget_cycles()


def test_counters_are_those_of_all_ports(asked):
    it, _ = asked
    assert it.counters() == {"rx packets": 732, "tx packets": 700, "drops": 24}


def test_cycles_are_those_of_the_worker(asked):
    it, _ = asked
    assert it.cycles() == 700 * 38.9 + 700 * 120
    assert it.version() == "vpp v26.06-release"


def test_vpp_is_missing_where_its_commands_are(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert vpp.missing().startswith("vpp is not installed (")
    (tmp_path / "vpp").touch(0o755)
    assert vpp.missing(str(tmp_path / "vpp")).startswith(f"{tmp_path}/vppctl is not")
