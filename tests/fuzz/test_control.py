"""Anything at the control socket; the long run is `make soak`."""

import msgpack
import pytest

from tests.fuzz.control import ControlFuzz

REQUESTS = 600
DEEP = b"\x91" * 1000 + b"\xc0"  # a list in a list, and so on


def test_nothing_at_the_control_socket_hurts_the_manager(switch):
    ControlFuzz(switch, seed=1).run(REQUESTS)


# Found by the above: hung up on without an answer, with a traceback in the log.
@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"command": "DEEP"}, "unknown command that is no text"),
        ({"command": "del_port", "name": "DEEP"}, "bad arguments: RecursionError"),
        ({"command": "add_port", "mode": "DEEP"}, "mode is a list of lists too deep"),
        (
            {"command": "fdb_add", "vlan": float("inf"), "ifname": "a", "mac": "b"},
            "bad arguments: OverflowError",
        ),
    ],
    ids=["command", "name", "port", "vlan"],
)
def test_what_cannot_be_shown_is_refused_like_anything_else(switch, asked, found):
    data = msgpack.packb(asked).replace(msgpack.packb("DEEP"), DEEP)
    with switch.connect() as control:
        control.sendall(data)
        answer = msgpack.unpackb(control.recv(1 << 16))
    assert found in answer["error"]["message"]
    assert "Traceback" not in switch.log
