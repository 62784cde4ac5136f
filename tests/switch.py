"""A real switch for a test: its manager and workers, asked over the control socket."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgpack

from vswitch import orphans, privileges, shared

DEFAULTS = ("--workers", "1", "--spares", "1", "--poll", "adaptive")


class RefusedError(AssertionError):
    """The manager said no."""


class NoAnswerError(AssertionError):
    """The manager hung up."""


class Switch:
    """A running switch; it and all that it made end with the `with`.

    `options` are the manager's, over DEFAULTS. `prefix` before a command puts the switch
    in a namespace.
    """

    def __init__(self, directory, *options, prefix=()):
        self.directory = directory
        self.run_dir = directory / "run"
        self._command = [
            *(*prefix, sys.executable, "-m", "vswitch.manager"),
            *("--run-dir", str(self.run_dir), *DEFAULTS, *map(str, options)),
        ]
        self._log = directory / "manager.log"
        self._process = None
        self._status = None

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    # --- life ---

    def start(self):
        self.spawn()
        self.wait_ready()

    def spawn(self):
        """Start the manager without waiting for it."""
        read_end, write_end = os.pipe()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, "--status-fd", str(write_end)],
                pass_fds=(write_end,),
                stdout=log,
                stderr=log,
                env=privileges.environment(),
            )
        os.close(write_end)
        if self._status:
            self._status.close()
        self._status = os.fdopen(read_end, "rb", buffering=0)

    def wait_ready(self):
        """Return when frames can flow. The first start compiles."""
        with self._status as stream:
            unpacker = msgpack.Unpacker()
            while data := stream.read(4096):
                unpacker.feed(data)
                for event in unpacker:
                    if "ready" in event:
                        return
                    if "error" in event:
                        raise RefusedError(event["error"]["message"])
        raise AssertionError(self.log)

    def wait_ended(self):
        """The manager's exit code, once it has one."""
        return self._process.wait(timeout=60)

    def end(self, number=signal.SIGTERM):
        self._process.send_signal(number)
        return self.wait_ended()

    def kill(self):
        """End the manager without warning; its workers and its keeper go on."""
        self._process.kill()

    def kill_with_keeper(self):
        """End all that a kill can end; the workers see it and end as well."""
        keeper = self.keeper_pid()
        os.kill(self.pid, signal.SIGSTOP)  # or it would start another
        for pid in (keeper, self.pid):
            os.kill(pid, signal.SIGKILL)
        self.wait_ended()

    def keeper_pid(self):
        """The keeper's, or 0."""
        arguments = [b"vswitch.keeper", os.fsencode(self.run_dir)]
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended
                words = path.read_bytes().split(b"\0")
                if words[2:3] + words[4:5] == arguments:
                    return int(path.parent.name)
        return 0

    def close(self):
        """End it however it goes, and remove what a killed one leaves."""
        if self._status:
            self._status.close()
        if self._process and self._process.poll() is None:
            self._process.terminate()
            try:
                self.wait_ended()
            except subprocess.TimeoutExpired:
                self._process.kill()
                self.wait_ended()
        orphans.end(self.run_dir)

    # --- questions ---

    @property
    def pid(self):
        return self._process.pid

    @property
    def log(self):
        return self._log.read_text()

    @property
    def segment(self):
        return Path("/dev/shm") / shared.segment_name(self.run_dir).lstrip("/")

    def socket(self, name):
        return self.directory / f"{name}.sock"

    def connect(self):
        """A connection to the control socket."""
        control = socket.socket(socket.AF_UNIX)
        control.settimeout(30)
        try:
            control.connect(str(self.run_dir / "control.sock"))
        except OSError:
            control.close()
            raise
        return control

    def ask(self, command, **arguments):
        """Send the manager one request and return its result.

        Raises:
            RefusedError: It answered with an error.
            NoAnswerError: It hung up.
        """
        with self.connect() as control:
            control.sendall(msgpack.packb({"command": command, **arguments}))
            unpacker = msgpack.Unpacker()
            while data := control.recv(1 << 16):
                unpacker.feed(data)
                for answer in unpacker:
                    if "error" in answer:
                        raise RefusedError(answer["error"]["message"])
                    return answer["ok"]
        raise NoAnswerError(command)

    def add_port(self, name, endpoint=None, mode="server", **options):
        known = dict.fromkeys(("max_addresses", "queues", "mtu"))
        endpoint = endpoint or f"vhost:{self.socket(name)}"
        arguments = {"endpoint": endpoint, "name": name, "mode": mode}
        return self.ask("add_port", **known | arguments | options)

    def port(self, name):
        """What `show` says of a port."""
        return next(p for p in self.ask("show")["ports"] if p["name"] == name)

    def counters(self, name):
        return self.ask("stats")["ports"][name]

    def workers(self, role=None):
        """What `show` says of the workers that are ready, of one role or of both."""
        workers = [w for w in self.ask("show")["workers"] if w["state"] != "starting"]
        return [w for w in workers if role in {None, w["role"]}]

    def worker_pids(self):
        return [worker["pid"] for worker in self.workers()]

    # --- waiting ---

    def wait_for(self, condition, what, timeout=60.0):
        """Return what `condition` returns as soon as that is true."""
        return wait_for(condition, what, timeout)

    def wait_for_port(self, name, condition, timeout=60.0):
        """Ask for a port until `condition` holds for what `show` says of it."""
        deadline = time.monotonic() + timeout
        while not condition(port := self.port(name)):
            assert time.monotonic() < deadline, f"{name} is still {port}: {self.log}"
        return port

    def wait_for_state(self, name, state):
        return self.wait_for_port(name, lambda port: port["state"] == state)

    def wait_for_log(self, text, timeout=60.0):
        self.wait_for(lambda: text in self.log, f"{text!r} in {self._log}", timeout)

    def wait_for_workers(self, active, spares):
        """Wait until as many of each role are ready."""
        self.wait_for(
            lambda: (
                (len(self.workers("active")), len(self.workers("spare")))
                == (active, spares)
            ),
            lambda: f"{active} active workers and {spares} spares: {self.log}",
        )

    # --- the ledger ---

    def assert_ledger_balances(self):
        """Each received frame is forwarded, flooded or dropped under one name."""

        # Frames are seen before they are counted, so a moment may pass.
        def unbalanced():
            return {
                name: port
                for name, port in self.ask("stats")["ports"].items()
                if port["rx_frames"]
                != port["rx_forwarded"] + port["rx_flooded"] + dropped(port, "rx")
            }

        self.wait_for(lambda: not unbalanced(), unbalanced)

    def assert_copies_balance(self, sender, receiver, sent, received):
        """All that one port sent to one other arrived there or was counted."""

        def seen():
            rx, tx = self.counters(sender), self.counters(receiver)
            return {
                "sent": (sent, rx["rx_frames"]),
                "received": (received, tx["tx_frames"]),
                "accounted": (
                    sent,
                    received + dropped(rx, "rx") + dropped(tx, "tx"),
                ),
            }

        self.wait_for(lambda: all(a == b for a, b in seen().values()), seen)


def dropped(counters, direction):
    """Frames of a port that were dropped, "rx" or "tx"."""
    prefix = f"{direction}_drop_"
    return sum(n for name, n in counters.items() if name.startswith(prefix))


def wait_for(condition, what, timeout=60.0):
    """Return what `condition` returns as soon as that is true.

    `what` is being waited for: a text, or a function that tells how things stand.
    """
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        if time.monotonic() > deadline:
            text = what() if callable(what) else what
            raise AssertionError(f"waited {timeout} s in vain for: {text}")
        time.sleep(0.002)
    return result


def short_directory():
    """A directory with a short name: a socket's path has 107 bytes at most."""
    return Path(tempfile.mkdtemp(prefix="vsw-"))


def remove_directory(directory):
    shutil.rmtree(directory, ignore_errors=True)
