import os
import socket
import threading

import msgpack
import pytest

from vswitch.control.client import Client
from vswitch.errors import EXIT_NO_MANAGER, EXIT_USAGE, NoManagerError, VswitchError


@pytest.fixture
def answer(tmp_path):
    """Make a manager that answers one request with the given bytes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen()
    requests, threads = [], []

    def make(*parts):
        def serve():
            connection, _ = listener.accept()
            with connection:
                requests.append(msgpack.unpackb(connection.recv(1 << 16)))
                for part in parts:
                    connection.sendall(part)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return requests

    yield make
    for thread in threads:
        thread.join()
    listener.close()


def test_a_request_is_one_map_and_so_is_the_result(tmp_path, answer):
    requests = answer(msgpack.packb({"ok": {"ports": [1, 2]}}))
    with Client(tmp_path) as client:
        assert client.ask("show", what="all") == {"ports": [1, 2]}
    assert requests == [{"command": "show", "what": "all"}]


def test_an_answer_may_come_in_pieces(tmp_path, answer):
    packed = msgpack.packb({"ok": "x" * 1000})
    answer(packed[:1], packed[1:500], packed[500:])
    with Client(tmp_path) as client:
        assert client.ask("show") == "x" * 1000


def test_a_refusal_is_raised_with_its_code(tmp_path, answer):
    error = {"code": EXIT_USAGE, "message": "cannot do that: no (try less)"}
    answer(msgpack.packb({"error": error}))
    with (
        Client(tmp_path) as client,
        pytest.raises(VswitchError, match="cannot do that") as caught,
    ):
        client.ask("down")
    assert caught.value.code == EXIT_USAGE


def test_a_manager_that_hangs_up_is_told(tmp_path, answer):
    answer()
    with (
        Client(tmp_path) as client,
        pytest.raises(VswitchError, match=r"no answer to show.*closed the connection"),
    ):
        client.ask("show")


def test_no_manager_says_how_to_start_one(tmp_path):
    with pytest.raises(NoManagerError, match=r"start it with: vswitch up") as caught:
        Client(tmp_path / "missing")
    assert caught.value.code == EXIT_NO_MANAGER


def test_a_socket_that_nobody_listens_at_is_no_manager(tmp_path):
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "control.sock"))
    with pytest.raises(NoManagerError):
        Client(tmp_path)


def test_a_long_run_directory_is_no_obstacle(tmp_path, answer):
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    os.link(tmp_path / "control.sock", deep / "control.sock")
    answer(msgpack.packb({"ok": 1}))
    with Client(deep) as client:
        assert client.ask("status") == 1
