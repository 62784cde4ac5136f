"""Who may talk to the manager and to guests' sockets, and what others are told."""

import json
import os
import socket
import stat

import pytest

from tests import requirements
from tests.other_user import GROUP, STRANGER, User
from tests.switch import RefusedError, Switch, remove_directory, short_directory

pytestmark = pytest.mark.usefixtures("root")

BY_GROUP = User(54321, GROUP)
BY_OTHER_GROUP = User(54321, 54321, (7, GROUP))
US = "we are uid 54321 (54321)"


@pytest.fixture(scope="module")
def root():
    requirements.require_root()


@pytest.fixture
def place():
    """A directory of ours that others may enter."""
    directory = short_directory()
    directory.chmod(0o755)
    yield directory
    remove_directory(directory)


@pytest.fixture
def opened(switch):
    """The shared switch with its directories as a test wants them."""

    def set_modes(directory=0o711, run_dir=0o750, gid=0, control=0o660):
        switch.directory.chmod(directory)
        os.chown(switch.run_dir, -1, gid)
        switch.run_dir.chmod(run_dir)
        (switch.run_dir / "control.sock").chmod(control)
        return switch

    yield set_modes
    set_modes(directory=0o700)


def refusal(user, switch, *command):
    code, out, err = user.vswitch(switch.run_dir, *command)
    assert (code, out) == (1, "")
    assert err.startswith("vswitch: ")
    assert err.count("\n") == 1
    return err.removeprefix("vswitch: ").removesuffix("\n")


def test_the_run_directory_and_its_socket_are_closed_to_others(switch):
    assert stat.S_IMODE(switch.run_dir.stat().st_mode) == 0o750
    assert stat.S_IMODE((switch.run_dir / "control.sock").stat().st_mode) == 0o660


@pytest.mark.parametrize("command", ["show", "down"])
def test_somebody_else_is_told_whose_the_directory_is_and_what_helps(opened, command):
    switch = opened()
    path = switch.run_dir / {"show": "control.sock", "down": "pid"}[command]
    assert refusal(STRANGER, switch, command) == (
        f"cannot reach {path}: EACCES: {switch.run_dir} belongs to uid 0 (root), gid 0 "
        f"(root), with mode 0750, {US} (sudo vswitch --run-dir {switch.run_dir} COMMAND)"
    )


def test_whom_the_group_would_let_in_is_told_how_to_join(opened):
    switch = opened(gid=GROUP)
    said = refusal(STRANGER, switch, "show")
    assert f"gid {GROUP} ({GROUP}), with mode 0750, {US}" in said
    assert said.endswith(f"(sudo usermod -aG {GROUP} 54321, then log in again)")


def test_the_directory_in_the_way_is_the_one_that_is_named(opened):
    switch = opened(directory=0o700)
    said = refusal(STRANGER, switch, "show")
    assert f"EACCES: {switch.directory} belongs to uid 0 (root)" in said
    assert "with mode 0700" in said


@pytest.mark.parametrize("mode", [0o660, 0o666])
def test_modes_that_were_loosened_by_mistake_let_nobody_in(opened, mode):
    switch = opened(run_dir=0o755, control=mode)
    said = refusal(STRANGER, switch, "show", "-j")
    refused = "the manager refuses to talk to us: " if mode == 0o666 else "cannot reach"
    assert said.startswith(refused)
    assert US in said
    assert said.endswith(f"(sudo vswitch --run-dir {switch.run_dir} COMMAND)")
    assert switch.ask("show")["ports"] == []


def test_who_was_refused_once_is_not_heard_again(opened):
    switch = opened(run_dir=0o755, control=0o666)
    imports = "import socket, msgpack, sys"
    code = """
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.sendall(msgpack.packb({"command": "down"}))
answer = msgpack.unpackb(sock.recv(4096))
print(answer["error"]["code"], sock.recv(1))
"""
    done = STRANGER.run(imports, code, switch.run_dir / "control.sock")
    assert done == (0, "1 b''\n", "")
    assert switch.ask("show")["ports"] == []


@pytest.mark.parametrize("user", [BY_GROUP, BY_OTHER_GROUP], ids=["first", "another"])
def test_members_of_the_directorys_group_may_ask(opened, user):
    switch = opened(gid=GROUP)
    os.chown(switch.run_dir / "control.sock", -1, GROUP)
    code, out, err = user.vswitch(switch.run_dir, "show", "-j")
    assert (code, err) == (0, "")
    assert len(json.loads(out)["workers"]) == 2


def test_a_member_of_the_group_may_take_the_switch_down(place):
    switch = Switch(place, "--spares", 0)
    switch.run_dir.mkdir(mode=0o750)
    os.chown(switch.run_dir, -1, GROUP)  # as an administrator would have made it
    with switch:
        assert (switch.run_dir / "control.sock").stat().st_gid == GROUP
        assert BY_GROUP.vswitch(switch.run_dir, "down") == (0, "down\n", "")
        assert switch.wait_ended() == 0


# --- starting one ---


