"""Configuration and state files of any bytes."""

import re
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.source import Source
from vswitch.control import config, state
from vswitch.errors import VswitchError

WORDS = (
    *("switch", "port", "fdb", "vm1", "up0", "a b", '"a\\nb"', "'é'", '""', "x" * 65),
    *("workers", "spares", "cpus", "poll", "idle_us", "ageing", "forward_reserved"),
    *("socket_group", "socket_mode", "endpoint", "mode", "queues", "max_addresses"),
    *("config_space", "backend", "mac", "ifname", "vlan"),
)
VALUES = (
    *('"vm1.sock"', '"vm1"', '"tap:up0"', '"eth:eth1"', '"server"', '"client"'),
    *('"52:54:00:12:34:56"', '"53:54:00:12:34:56"', '"auto"', '"busy"', '"nope:x"'),
    *("0", "1", "2", "-1", "4094", "4095", "1e400", "nan", "-inf", "1.5"),
    *("9" * 25, "9" * 5000, "0x" + "f" * 5000, "true", "false", '""', '"\\u0000"'),
    *("[]", "[1, 2]", "[[1]]", '["1"]', "{}", "{a = 1}", "1979-05-27T07:32:00Z"),
    *('"""\n\n"""', "'''\nx'''", "[\n1,\n2\n]", "07:32:00", '"\\U0010ffff"'),
    *("[" * 90 + "]" * 90, "[" * 250 + "]" * 250, "[0x" + "f" * 5000 + "]"),
)
LINES = ("\n", "\r\n", " ", "", "# x\n", "\x00", "\ufeff", "\u2028", "\x85")
EXAMPLE = b"""[switch]
workers = 2
[port.vm1]
endpoint = "vm1.sock"
[[fdb]]
mac = "52:54:00:12:34:56"
ifname = "vm1"
"""
SLOW_S = 5.0


class Files:
    """A target of `guided`: a file's bytes, or a grammar's choices."""

    SEEDS = (b"\0" + EXAMPLE, b"\1" + EXAMPLE, b"\2" + bytes(range(200)))

    def __init__(self):
        self.counts = Counter()
        self._directory = tempfile.TemporaryDirectory(prefix="vsw-fuzz-")
        self._run_dir = Path(self._directory.name)
        self._path = self._run_dir / state.STATE
        self._copy = self._run_dir / "copy"
        self._copy.mkdir()

    def close(self):
        self._directory.cleanup()

    def one(self, data):
        form, rest = data[:1], data[1:]
        if form in {b"\2", b"\3"}:
            rest = composed(Source(rest)).encode()
        if form in {b"\1", b"\3"}:
            rest = b"# vswitch state 1\n" + rest + b"\n# end\n"
        self._path.write_bytes(rest)
        self._try("config", lambda: config.read(self._path))
        self._try("state", lambda: state.read(self._run_dir))
        assert self._path.read_bytes() == rest, "a file that was refused has changed"

    def _try(self, kind, read):
        begin = time.monotonic()
        try:
            found = read()
        except VswitchError as error:
            self.counts[f"{kind}: refused"] += 1
            self._check_refusal(error)
        else:
            self.counts[f"{kind}: read"] += 1
            self._check_found(found)
        assert time.monotonic() - begin < SLOW_S, "took too long"

    def _check_refusal(self, error):
        """One line says which file, and where and why."""
        text = str(error)
        assert str(self._path) in text
        assert "\n" not in text
        assert re.search(r"line \d+|at end of document", text), text

    def _check_found(self, found):
        """What was read is written down and read again the same."""
        (self._copy / state.STATE).write_text(state.format_text(found))
        again = state.read(self._copy)
        assert again == found, (again, found)


def composed(source):
    """Text that is nearly a configuration."""
    parts = []
    while source:
        kind = source.byte() % 8
        word, other = source.pick(WORDS), source.pick(WORDS)
        parts.append(
            {
                0: lambda w, o: f"{w} = {source.pick(VALUES)}\n",
                1: lambda w, o: f"[{w}]\n",
                2: lambda w, o: f"[{w}.{o}]\n",
                3: lambda w, o: f"[[{w}]]\n",
                4: lambda w, o: f"{w}.{o} = {source.pick(VALUES)}\n",
                5: lambda w, o: source.pick(LINES),
                6: lambda w, o: f"[port.{w}]\nendpoint = {source.pick(VALUES)}\n",
                7: lambda w, o: f"[switch]\n{w} = {source.pick(VALUES)}\n",
            }[kind](word, other)
        )
    return "".join(parts)
