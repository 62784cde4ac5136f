"""What is set comes back after a kill as it was, and is forgotten on purpose only."""

import random
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.switch import NoAnswerError, RefusedError, wait_for
from tests.system.shell import FAILED, NO_MANAGER

MACS = [f"52:54:00:00:00:{number:02x}" for number in range(8)]

pytestmark = pytest.mark.timeout(300)


# --- killed at random moments ---


class Kept(NamedTuple):
    """What a switch should be set to."""

    ports: dict[str, str]  # name: mode
    addresses: dict[tuple[str, int], str]  # (address, VLAN): port

    @classmethod
    def of(cls, switch):
        entries = switch.ask("fdb_show")
        return cls(
            {port["name"]: port["mode"] for port in switch.ask("show")["ports"]},
            {
                (entry["mac"], entry["vlan"]): entry["ifname"]
                for entry in entries
                if entry["state"] == "static"
            },
        )

    def changed(self, dice):
        """A request that is sure to be granted, and what is set after it."""
        choices: list[Callable] = [self._del_port, self._pin, self._pin]
        if self.addresses:
            choices.append(self._forget)
        if len(self.ports) < 8:
            choices += [self._add_port, self._add_port]
        return dice.choice(choices if self.ports else [self._add_port])(dice)

    def _add_port(self, dice):
        name = dice.choice([n for n in "abcdefgh" if n not in self.ports])
        mode = dice.choice(["server", "client"])
        after = Kept(self.ports | {name: mode}, self.addresses)
        return lambda switch: switch.add_port(name, mode=mode), after

    def _del_port(self, dice):
        name = dice.choice(list(self.ports))
        ports = {n: mode for n, mode in self.ports.items() if n != name}
        left = {key: port for key, port in self.addresses.items() if port != name}
        return lambda switch: switch.ask("del_port", name=name), Kept(ports, left)

    def _pin(self, dice):
        name, mac = dice.choice(list(self.ports)), dice.choice(MACS)
        vlan = dice.choice([0, 5])
        after = Kept(self.ports, self.addresses | {(mac, vlan): name})
        arguments = {"mac": mac, "vlan": vlan, "ifname": name}
        return lambda switch: switch.ask("fdb_add", **arguments), after

    def _forget(self, dice):
        mac, vlan = dice.choice(list(self.addresses))
        left = {key: p for key, p in self.addresses.items() if key != (mac, vlan)}
        after = Kept(self.ports, left)
        return lambda switch: switch.ask("fdb_del", mac=mac, vlan=vlan), after


def change_until_killed(switch, dice, kept):
    """What is set by what was answered, and by what was not answered any more."""
    killer = threading.Timer(dice.uniform(0, 0.03), switch.kill)
    undisturbed = dice.randrange(1, 12)
    while True:
        request, after = kept.changed(dice)
        if undisturbed == 0:
            killer.start()
        undisturbed -= 1
        try:
            request(switch)
        except (OSError, NoAnswerError):
            killer.join()
            switch.wait_ended()
            return kept, after
        kept = after


def test_what_was_answered_survives_a_kill_at_any_moment(start):
    dice = random.Random(6)
    switch = start("--spares", 0)
    kept = Kept({}, {})
    for number in range(6):
        before, after = change_until_killed(switch, dice, kept)
        if number % 2:  # and again before it has brought back all
            switch.spawn()
            time.sleep(dice.uniform(0, 1.0))  # at random, so there is nothing to await
            switch.kill()
            switch.wait_ended()
        switch.start()
        kept = Kept.of(switch)
        assert kept in (before, after), f"kill {number}"
        files = {path.stem for path in switch.directory.glob("*.sock")}
        assert files == {n for n, mode in kept.ports.items() if mode == "server"}


# --- what cannot come back ---


def test_a_port_that_cannot_be_opened_is_shown_and_tried_again(start):
    switch = start("--spares", 0)
    place = switch.directory / "guests"
    place.mkdir()
    switch.add_port("a", f"vhost:{place}/a.sock")
    switch.add_port("b")
    switch.add_port("c", f"vhost:{place}/c.sock")
    for mac in MACS[:2]:
        switch.ask("fdb_add", mac=mac, ifname="a")
    shutil.rmtree(place)
    switch.end(signal.SIGKILL)
    switch.start()
    why = f"cannot listen on {place}/a.sock: ENOENT: no directory {place}"
    assert switch.port("a") == {
        "name": "a",
        "kind": "vhost-user",
        "endpoint": f"vhost:{place}/a.sock",
        "mode": "server",
        "state": "down",
        "reason": f"{why} (mkdir -p {place}); it is tried again",
        "since": switch.port("a")["since"],
        "features": [],
        "queues": {"enabled": 0, "max": 0},
        "backend": "",
        "backend_reason": "",
    }
    assert switch.port("b")["state"] == "waiting-for-frontend"
    # What is set may be changed meanwhile.
    with pytest.raises(RefusedError, match=f"port a is down: {why}"):
        switch.ask("fdb_add", mac=MACS[2], ifname="a")
    switch.ask("fdb_del", mac=MACS[0])
    with pytest.raises(RefusedError, match="it is not in the table"):
        switch.ask("fdb_del", mac=MACS[0])
    switch.ask("del_port", name="c")
    place.mkdir()
    switch.wait_for_state("a", "waiting-for-frontend")
    kept = Kept({"a": "server", "b": "server"}, {(MACS[1], 0): "a"})
    switch.wait_for(lambda: Kept.of(switch) == kept, lambda: Kept.of(switch))
    assert [path.name for path in place.iterdir()] == ["a.sock"]
    assert "port.c" not in (switch.run_dir / "state.toml").read_text()