def test_a_run_directory_of_somebody_else_is_not_used(place):
    run_dir = place / "run"
    run_dir.mkdir(mode=0o755)
    for user, owner, by in ((STRANGER, 0, ""), (User(0, 0), 54321, "-u 54321 ")):
        os.chown(run_dir, owner, -1)
        code, _, err = user.vswitch(run_dir, "up")
        assert code == 1
        assert f"cannot use run directory {run_dir}" in err
        assert f"belongs to uid {owner} (" in err
        assert f"with mode 0755, we are uid {user.uid} (" in err
        assert err.endswith(f"sudo {by}vswitch --run-dir {run_dir} up)\n")
        assert list(run_dir.iterdir()) == []


# --- guests' sockets ---


def owner(path):
    status = path.stat()
    return status.st_gid, stat.S_IMODE(status.st_mode)


def connect(user, path):
    code = "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    return user.run("import socket, sys", code, path)


def test_guests_sockets_are_the_switchs_own_unless_somebody_says_otherwise(switch):
    plain, given = switch.socket("plain"), switch.socket("given")
    switch.add_port("plain")
    assert owner(plain) == (0, 0o660)
    switch.add_port("given", socket_group=str(GROUP), socket_mode="0620")
    assert owner(given) == (GROUP, 0o620)
    switch.directory.chmod(0o711)
    assert connect(BY_GROUP, given)[0] == 0
    for user, path in ((BY_GROUP, plain), (STRANGER, given)):
        assert "PermissionError" in connect(user, path)[2]
    for name in ("plain", "given"):
        switch.ask("del_port", name=name)


def test_a_switch_has_a_group_and_a_mode_for_all_its_sockets(start):
    switch = start("--socket-group", GROUP, "--socket-mode", "666")
    switch.add_port("a")
    switch.add_port("b", socket_mode="0600")
    assert owner(switch.socket("a")) == (GROUP, 0o666)
    assert owner(switch.socket("b")) == (GROUP, 0o600)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (
            {"socket_group": "no-such"},
            "there is none of that name .sudo groupadd no-such",
        ),
        (
            {"socket_mode": "0999"},
            "cannot use socket mode '0999': not three octal digits",
        ),
        (
            {"socket_mode": "4755"},
            "cannot use socket mode '4755': not three octal digits",
        ),
        ({"socket_mode": 384}, "socket_mode is 384, not text"),
        ({"mode": "client", "socket_mode": "0660"}, "we do not listen there"),
        (
            {"endpoint": "tap:t0", "socket_group": "0"},
            "cannot use socket_group with tap:t0",
        ),
    ],
    ids=str,
)
def test_access_that_cannot_be_is_refused(switch, options, found):
    with pytest.raises(RefusedError, match=found):
        switch.add_port("a", **options)
    assert not switch.socket("a").exists()
    assert switch.ask("show")["ports"] == []


def test_a_switch_does_not_start_with_a_group_that_is_not_there(start):
    with pytest.raises(RefusedError, match="cannot use socket group 'no-such'"):
        start("--socket-group", "no-such")


def listen(user, path, gid=-1):
    """What somebody is told who would listen there."""
    imports = """
from pathlib import Path
from ports.errors import PortError
from ports.vhost.sockets import Access, listen
"""
    code = """
try:
    listen(Path(sys.argv[1]), Access(gid=int(sys.argv[2])))
except PortError as error:
    print(error)
"""
    _, out, err = user.run(imports, code, path, gid)
    assert err == ""
    return out.removesuffix("\n")


def test_who_is_no_member_cannot_give_a_socket_to_a_group(place):
    place.chmod(0o777)
    path = place / "vm.sock"
    assert listen(STRANGER, path, GROUP) == (
        f"cannot give {path} to group {GROUP}: EPERM: {US} and no member"
        f" (sudo usermod -aG {GROUP} 54321)"
    )
    assert list(place.iterdir()) == []


def test_where_we_may_not_make_sockets_is_told_and_where_we_could(place):
    path = place / "vm.sock"
    assert listen(STRANGER, path) == (
        f"cannot listen on {path}: EACCES: {place} belongs to uid 0 (root), gid 0 (root)"
        f", with mode 0755, {US} (choose a directory of your own: sudo install -d "
        f"-o 54321 {place}/54321)"
    )


def test_a_stale_socket_that_we_may_not_replace_is_told(place):
    place.chmod(0o1777)
    path = place / "vm.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    path.chmod(0o666)
    assert listen(STRANGER, path) == (
        f"cannot listen on {path}: EPERM: {path} belongs to uid 0 (root), gid 0 (root)"
        f", with mode 0666, {US} (sudo rm {path})"
    )


def test_a_socket_that_we_may_not_connect_to_is_told(place):
    path = place / "vm.sock"
    imports = """
from pathlib import Path
import socket
from ports.vhost.sockets import explain_refusal
"""
    code = """
try:
    socket.socket(socket.AF_UNIX).connect(sys.argv[1])
except OSError as error:
    print(explain_refusal(Path(sys.argv[1]), error))
"""
    for gid, mode, remedy in (
        (0, 0o660, f"sudo chown 54321 {path}"),
        (GROUP, 0o660, f"sudo usermod -aG {GROUP} 54321, then log in again"),
        (GROUP, 0o600, f"sudo chown 54321 {path}"),
    ):
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            os.chown(path, 0, gid)
            path.chmod(mode)
            _, out, err = STRANGER.run(imports, code, path)
        assert err == ""
        assert out.startswith(f"EACCES: {path} belongs to uid 0 (root), gid {gid} (")
        assert out.endswith(f"with mode {mode:04o}, {US} ({remedy})\n")
