"""What to tell QEMU or libvirt so that a guest attaches to a port."""

import hashlib
import shlex
from html import escape
from pathlib import Path
from typing import Final

_SIZE: Final = "1G"


def mac_for(name: str) -> str:
    """An address for a guest, the same for the same port name."""
    digest = hashlib.sha256(name.encode()).digest()
    return (b"\x52\x54\x00" + digest[:3]).hex(":")


def memory_arguments(size: str = _SIZE) -> list[str]:
    """Memory that the switch can map, and its binding to the machine."""
    return [
        *("-object", f"memory-backend-memfd,id=mem,size={size},share=on"),
        *("-machine", "memory-backend=mem"),
    ]


def network_arguments(
    name: str, path: Path, mode: str, queues: int, mac: str
) -> list[str]:
    """A virtio-net device on a vhost-user socket.

    Args:
        name: The port's; makes the ids.
        path: The socket.
        mode: The port's: in "client" mode QEMU listens.
        queues: Queue pairs.
        mac: The guest's address.
    """
    role = "server=on,wait=off" if mode == "client" else "reconnect=1"
    pairs = f",queues={queues}" if queues > 1 else ""
    # virtio-net wants an interrupt vector a ring, one for control and one for changes.
    mq = f",mq=on,vectors={2 * queues + 2}" if queues > 1 else ""
    escaped = str(path).replace(",", ",,")  # a comma ends a value
    return [
        *("-chardev", f"socket,id=chr-{name},path={escaped},{role}"),
        *("-netdev", f"vhost-user,id=net-{name},chardev=chr-{name}{pairs}"),
        *("-device", f"virtio-net-pci,netdev=net-{name},mac={mac}{mq}"),
    ]


def qemu_text(name: str, path: Path, mode: str, queues: int) -> str:
    """The arguments as lines of a shell command, ready to paste."""
    arguments = memory_arguments() + network_arguments(
        name, path, mode, queues, mac_for(name)
    )
    pairs = [shlex.join(arguments[at : at + 2]) for at in range(0, len(arguments), 2)]
    lines = [f"-m {_SIZE} {pairs[0]} {pairs[1]}", *pairs[2:]]
    return " \\\n".join(f"  {line}" for line in lines)


def libvirt_text(name: str, path: Path, mode: str, queues: int) -> str:
    """The same for a domain's XML."""
    theirs = "server" if mode == "client" else "client"
    reconnect = "<reconnect enabled='yes' timeout='1'/>"
    source = f"<source type='unix' path=\"{escape(str(path))}\" mode='{theirs}'"
    source += f">{reconnect}</source>" if theirs == "client" else "/>"
    driver = f"\n  <driver queues='{queues}'/>" if queues > 1 else ""
    return f"""\
<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
...
<interface type='vhostuser'>
  <mac address='{mac_for(name)}'/>
  {source}
  <model type='virtio'/>{driver}
</interface>"""
