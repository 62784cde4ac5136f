"""A real guest: one QEMU process with a port of the switch.

Runs under TCG, QEMU's interpreter, because that works on every machine. Three arguments
are there for it: `vectors=0`, as QEMU 7.2 under TCG crashes when a vhost-user guest uses
MSI-X; `romfile=`, since nobody boots from the network; and one thread less with
`-nodefaults`.
"""

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Final, NamedTuple, Self

from vswitch.demo.image import Image
from vswitch.demo.qmp import Qmp
from vswitch.demo.shell import Result, Shell
from vswitch.errors import VswitchError

QEMU: Final = "qemu-system-x86_64"
_BOOT_S: Final = 60.0  # a guest boots in 4 s; tests may run beside other work
_COMMAND_S: Final = 30.0
_NO_OFFLOADS: Final = "".join(
    f",{name}=off"
    for name in (
        *("csum", "guest_csum", "gso", "guest_tso4", "guest_tso6", "guest_ecn"),
        *("guest_ufo", "host_tso4", "host_tso6", "host_ecn", "host_ufo"),
    )
)
_KERNEL_ARGUMENTS: Final = "console=ttyS0 quiet panic=-1 nokaslr mitigations=off"


class Machine(NamedTuple):
    """What to start.

    Attributes:
        name: For messages and file names.
        socket_path: The switch's vhost-user socket, or None for no network.
        mac: Address of the guest's interface.
        address: IP address and prefix length of eth0; empty: the interface stays down.
        queues: Queue pairs, and as many processors.
        memory_mib: Size of the guest.
        shared: Whether the switch can map the guest's memory; False is the mistake
            that everybody makes once.
        server: QEMU listens and the switch connects.
        packed: The guest is offered packed rings.
        offloads: The guest is offered checksum and segmentation offloads.
    """

    name: str
    socket_path: Path | None
    mac: str = "52:54:00:00:00:01"
    address: str = ""
    queues: int = 1
    memory_mib: int = 192
    shared: bool = True
    server: bool = False
    packed: bool = False
    offloads: bool = True


def is_installed() -> bool:
    """Whether there is a QEMU to start."""
    return shutil.which(QEMU) is not None


class QemuGuest:
    """A guest from power on to power off; use as a context manager.

    Args:
        image: What to boot.
        machine: With which hardware.
        directory: For the two logs, which stay; it must exist.
    """

    def __init__(self, image: Image, machine: Machine, directory: Path) -> None:
        self.machine = machine
        self.console_log = directory / f"{machine.name}.console"
        self.qemu_log = directory / f"{machine.name}.qemu"
        ours, theirs = socket.socketpair()
        command = _command(image, machine, self.console_log, theirs.fileno())
        with theirs, self.qemu_log.open("wb") as log:
            self._process = _start(command, log, theirs.fileno())
        self._qmp = Qmp(ours)
        self._shell = Shell(machine.name, *_pipes(self._process))

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    def wait_ready(self, timeout: float = _BOOT_S) -> None:
        """Wait until the guest's shell is there; call again after each `reset`.

        Raises:
            VswitchError: It is not by the deadline; what QEMU said is in the text.
        """
        try:
            self._shell.wait_ready(timeout)
        except VswitchError as error:
            said = self.qemu_log.read_text(errors="replace").strip()
            console = self.console_log.read_bytes()[-300:].decode(errors="replace")
            detail = "; ".join(text for text in (said, console.strip()) if text)
            raise VswitchError(f"{error}; {detail}" if detail else str(error)) from None

    def run(self, command: str, timeout: float = _COMMAND_S) -> Result:
        """Run a line of shell in the guest."""
        return self._shell.run(command, timeout)

    def check(self, command: str, timeout: float = _COMMAND_S) -> str:
        """Run a line of shell that must succeed; return what it said.

        Raises:
            VswitchError: Its status was not 0.
        """
        result = self.run(command, timeout)
        if result.status:
            text = f"guest {self.machine.name}: {command!r} failed: {result.status}"
            raise VswitchError(f"{text}; it said {result.output!r}")
        return result.output

    def reset(self) -> None:
        """Press the reset button."""
        self._qmp.execute("system_reset")

    def pause(self) -> None:
        """Stop the virtual processors; QEMU stops the rings."""
        self._qmp.execute("stop")

    def resume(self) -> None:
        """Let them run again; QEMU starts the rings where they stopped."""
        self._qmp.execute("cont")

    def set_link(self, *, up: bool) -> None:
        """Plug the guest's cable in or out."""
        self._qmp.execute("set_link", name="net0", up=up)

    def kill(self) -> None:
        """End QEMU without warning."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End QEMU as a host that shuts down would, then without asking."""
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()
        self._qmp.close()
        for pipe in _pipes(self._process):
            with suppress(OSError):  # unsent input of a dead guest
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _start(
    command: list[str], log: IO[bytes], monitor_fd: int
) -> subprocess.Popen[bytes]:
    """Start QEMU so that it ends with us and a terminal's Ctrl-C does not reach it."""
    if not is_installed():
        text = f"cannot start a guest: {QEMU} is not installed"
        raise VswitchError(f"{text} (apt-get install qemu-system-x86)")
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", signal.Signals.SIGKILL.name[3:], *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        pass_fds=(monitor_fd,),
        start_new_session=True,
    )


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None:
        message = "QEMU was started without pipes"
        raise AssertionError(message)
    return process.stdin, process.stdout


def _command(image: Image, machine: Machine, console: Path, monitor: int) -> list[str]:
    arguments = f"{_KERNEL_ARGUMENTS} vswitch.address={machine.address}"
    return [
        *(QEMU, "-accel", "tcg", "-nodefaults", "-no-user-config", "-nographic"),
        *("-smp", str(machine.queues), "-m", f"{machine.memory_mib}M"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
        *("-append", arguments.strip()),
        *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
        *("-chardev", "stdio,id=shell,signal=off", "-serial", "chardev:shell"),
        *("-chardev", f"socket,id=monitor,fd={monitor}"),
        *("-mon", "chardev=monitor,mode=control"),
        *_memory(machine),
        *_network(machine),
    ]


def _memory(machine: Machine) -> Iterator[str]:
    if machine.shared:
        size = f"{machine.memory_mib}M"
        yield from ("-object", f"memory-backend-memfd,id=mem,size={size},share=on")
        yield from ("-machine", "pc,memory-backend=mem")


def _network(machine: Machine) -> Iterator[str]:
    if machine.socket_path is None:
        return
    role = "server=on,wait=off" if machine.server else "reconnect=1"
    queues = f",queues={machine.queues}" if machine.queues > 1 else ""
    extra = ",mq=on" if machine.queues > 1 else ""
    extra += ",packed=on" if machine.packed else ""
    extra += "" if machine.offloads else _NO_OFFLOADS
    device = f"virtio-net-pci,netdev=net0,mac={machine.mac},vectors=0,romfile={extra}"
    yield from ("-chardev", f"socket,id=port,path={machine.socket_path},{role}")
    yield from ("-netdev", f"vhost-user,id=net0,chardev=port{queues}")
    yield from ("-device", device)