def test_who_adds_a_port_that_is_missing_need_not_wait(start):
    switch = start("--spares", 0)
    place = switch.directory / "guests"
    place.mkdir()
    switch.add_port("a", f"vhost:{place}/a.sock")
    switch.ask("fdb_add", mac=MACS[0], ifname="a")
    shutil.rmtree(place)
    switch.end(signal.SIGKILL)
    switch.start()
    assert switch.add_port("a", f"vhost:{switch.directory}/a.sock")["changed"]
    assert Kept.of(switch) == Kept({"a": "server"}, {(MACS[0], 0): "a"})


# --- in the words of the command line ---


def names(shell):
    return [port["name"] for port in shell.json("show")["ports"]]


def test_down_forgets_and_down_keep_does_not(shell):
    shell.ok("up", "--spares", "0", "--socket-mode", "0600")
    shell.ok("add-port", "vm1.sock", "--queues", "2")
    shell.ok("fdb", "add", MACS[0], "vm1", "--vlan", "7")
    assert shell.ok("down", "--keep") == "down\n"
    assert {path.name for path in shell.run_dir.iterdir()} == {"log", "state.toml"}
    assert not (shell.directory / "vm1.sock").exists()
    code, said = shell.error("down")
    assert code == NO_MANAGER
    state = shell.run_dir / "state.toml"
    assert f"vswitch up goes on from it, rm {state} forgets it" in said
    assert "from the run before: 1 port, 1 pinned address\n" in shell.ok("up")
    (port,) = shell.json("show")["ports"]
    assert (port["name"], port["queues"]["max"]) == ("vm1", 2)
    (entry,) = shell.json("fdb", "show")
    assert (entry["mac"], entry["vlan"], entry["ifname"]) == (MACS[0], 7, "vm1")
    assert [worker["role"] for worker in shell.json("show")["workers"]] == ["active"]
    mode = (shell.directory / "vm1.sock").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    shell.ok("down")
    assert [path.name for path in shell.run_dir.iterdir()] == ["log"]


def test_what_is_said_now_counts_more_than_a_file_and_that_more_than_before(shell):
    lab = shell.directory / "lab.toml"
    lab.write_text(
        '[switch]\nspares = 0\npoll = "busy"\n[port.web1]\nendpoint = "web1.sock"\n'
    )
    shell.ok("up", "--config", "lab.toml", "--poll", "adaptive")
    shell.ok("add-port", "vm1.sock")
    shell.ok("del-port", "web1")
    shell.ok("down", "--keep")
    said = shell.ok("up")
    assert "0 spares, adaptive polling" in said
    assert names(shell) == ["vm1"]
    shell.kill_manager()
    lab.write_text('[port.web1]\nendpoint = "web1.sock"\n[switch]\npoll = "busy"\n')
    said = shell.ok("up", "--config", "lab.toml", "--spares", "1")
    assert "1 spare, busy polling" in said
    assert names(shell) == ["web1", "vm1"]


def test_a_file_that_was_cut_off_is_refused_and_stays(shell):
    shell.ok("up", "--spares", "0")
    shell.ok("add-port", "vm1.sock")
    shell.kill_manager()
    path = shell.run_dir / "state.toml"
    half = path.read_bytes()[:-20]
    path.write_bytes(half)
    code, said = shell.error("up")
    assert code == FAILED
    assert f"{path}: line " in said
    assert "this is half a file" in said
    assert said.endswith(f"(start without it: mv {path} {path}.refused)\n")
    assert path.read_bytes() == half
    assert shell.error("show")[0] == NO_MANAGER
    path.rename(f"{path}.refused")
    shell.ok("up", "--spares", "0")
    assert names(shell) == []


def test_a_start_that_fails_forgets_nothing(shell):
    guests = shell.directory / "guests"
    guests.mkdir()
    shell.ok("up", "--spares", "0")
    shell.ok("add-port", "guests/vm1.sock")
    shell.kill_manager()
    path = shell.run_dir / "state.toml"
    before = path.read_bytes()
    lab = shell.directory / "lab.toml"
    lab.write_text('[port.web1]\nendpoint = "missing/web1.sock"\n')
    code, said = shell.error("up", "--config", "lab.toml")
    assert (code, "port web1: cannot listen" in said) == (FAILED, True)
    assert path.read_bytes() == before
    with shell.start("up") as process:
        wait_for((shell.run_dir / "pid").exists, "the manager")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert path.read_bytes() == before
    shutil.rmtree(guests)
    code, _, warned = shell.run("up")
    assert code == 0
    assert f"warning: port vm1: cannot listen on {guests}/vm1.sock: ENOENT" in warned
