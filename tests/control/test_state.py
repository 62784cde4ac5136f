"""What a switch was set to comes back as it was, or is refused and left alone."""

import errno
import os
import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vswitch.control import config, state
from vswitch.control.config import Config
from vswitch.control.endpoint import check_name
from vswitch.control.mac import format_mac
from vswitch.errors import ConfigError, VswitchError

LAB = Config(
    {"workers": 2, "cpus": [0, 1], "forward_reserved": False, "socket_group": "kvm"},
    [
        {"name": "vm1", "endpoint": "vhost:/run/vm1.sock", "mode": "client"},
        {"name": "größe", "endpoint": "tap:up0", "max_addresses": 100},
    ],
    [{"mac": "52:54:00:00:00:01", "ifname": "größe", "vlan": 7}],
)


def is_name(text):
    try:
        check_name(text)
    except ConfigError:
        return False
    return True


numbers = st.integers(0, 1 << 40)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
names = st.text("ab.-_\"'#\\[]=ü→😀", min_size=1, max_size=8).filter(is_name)
paths = st.text("ab.- \"'#\\[]=ü→😀", max_size=8).map(
    lambda text: f"vhost:/run/x{text}"
)
switches = st.fixed_dictionaries(
    {},
    optional={
        "workers": numbers,
        "cpus": st.lists(numbers, min_size=1, max_size=4),
        "poll": st.sampled_from(config.POLLS),
        "ageing": st.integers(1, 1_000_000),
        "forward_reserved": st.booleans(),
        "socket_group": texts,
    },
)
ports = st.fixed_dictionaries(
    {"name": names, "endpoint": paths},
    optional={
        "mode": st.sampled_from(config.MODES),
        "queues": numbers,
        "config_space": st.booleans(),
        "socket_mode": texts,
    },
)


@st.composite
def configs(draw):
    switch = draw(switches)
    wired = draw(st.lists(ports, max_size=4, unique_by=lambda port: port["name"]))
    keys = st.integers(0, (1 << 40) - 1).map(lambda n: (n << 8) | 0x52)
    fdb = [
        {
            "mac": format_mac(key),
            "ifname": port["name"],
            "vlan": draw(st.integers(0, 9)),
        }
        for port in wired
        for key in draw(st.lists(keys, max_size=2))
    ]
    return Config(switch, wired, fdb)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@given(configs())
def test_what_was_written_is_read_again(run_dir, what):
    state.write(run_dir, state.format_text(what))
    assert state.read(run_dir) == what


@given(configs(), st.data())
def test_a_word_that_does_not_belong_is_found_in_its_line(run_dir, what, data):
    lines = state.format_text(what).split("\n")
    headers = [n for n, line in enumerate(lines) if line.startswith("[")]
    assume(headers)
    at = data.draw(st.sampled_from(headers)) + 1
    lines.insert(at, "strange = 1")
    with pytest.raises(ConfigError, match=f"line {at + 1}: .*'strange' is unknown"):
        config.parse("\n".join(lines), run_dir / "state.toml")


def test_nothing_was_set_where_there_is_no_file(tmp_path):
    assert state.read(tmp_path) is None
    state.write(tmp_path, state.format_text(LAB))
    assert [path.name for path in tmp_path.iterdir()] == ["state.toml"]
    state.forget(tmp_path)
    assert state.read(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_the_file_is_a_configuration(tmp_path):
    state.write(tmp_path, state.format_text(LAB))
    assert config.read(tmp_path / "state.toml") == LAB


def refuse(path, content):
    """The error with which a file is refused; the file stays as it is."""
    path.write_bytes(content)
    with pytest.raises(VswitchError) as refused:
        state.read(path.parent)
    assert path.read_bytes() == content
    text = str(refused.value)
    assert text.startswith(f"cannot go on from what was set before: {path}: ")
    assert text.endswith(f" (start without it: mv {path} {path}.refused)")
    assert "\n" not in text
    return text


def test_half_a_file_is_refused_wherever_it_was_cut(tmp_path):
    whole = state.format_text(LAB).encode()
    for end in range(len(whole)):
        refuse(tmp_path / "state.toml", whole[:end])
    half = whole[: whole.index(b"mode")]
    lines = half.count(b"\n") + 1
    said = refuse(tmp_path / "state.toml", half)
    assert f"line {lines} does not end with '# end': this is half a file" in said


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "[switch]\n",
            "line 1 is '[switch]', not '# vswitch state 1': another program",
        ),
        ("\x00" * 100, "line 1 is '\\x00"),
        (
            "# vswitch state 2\n# end\n",
            "line 1 says version 2, we know 1: another vswi",
        ),
        ("# vswitch state 1\n[switch]\nworkers 1\n# end\n", "line 3"),
        (
            "# vswitch state 1\n[switch]\nworkers='1'\n# end\n",
            "line 3: [switch] workers",
        ),
        ("# vswitch state 1\n[disks]\n# end\n", "line 2: 'disks' is unknown"),
        (
            "# vswitch state 1\n[port.a]\nmtu = 1\n# end\n",
            "line 3: [port.a] 'mtu' is unk",
        ),
        (
            "# vswitch state 1\n[[fdb]]\nmac = 1\n# end\n",
            "line 3: [[fdb]] number 1 mac is",
        ),
    ],
)
def test_a_file_that_is_not_ours_is_refused_with_line_and_reason(tmp_path, text, found):
    assert found in refuse(tmp_path / "state.toml", text.encode())


def test_a_file_that_is_no_text_is_refused(tmp_path):
    said = refuse(tmp_path / "state.toml", b"# vswitch state 1\n\xff\n# end\n")
    assert "line 2: byte 0xff is no UTF-8" in said


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "state.toml").mkdir()
    with pytest.raises(VswitchError, match=r"state\.toml: EISDIR"):
        state.read(tmp_path)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch, failing):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = state.format_text(LAB)
    state.write(tmp_path, before)
    after = state.format_text(LAB._replace(ports=[], fdb=[]))
    monkeypatch.setattr(os if failing == "fsync" else Path, failing, fail)
    full = f"cannot write {tmp_path}/state.toml: ENOSPC: the change is made, but"
    with pytest.raises(VswitchError, match=re.escape(full)):
        state.write(tmp_path, after)
    assert (tmp_path / "state.toml").read_text() == before
    monkeypatch.undo()
    state.write(tmp_path, after)
    assert (tmp_path / "state.toml").read_text() == after
