"""What people and programs may get wrong when they ask for something."""

import io
import socket

import msgpack
import pytest

from tests.switch import RefusedError
from tests.system.net import assert_footprint, exchange_both_ways, fill, footprint


def refused(switch, text, command="add_port", **arguments):
    with pytest.raises(RefusedError, match=text):
        switch.ask(command, **arguments)


def refuse_socket(net, path, text):
    """Adding a port there fails, says so, and leaves nothing behind."""
    before = footprint(net.switch)
    refused(net.switch, text, name="a", endpoint=f"vhost:{path}", mode="server")
    assert [port["name"] for port in net.switch.ask("show")["ports"]] == []
    assert_footprint(net.switch, before)
    net.guest("b")


def test_a_socket_path_that_is_too_long_is_refused(net):
    path = net.switch.directory / ("x" * 108)
    refuse_socket(net, path, "a socket's may have 107")


def test_a_missing_directory_is_named(net):
    path = net.switch.directory / "nowhere/a.sock"
    refuse_socket(net, path, f"ENOENT: no directory {path.parent} .mkdir -p")


def test_a_path_where_somebody_listens_is_refused(net):
    path = net.switch.socket("a")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        refuse_socket(net, path, "EADDRINUSE: another process is listening")
        path.unlink()  # it was still there


def test_a_plain_file_is_not_replaced(net):
    path = net.switch.socket("a")
    path.write_text("precious")
    refuse_socket(net, path, "a file that is no socket is there")
    assert path.read_text() == "precious"
    path.unlink()


def test_a_path_with_a_zero_byte_is_refused(net):
    refuse_socket(net, "/tmp/a\0b.sock", "a character of it cannot be printed")


def test_a_stale_socket_file_is_replaced(net):
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(net.switch.socket("a")))
    exchange_both_ways(net.guest("a"), net.guest("b"))


def test_the_same_port_again_changes_nothing(net):
    a, b = net.guest("a"), net.guest("b")
    again = net.switch.add_port("a")
    assert again["changed"] is False
    assert again["endpoint"] == f"vhost:{net.switch.socket('a')}"
    exchange_both_ways(a, b)


def test_names_and_sockets_that_clash_are_refused(net):
    a = net.guest("a")
    switch = net.switch
    here = f"vhost:{switch.socket('a')}"
    refused(switch, "the name is taken by", name="a", endpoint="vhost:/tmp/other.sock")
    refused(switch, "the name is taken by", name="a", endpoint=here, mode="client")
    refused(switch, f"{here} is port a .vswitch del-port a", name="b", endpoint=here)
    refused(switch, "no port b .known: a", "del_port", name="b")
    exchange_both_ways(a, net.guest("c"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"endpoint": "vmnet:x"}, "kind 'vmnet' is unknown"),
        ({"endpoint": "vhost:"}, "it leads nowhere"),
        ({"endpoint": ""}, "it leads nowhere"),
        ({"name": ""}, "1 to 64 printable characters"),
        ({"name": "a b"}, "1 to 64 printable characters"),
        ({"name": "a/b"}, "1 to 64 printable characters"),
        ({"name": "a" * 65}, "1 to 64 printable characters"),
        ({"queues": 0}, "cannot use queues 0"),
        ({"queues": 9}, "cannot use queues 9"),
        ({"queues": "many"}, "queues is 'many', not a whole number"),
        ({"colour": "red"}, "'colour' is unknown .known: name, endpoint"),
        ({"max_addresses": 0}, "cannot use max_addresses 0"),
        ({"endpoint": "tap:a-name-that-is-too-long"}, "a name has 1 to 15 bytes"),
        ({"endpoint": "tap:a:b"}, "a character the kernel refuses"),
    ],
    ids=str,
)
def test_ports_that_cannot_be_are_refused(net, arguments, text):
    wanted = {"name": "a", "endpoint": f"vhost:{net.switch.socket('a')}"}
    refused(net.switch, text, **wanted | arguments)
    assert net.switch.ask("show")["ports"] == []
    net.guest("a")


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\xff" * 100,
        b"GET / HTTP/1.1\r\n\r\n",
        msgpack.packb({"command": "no such thing"}),
        msgpack.packb({"command": None}),
        msgpack.packb({"command": {"a": 1}}),
        msgpack.packb({"command": "add_port"}),
        msgpack.packb({"command": "fdb_add", "mac": 5, "ifname": []}),
        msgpack.packb(7),
        msgpack.packb(["command", "down"]),
        b"\x91" * 5000,
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\xa7command" + b"\xc6\x00\x20\x00\x00" + bytes(0x200000),
    ],
    ids=range(14),
)
def test_garbage_on_the_control_socket_is_survived(net, data):
    a = net.guest("a")
    with net.switch.connect() as control:
        try:
            control.sendall(data)
            control.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: control.recv(65536), b""))
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
    for one in msgpack.Unpacker(io.BytesIO(answer)):
        assert "error" in one
    exchange_both_ways(a, net.guest("b"))


def test_who_connects_to_the_control_socket_and_is_silent_holds_up_nobody(net):
    with net.switch.connect(), net.switch.connect() as half:
        half.sendall(msgpack.packb({"command": "show"})[:-1])
        exchange_both_ways(net.guest("a"), net.guest("b"))


def test_who_asks_without_end_and_never_reads_holds_up_nobody(net):
    with net.switch.connect() as control:
        control.setblocking(False)
        question = msgpack.packb({"command": "stats"})
        with pytest.raises(BlockingIOError):
            fill(control.sendall, question * 1000)
        exchange_both_ways(net.guest("a"), net.guest("b"))
