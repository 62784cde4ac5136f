"""Anything at the control socket of a running manager; a seed repeats it.

Whatever was asked, it is answered or hung up on, and somebody sane is served afterwards.
"""

import contextlib
import random
from collections import Counter

import msgpack

from tests.system.net import open_fds, status_kib

WARM = 200  # requests, until a manager has seen everything
GROWTH_KIB = 4 << 10  # from then on
ANSWERED_S = 20.0
COMMANDS = (
    *("status", "add_port", "del_port", "show", "stats"),
    *("fdb_show", "fdb_add", "fdb_del", "fdb_flush", "nonsense", ""),
)
WORDS = (
    *("endpoint", "name", "mode", "queues", "max_addresses", "config_space", "backend"),
    *("socket_group", "socket_mode", "mac", "vlan", "ifname", "mtu", "keep", "x" * 999),
)
NAMES = ("p0", "p1", "p2", "p 3", "", "é", "p" * 65, "p\0")
PLAIN = (
    *(0, 1, 8, 9, -1, 4094, 4095, 1 << 31, 1 << 63, (1 << 64) - 1, -(1 << 63)),
    *(0.5, float("nan"), float("inf"), True, False, None, b"", b"\xff" * 9),
    *("", "server", "client", "auto", "plain", "0660", "9999", "root", "nobody"),
    *("52:54:00:12:34:56", "00:00:00:00:00:00", "2:2", "x" * 70_000, "\u2028"),
    *(msgpack.ExtType(5, b"x"), msgpack.Timestamp(1), [], {}, [[]], {"a": {"b": 1}}),
)
DEEP = (100, 400, 900, 1000, 1100)


class ControlFuzz:
    """Requests to one switch. Sockets that they make are in its directory."""

    def __init__(self, switch, seed):
        self.counts = Counter()
        self._switch, self._random = switch, random.Random(seed)
        self._menu = {
            "any bytes": self._any_bytes,
            "any value": self._any_value,
            "a command": self._command,
            "a command, mutated": self._mutated,
            "a command cut off": self._cut_off,
            "commands at once": self._at_once,
            "too long": self._too_long,
            "too deep": self._too_deep,
            "a port": self._port,
            "an address": self._address,
        }

    def run(self, requests, going=lambda: True):
        """Ask so often, while `going`; then everything is as it was."""
        before = self._manager_fds()
        tried = sane = 0
        while tried < requests and going():
            if tried == WARM:
                sane = self._settle()
            name = self._random.choice(list(self._menu))
            self.counts[name] += 1
            self._send(self._menu[name]())
            tried += 1
            if tried % 50 == 0:
                self._check_sane()
        self._check_sane()
        for port in self._switch.ask("show")["ports"]:
            self._switch.ask("del_port", name=port["name"])
        self._switch.wait_for(lambda: self._manager_fds() == before, "fds to go")
        assert "Traceback" not in self._switch.log, self._switch.log
        if sane:
            grown = self._settle() - sane
            assert grown < GROWTH_KIB, f"the manager grew by {grown} KiB"

    def _settle(self):
        """The manager's memory once it has seen the largest messages."""
        for _ in range(3):
            self._send(self._too_long())
        return status_kib(self._switch.pid, "RssAnon")

    def _manager_fds(self):
        kinds = Counter(kind for kind, *_ in open_fds(self._switch.pid).values())
        return sum(n for kind, n in kinds.items() if not kind.startswith("socket:"))

    def _check_sane(self):
        assert self._switch.ask("status")["pid"] == self._switch.pid
        assert "ports" in self._switch.ask("show")

    def _send(self, data):
        """Send it, close our half, and read to the end: it has to come."""
        with self._switch.connect() as control:
            control.settimeout(ANSWERED_S)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                control.sendall(data)
                control.shutdown(1)
            unpacker = msgpack.Unpacker(strict_map_key=False)
            with contextlib.suppress(ConnectionResetError):
                while more := control.recv(1 << 16):
                    unpacker.feed(more)
            for answer in unpacker:
                (word,) = answer
                self.counts["answers" if word == "ok" else "refusals"] += 1
                if word == "error":
                    text = answer["error"]["message"]
                    assert text, "an error without words"

    # --- what to send ---

    def _any_bytes(self):
        return self._random.randbytes(self._random.choice((1, 2, 9, 100, 5000)))

    def _any_value(self):
        return msgpack.packb(self._value())

    def _value(self, depth=0):
        choose = self._random
        if depth < 3 and choose.random() < 0.3:
            few = range(choose.randrange(4))
            if choose.random() < 0.5:
                return [self._value(depth + 1) for _ in few]
            return {
                choose.choice((*WORDS, 1, b"b")): self._value(depth + 1) for _ in few
            }
        return choose.choice(PLAIN)

    def _request(self):
        arguments = {
            self._random.choice(WORDS): self._value()
            for _ in range(self._random.randrange(6))
        }
        arguments.pop("endpoint", None)  # so that nothing is made elsewhere
        return {"command": self._random.choice(COMMANDS)} | arguments

    def _command(self):
        return msgpack.packb(self._request())

    def _mutated(self):
        data = bytearray(self._command())
        for _ in range(self._random.randrange(1, 4)):
            data[self._random.randrange(len(data))] = self._random.randrange(256)
        return bytes(data)

    def _cut_off(self):
        data = self._command()
        return data[: self._random.randrange(len(data))]

    def _at_once(self):
        return b"".join(self._command() for _ in range(self._random.randrange(2, 60)))

    def _too_long(self):
        kind = self._random.choice((b"\xc6", b"\xdb", b"\xdd", b"\xdf"))
        length = self._random.choice((1 << 20, 1 << 24, (1 << 32) - 1))
        return kind + length.to_bytes(4, "big") + b"\xc1" * (2 << 20)

    def _too_deep(self):
        """In the place of a command, or of something that belongs to one."""
        depth, brackets = (
            self._random.choice(DEEP),
            self._random.choice((b"\x91", b"\x81\xa0")),
        )
        nest = brackets * depth + b"\xc0"
        word = msgpack.packb(self._random.choice(("command", *WORDS[:13])))
        name = msgpack.packb(self._random.choice(COMMANDS))
        return b"\x82" + msgpack.packb("command") + name + word + nest

    def _port(self):
        name = self._random.choice(NAMES)
        where = self._random.choice(("sock", "d/sock", "a" * 100, "d/../sock", name))
        options = {
            word: self._value()
            for word in self._random.sample(WORDS[2:10], self._random.randrange(3))
        }
        known = {"endpoint": f"vhost:{self._switch.directory}/{where}", "name": name}
        command = self._random.choice(("add_port", "add_port", "del_port"))
        return msgpack.packb({"command": command} | known | options)

    def _address(self):
        return msgpack.packb(
            {
                "command": self._random.choice(("fdb_add", "fdb_del")),
                "mac": self._random.choice(("52:54:00:12:34:56", self._value())),
                "vlan": self._random.choice((0, 5, self._value())),
                "ifname": self._random.choice(NAMES),
            }
        )
