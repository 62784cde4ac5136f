"""What an interface has to be to become an uplink, and what is said of it."""

import errno
import os
import socket

import pytest

from ports import interface, packet_socket
from ports.errors import PortError
from ports.links import Link

ETHERNET = Link(
    7, is_up=True, has_carrier=True, mtu=1500, hardware=1, master=0, kind=""
)


@pytest.fixture
def wireless(monkeypatch):
    monkeypatch.setattr(interface, "is_wireless", lambda *_: True)


@pytest.mark.parametrize(
    ("hardware", "found"),
    [
        (772, "it is the loopback"),
        (65534, "it carries IP without Ethernet, as tun and WireGuard do"),
        (32, "its hardware type is 32"),
    ],
)
def test_what_is_not_ethernet_is_refused(hardware, found):
    text = f"cannot use interface x0: it is not Ethernet: {found} \\(choose another\\)"
    with pytest.raises(PortError, match=text):
        interface.check("x0", ETHERNET._replace(hardware=hardware))


@pytest.mark.usefixtures("wireless")
def test_a_wireless_station_is_refused():
    text = "it is a wireless station, which sends from no address but its own"
    with pytest.raises(PortError, match=text):
        interface.check("x0", ETHERNET)


def test_who_has_the_interface_is_named():
    text = r"it belongs to interface 123456 already \(ip link set x0 nomaster\)"
    with pytest.raises(PortError, match=text):
        interface.check("x0", ETHERNET._replace(master=123456))


@pytest.mark.parametrize("same", [True, False])
def test_a_wireless_station_is_known_by_sys_if_that_is_ours(tmp_path, same):
    """Another network namespace may have an interface of that name."""
    (tmp_path / "x0" / "phy80211").mkdir(parents=True)
    (tmp_path / "x0" / "ifindex").write_text("7\n" if same else "8\n")
    assert packet_socket.is_wireless("x0", 7, tmp_path) == same


def test_an_interface_without_radio_is_no_wireless_station(tmp_path):
    (tmp_path / "x0").mkdir()
    (tmp_path / "x0" / "ifindex").write_text("7\n")
    assert not packet_socket.is_wireless("x0", 7, tmp_path)


def test_addresses_move_to_a_tap_whose_name_is_not_too_long():
    said = interface.move_addresses(
        "abcdefghijklmno", ["192.0.2.1/24", "2001:db8::1/64"], "guests cannot"
    )
    assert "interface abcdefghijklmno has 192.0.2.1/24, 2001:db8::1/64, where" in said
    assert "vswitch add-port tap:abcdefghij-host;" in said
    assert said.count("dev abcdefghij-host") == 2


# --- what the kernel may refuse ---


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EPERM, r"EPERM: we have no CAP_NET_RAW \(run as root, or grant the"),
        (errno.ENOMEM, r"ENOMEM: no memory for a ring of 32 MiB \(free some\)"),
        (errno.ENODEV, r"ENODEV: it is gone \(ip link show\)"),
        (errno.EAFNOSUPPORT, r"EAFNOSUPPORT: .* no packet sockets \(modprobe af_packe"),
        (errno.ENOBUFS, "ENOBUFS: No buffer space available"),
    ],
)
def test_what_the_kernel_refuses_is_said_and_nothing_stays_open(
    monkeypatch, number, text
):
    opened = []

    def open_into(sockets, _):
        sockets.append(socket.socket(socket.AF_UNIX))
        opened.append(sockets[-1])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(packet_socket, "_open_into", open_into)
    with pytest.raises(PortError, match=f"cannot attach to interface x0: {text}"):
        packet_socket.open_sockets("x0", 7, 1)
    assert [sock.fileno() for sock in opened] == [-1]
