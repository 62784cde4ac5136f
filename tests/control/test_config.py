from pathlib import Path

import pytest

from vswitch.control.config import parse, read
from vswitch.errors import ConfigError, VswitchError
from vswitch.options import parse_options, under

PATH = Path("/etc/vswitch/lab.toml")

GOOD = """
[switch]
workers = 2
cpus = [0, 1]
poll = "busy"
forward_reserved = false

[port.vm1]
endpoint = "vm1.sock"
mode = "client"
queues = 2

[port.up0]
endpoint = "tap:up0"
max_addresses = 100
backend = "plain"

[[fdb]]
mac = "52:54:00:12:34:56"
ifname = "vm1"
"""

MANY_LINES = """
[switch]
cpus = [
    1,
    "two",
]
"""


def test_a_file_gives_options_and_ports_with_paths_beside_it():
    config = parse(GOOD, PATH)
    assert config.switch == {
        "workers": 2,
        "cpus": [0, 1],
        "poll": "busy",
        "forward_reserved": False,
    }
    assert config.ports == [
        {
            "name": "vm1",
            "endpoint": "vhost:/etc/vswitch/vm1.sock",
            "mode": "client",
            "queues": 2,
        },
        {
            "name": "up0",
            "endpoint": "tap:up0",
            "max_addresses": 100,
            "backend": "plain",
        },
    ]
    assert config.fdb == [{"mac": "52:54:00:12:34:56", "ifname": "vm1"}]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[switch]\nworkers 1", "line 2"),
        ("[switches]", r"line 1: 'switches' is unknown \(known: switch, port, fdb\)"),
        ("switch = 1", "line 1: switch is 1, not a table"),
        ("[switch]\nworker = 1", r"line 2: \[switch\] 'worker' is unknown"),
        ("[switch]\nworkers = '1'", r"line 2: .* workers is '1', not a whole number"),
        ("[switch]\nworkers = true", r"line 2: .* workers is True, not a whole number"),
        ("[switch]\ncpus = 1", r"line 2: .* cpus is 1, not a list"),
        (
            "[switch]\ncpus = ['1']",
            r"line 2: .* cpus is \['1'\], not a list of whole n",
        ),
        (
            "[switch]\ncpus = []",
            r"line 2: .* cpus is \[\], not a list of whole numbers",
        ),
        (MANY_LINES, r"line 3: .* cpus is \[1, 'two'\], not a list of whole numbers"),
        ("[switch]\npoll = 'lazy'", r"poll 'lazy' is unknown \(known: adaptive, busy"),
        ("[switch]\nageing = 0", r"line 2: .* ageing is 0, not within 1 to 1000000"),
        (f"[switch]\nageing = {10**30}", "line 2: .* ageing is 1000.*, not within 1"),
        (
            "[switch]\nidle_us = -1",
            r"line 2: .* idle_us is -1, not within 0 to 1000000",
        ),
        ("[port]\nvm1 = 1", r"line 2: \[port.vm1\] is not a table"),
        ("[port.vm1]", r"line 1: \[port.vm1\] has no endpoint"),
        ("[port.vm1]\nendpoint = 'tapp:x'", r"line 2: .*'tapp' is unknown"),
        ('[port.vm1]\nendpoint = "a\\u0000"', "line 2: .* cannot be printed"),
        (
            "[port.vm1]\nendpoint='a'\nmode='x'",
            r"line 3: .*'x' is unknown \(known: server",
        ),
        (
            "[port.a]\nendpoint='tap:a'\nbackend='fast'",
            r"line 3: \[port.a\] backend 'fast' is unknown \(known: auto, .*plain\)",
        ),
        ("[port.'a b']\nendpoint='a'", r"line 1: \[port.a b\] cannot use port name"),
        (
            '[port."a\\nb"]\nendpoint="a"',
            r"line 1: \[port.'a\\nb'\] cannot use port name",
        ),
        (
            f"{GOOD}vlan = '1'",
            r"line 21: \[\[fdb\]\] number 1 vlan is '1', not a whole",
        ),
        (f"{GOOD}vlan = 5000", r"line 21: .*cannot use VLAN 5000"),
        (f"{GOOD}[[fdb]]\nifname = 'up0'", r"line 21: .* number 2 has no mac"),
        (GOOD.replace('"52:', '"53:'), r"line 19: .* number 1 cannot use address 53:"),
        (
            GOOD.replace('= "vm1"', '= "vm2"'),
            "line 20: .* ifname 'vm2' is no port here",
        ),
        (
            "port.vm1.endpoint = 'a'\nport.vm1.queues = 'a'",
            r"line 2: \[port.vm1\] queues",
        ),
        ("[switch]\r\nworkers = 1\r\nspares = ''\r\n", "line 3: .* spares is ''"),
        ("b = 1\na = " + "[" * 5000 + "]" * 5000, "line 2: brackets are nested too"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_place(text, found):
    with pytest.raises(ConfigError, match=rf"{PATH}: .*{found}") as refused:
        parse(text, PATH)
    assert "\n" not in str(refused.value)


# 5000 hexadecimal digits are a number to the parser, and none that can be printed.
@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"[switch]\nworkers = 1{'0' * 5000}", "line 2: a number has too many digits"),
        (f"[switch]\nworkers = 0x1{'0' * 5000}", "line 2: .* more than 64 bits"),
        (f"[switch]\nageing = 0x1{'0' * 5000}", "line 2: .* ageing is a number of too"),
        (f"[switch]\npoll = 0x1{'0' * 5000}", "line 2: .* poll is a number of too"),
        (f"[switch]\ncpus = [0x1{'0' * 5000}]", "line 2: .* cpus is a number of too"),
        (f"{GOOD}vlan = 0x1{'0' * 5000}", "line 21: .* vlan has more than 64 bits"),
    ],
)
def test_a_number_that_cannot_be_printed_is_refused_with_its_place(text, found):
    with pytest.raises(ConfigError, match=rf"{PATH}: {found}"):
        parse(text, PATH)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(VswitchError, match=r"missing\.toml.*No such file"):
        read(tmp_path / "missing.toml")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(
        VswitchError, match=r"cannot read .*binary\.toml: line 1: byte 0xff is no UTF-8"
    ):
        read(path)


