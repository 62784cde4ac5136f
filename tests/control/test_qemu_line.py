import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

from vswitch import qemu_line

PATH = Path("/run/vm1.sock")


def words(text):
    return shlex.split(text.replace("\\\n", ""))


def test_the_qemu_arguments_share_memory_and_bind_it_to_the_machine():
    arguments = words(qemu_line.qemu_text("vm1", PATH, "server", 1))
    assert "memory-backend-memfd,id=mem,size=1G,share=on" in arguments
    assert "memory-backend=mem" in arguments
    assert f"socket,id=chr-vm1,path={PATH},reconnect=1" in arguments
    assert "vhost-user,id=net-vm1,chardev=chr-vm1" in arguments
    assert arguments[arguments.index("-m") + 1] == "1G"


def test_a_port_in_client_mode_has_qemu_listen():
    arguments = words(qemu_line.qemu_text("vm1", PATH, "client", 1))
    assert f"socket,id=chr-vm1,path={PATH},server=on,wait=off" in arguments


def test_several_queue_pairs_need_a_vector_a_ring_and_two_more():
    arguments = words(qemu_line.qemu_text("vm1", PATH, "server", 4))
    assert "vhost-user,id=net-vm1,chardev=chr-vm1,queues=4" in arguments
    assert arguments[-1].endswith(",mq=on,vectors=10")


def test_a_comma_and_a_space_in_a_path_survive_qemu_and_the_shell():
    arguments = words(qemu_line.qemu_text("vm1", Path("/run/a,b c.sock"), "server", 1))
    assert "socket,id=chr-vm1,path=/run/a,,b c.sock,reconnect=1" in arguments


def test_addresses_are_local_unicast_and_differ_by_name():
    one, two = qemu_line.mac_for("vm1"), qemu_line.mac_for("vm2")
    assert one == qemu_line.mac_for("vm1") != two
    assert one.startswith("52:54:00:")


def test_libvirts_mode_is_the_other_side_of_ours():
    text = qemu_line.libvirt_text("vm1", PATH, "client", 2)
    root = ET.fromstring(f"<domain>{text}</domain>")
    assert root.find("memoryBacking/access").get("mode") == "shared"
    source = root.find("interface/source")
    assert (source.get("path"), source.get("mode")) == (str(PATH), "server")
    assert root.find("interface/driver").get("queues") == "2"
    text = qemu_line.libvirt_text("vm1", PATH, "server", 1)
    root = ET.fromstring(f"<domain>{text}</domain>")
    assert root.find("interface/source").get("mode") == "client"
    assert root.find("interface/source/reconnect").get("enabled") == "yes"
    assert root.find("interface/driver") is None


def test_a_path_with_quotes_is_still_xml():
    path = Path("/run/a&'\"<b.sock")
    text = qemu_line.libvirt_text("vm1", path, "server", 1)
    root = ET.fromstring(f"<domain>{text}</domain>")
    assert root.find("interface/source").get("path") == str(path)
