"""A switch, guests and testpmds of one test; whatever is started here ends with it."""

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import msgpack

from tests.vm.testpmd import Testpmd
from vswitch.demo.qemu import Machine, QemuGuest

START_S = 90.0  # the first start compiles


class Lab:
    """A running switch and what is plugged into it.

    `prefix` before a command puts the switch in a namespace.
    """

    def __init__(self, directory, image=None, prefix=()):
        self.directory = directory
        self._image = image
        self._prefix = prefix
        self._owned = ExitStack()
        self._run_dir = directory / "run"
        self._log = directory / "manager.log"

    def __enter__(self):
        self._owned.enter_context(self._manager())
        return self

    def __exit__(self, *_):
        self._owned.close()

    def socket(self, name):
        return self.directory / f"{name}.sock"

    def ask(self, command, **arguments):
        """Send the manager one request and return its result."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(30)
            control.connect(str(self._run_dir / "control.sock"))
            control.sendall(msgpack.packb({"command": command, **arguments}))
            unpacker = msgpack.Unpacker()
            while data := control.recv(1 << 16):
                unpacker.feed(data)
                for answer in unpacker:
                    assert "error" not in answer, answer
                    if "ok" in answer:
                        return answer["ok"]
        raise AssertionError(f"no answer to {command}")

    def add_port(self, name, endpoint=None, mode="server"):
        optional = dict.fromkeys(("max_addresses", "queues", "mtu"))
        endpoint = endpoint or f"vhost:{self.socket(name)}"
        self.ask("add_port", endpoint=endpoint, name=name, mode=mode, **optional)

    def port(self, name):
        """What `show` says of a port."""
        return next(p for p in self.ask("show")["ports"] if p["name"] == name)

    def counters(self, name):
        return self.ask("stats")["ports"][name]

    def wait_for_port(self, name, condition, timeout=20.0):
        """Ask for a port until `condition` holds for what `show` says of it."""
        deadline = time.monotonic() + timeout
        while not condition(port := self.port(name)):
            assert time.monotonic() < deadline, f"{name} is still {port}"
        return port

    def wait_for_state(self, name, state):
        return self.wait_for_port(name, lambda port: port["state"] == state)

    def wait_for_log(self, text, timeout=10.0):
        deadline = time.monotonic() + timeout
        while text not in (log := self._log.read_text()):
            assert time.monotonic() < deadline, f"{text!r} is not in {log}"

    def boot(self, *machines):
        """Start guests, all at once; a port is added for each that has none yet."""
        known = [port["name"] for port in self.ask("show")["ports"]]
        guests = []
        for machine in machines:
            if machine.name not in known:
                self.add_port(
                    machine.name, mode="client" if machine.server else "server"
                )
            guest = QemuGuest(self._image, machine, self.directory)
            guests.append(self._owned.enter_context(guest))
        for guest in guests:
            guest.wait_ready()
        return guests

    def machine(self, number, **options):
        """Guest number 1, 2 ...: vm1 with 10.77.0.1 and so on."""
        name = f"vm{number}"
        return Machine(
            name=name,
            socket_path=self.socket(name),
            mac=f"52:54:00:00:00:{number:02x}",
            address=f"10.77.0.{number}/24",
            **options,
        )

    def testpmd(self, name, *options, **arguments):
        pmd = Testpmd(self.socket(name), *options, **arguments)
        return self._owned.enter_context(pmd)

    def assert_ledger_balances(self):
        """Each received frame is forwarded, flooded or dropped under one name."""
        for name, port in self.ask("stats")["ports"].items():
            dropped = sum(n for key, n in port.items() if key.startswith("rx_drop_"))
            accounted = port["rx_forwarded"] + port["rx_flooded"] + dropped
            assert port["rx_frames"] == accounted, (name, port)

    @contextmanager
    def _manager(self):
        read_end, write_end = os.pipe()
        command = [
            *(*self._prefix, sys.executable, "-m", "vswitch.manager"),
            *("--run-dir", str(self._run_dir), "--status-fd", str(write_end)),
            *("--workers", "1", "--spares", "1", "--poll", "adaptive"),
        ]
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                command, pass_fds=(write_end,), stdout=log, stderr=log
            )
        os.close(write_end)
        try:
            self._await_ready(read_end)
            yield
        finally:
            process.terminate()
            process.wait(timeout=20)

    def _await_ready(self, status):
        with os.fdopen(status, "rb", buffering=0) as stream:
            unpacker = msgpack.Unpacker()
            while data := stream.read(4096):
                unpacker.feed(data)
                for event in unpacker:
                    if "ready" in event:
                        return
                    assert "error" not in event, event
        raise AssertionError(self._log.read_text())