def test_the_command_line_comes_before_the_file_and_the_file_before_defaults(tmp_path):
    path = tmp_path / "lab.toml"
    path.write_text("[switch]\nworkers = 3\nspares = 2\nageing = 60\n")
    options = parse_options(["--run-dir=/r", f"--config={path}", "--workers=2"])
    assert (options.workers, options.spares, options.ageing) == (2, 2, 60)
    assert options.poll == "adaptive"
    assert options.forward_reserved is True


def test_what_was_before_comes_after_what_is_said_now_and_before_defaults(tmp_path):
    path = tmp_path / "lab.toml"
    path.write_text("[switch]\nworkers = 3\nspares = 2\n")
    options = parse_options(["--run-dir=/r", f"--config={path}", "--workers=2"])
    before = {"workers": 4, "spares": 4, "ageing": 60, "forward_reserved": False}
    now = under(options, before)
    assert (now.workers, now.spares, now.ageing, now.idle_us) == (2, 2, 60, 100)
    assert now.forward_reserved is False
    said = {"workers": 2, "spares": 2, "ageing": 60, "forward_reserved": False}
    assert now.said == said


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ("--cpus=a", r"'a' is no list of CPUs \(write it as 1,2\)"),
        ("--workers=many", "invalid int value: 'many'"),
        ("--poll=lazy", "invalid choice: 'lazy'"),
        (f"--ageing={10**19}", "ageing is 1000.*, not within 1 to 1000000"),
        ("--ageing=-1", "ageing is -1, not within 1 to 1000000"),
        (f"--idle-us={10**19}", "idle_us is 1000.*, not within 0 to 1000000"),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
    ],
)
def test_options_that_make_no_sense_are_told_in_one_line(argument, found):
    with pytest.raises(ConfigError, match=f"cannot start: .*{found}"):
        parse_options(["--run-dir=/r", argument])
