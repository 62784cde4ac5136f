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
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Final, NamedTuple, Self

from vswitch.demo.image import Image
from vswitch.demo.qmp import Qmp
from vswitch.demo.shell import Result, Shell
from vswitch.errors import VswitchError

QEMU: Final = "qemu-system-x86_64"
_BOOT_S: Final = 60.0  # a guest boots in 2 s; tests may run beside other work
_COMMAND_S: Final = 120.0  # as long when such work takes the processors
NO_OFFLOADS: Final = ",".join(
    f"{name}=off"
    for name in (
        *("csum", "guest_csum", "gso", "guest_tso4", "guest_tso6", "guest_ecn"),
        *("guest_ufo", "host_tso4", "host_tso6", "host_ecn", "host_ufo"),
    )
)
_HOST_FILES: Final = (
    *("-cpu", "max", "-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
    *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
)
# What takes long in QEMU's interpreter is left out; and where that gets no processor for a
# while, the kernel is not to conclude that the timer does not work.
_KERNEL_ARGUMENTS: Final = (
    "console=ttyS0 quiet panic=-1 nokaslr mitigations=off"
    " cryptomgr.notests no_timer_check"
)


class Machine(NamedTuple):
    """What to start.

    Attributes:
        name: For messages and file names.
        socket_path: The switch's vhost-user socket, or None for no network.
        mac: Address of the guest's interface.
        address: IP address and prefix length of eth0; empty: the interface stays down.
        queues: Queue pairs.
        processors: How many; 0: as many as queue pairs. Linux uses no more pairs than
            that until it is told to.
        memory_mib: Size of the guest.
        slots: Memory modules that can be plugged into the running guest.
        shared: Whether the switch can map the guest's memory; False is the mistake
            that everybody makes once.
        memory_file: Where the guest's memory is, for two QEMUs to share it while the
            guest moves from one to the other; None: in no file with a name.
        server: QEMU listens and the switch connects.
        packed: The guest is offered packed rings.
        offloads: The guest is offered checksum and segmentation offloads.
        device: More properties of the network device, as QEMU's command line has them.
        halted: The virtual processors wait for the first `resume`.
        incoming: It does not boot but waits for a guest that moves here.
        from_network: Boot with iPXE, which drives the network device before Linux does,
            instead of straight from the image.
        host_files: The guest can mount this machine's files, which it cannot change (9p,
            by the tag "host"), and has a processor that can run its programs.
    """

    name: str
    socket_path: Path | None
    mac: str = "52:54:00:00:00:01"
    address: str = ""
    queues: int = 1
    processors: int = 0
    memory_mib: int = 192
    slots: int = 0
    shared: bool = True
    memory_file: Path | None = None
    server: bool = False
    packed: bool = False
    offloads: bool = True
    device: str = ""
    halted: bool = False
    incoming: bool = False
    from_network: bool = False
    host_files: bool = False


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
        with self._explained():
            self._shell.wait_ready(timeout)

    def run(self, command: str, timeout: float = _COMMAND_S) -> Result:
        """Run a line of shell in the guest.

        Raises:
            VswitchError: It does not end by the deadline; what QEMU said is in the text.
        """
        with self._explained():
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

    def unplug_device(self) -> None:
        """Take the network device out of the running guest; its back end stays."""
        self._qmp.execute("device_del", id="nic0")
        self._qmp.wait_for_event("DEVICE_DELETED", device="nic0")

    def unplug_backend(self) -> None:
        """Take out what the device was connected to; QEMU then deletes its socket."""
        self._qmp.execute("netdev_del", id="net0")

    def plug_backend(self) -> None:
        """Give QEMU a new socket and a back end for it."""
        path = {"type": "unix", "data": {"path": str(self.machine.socket_path)}}
        role = {"wait": False} if self.machine.server else {"reconnect": 1}
        data = {"addr": path, "server": self.machine.server, **role}
        backend = {"type": "socket", "data": data}
        self._qmp.execute("chardev-add", id="port", backend=backend)
        self._qmp.execute("netdev_add", **_backend(self.machine))

    def plug_device(self, device: str = "") -> None:
        """Put the network device into the running guest.

        Args:
            device: Its properties, as in Machine.
        """
        self.machine = self.machine._replace(device=device)
        self._qmp.human(f"device_add {_device(self.machine)}")

    def plug_memory(self, name: str, size_mib: int) -> None:
        """Put a memory module into the running guest, which takes it into use.

        Raises:
            VswitchError: There is no slot for it.
        """
        backend = {"qom-type": "memory-backend-memfd", "id": f"{name}-memory"}
        self._qmp.execute("object-add", **backend, size=size_mib << 20, share=True)
        dimm = {"driver": "pc-dimm", "id": name, "memdev": backend["id"]}
        self._qmp.execute("device_add", **dimm)

    def unplug_memory(self, name: str) -> None:
        """Take a module out, once the guest has let go of it."""
        self._qmp.execute("device_del", id=name)
        self._qmp.wait_for_event("DEVICE_DELETED", device=name)
        self._qmp.execute("object-del", id=f"{name}-memory")

    def begin_move(self, target: Self, path: Path, bytes_per_s: int = 0) -> None:
        """Begin to migrate the running guest into `target`, by a socket at `path`.

        Memory that both have in one file is not copied.

        Args:
            target: A machine like this one that was started as `incoming`.
            path: Of the socket between the two QEMUs, made here.
            bytes_per_s: How fast memory may go over it; 0: as fast as it can.
        """
        wanted = {"events": True, "x-ignore-shared": bool(self.machine.memory_file)}
        for qmp in (self._qmp, target._qmp):
            states = [{"capability": name, "state": on} for name, on in wanted.items()]
            qmp.execute("migrate-set-capabilities", capabilities=states)
        self._qmp.execute("migrate-set-parameters", **{"max-bandwidth": bytes_per_s})
        target._qmp.execute("migrate-incoming", uri=f"unix:{path}")
        self._qmp.execute("migrate", uri=f"unix:{path}")
        self._qmp.wait_for_event("MIGRATION", status="active")

    def end_move(self, target: Self) -> float:
        """Wait until the guest runs in `target`; how long it stood still, seconds.

        Raises:
            VswitchError: It did not get there, and why.
        """
        status = ""
        while status not in {"completed", "failed"}:
            status = self._qmp.wait_for_event("MIGRATION")["status"]
        facts = self._qmp.execute("query-migrate")
        if status != "completed":
            text = f"guest {self.machine.name}: cannot move: {status}"
            raise VswitchError(f"{text}: {facts.get('error-desc', 'QEMU did not say')}")
        # What is typed before would be overwritten by the serial port's moved state.
        target._qmp.wait_for_event("RESUME")
        return float(facts["downtime"]) / 1000

    def cancel_move(self) -> None:
        """Let the guest stay where it is."""
        self._qmp.execute("migrate_cancel")
        self._qmp.wait_for_event("MIGRATION", status="cancelled")

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

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Add what QEMU and the guest's kernel said to an error of the shell."""
        try:
            yield
        except VswitchError as error:
            said = self.qemu_log.read_text(errors="replace").strip()
            console = self.console_log.read_bytes()[-300:].decode(errors="replace")
            detail = "; ".join(text for text in (said, console.strip()) if text)
            raise VswitchError(f"{error}; {detail}" if detail else str(error)) from None

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
    return [
        *(QEMU, "-accel", "tcg", "-nodefaults", "-no-user-config", "-nographic"),
        *("-smp", str(machine.processors or machine.queues)),
        *("-m", _size(machine)),
        *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
        *("-chardev", "stdio,id=shell,signal=off", "-serial", "chardev:shell"),
        *("-chardev", f"socket,id=monitor,fd={monitor}"),
        *("-mon", "chardev=monitor,mode=control"),
        *_kernel(image, machine),
        *_memory(machine),
        *_network(machine),
        *(_HOST_FILES if machine.host_files else ()),
        *(("-S",) if machine.halted else ()),
        *(("-incoming", "defer") if machine.incoming else ()),
    ]


def _size(machine: Machine) -> str:
    size = f"{machine.memory_mib}M"
    return f"{size},slots={machine.slots},maxmem=2G" if machine.slots else size


def kernel_arguments(machine: Machine) -> str:
    """What the guest's kernel has to be told, whoever loads it."""
    return f"{_KERNEL_ARGUMENTS} vswitch.address={machine.address}"


def _kernel(image: Image, machine: Machine) -> Iterator[str]:
    if not machine.from_network:
        yield from ("-kernel", str(image.kernel), "-initrd", str(image.initramfs))
        yield from ("-append", kernel_arguments(machine))


def _memory(machine: Machine) -> Iterator[str]:
    if machine.shared:
        file = machine.memory_file
        kind = (
            f"memory-backend-file,mem-path={file}" if file else "memory-backend-memfd"
        )
        size = f"{machine.memory_mib}M"
        yield from ("-object", f"{kind},id=mem,size={size},share=on")
        yield from ("-machine", "pc,memory-backend=mem")


def _network(machine: Machine) -> Iterator[str]:
    if machine.socket_path is None:
        return
    role = "server=on,wait=off" if machine.server else "reconnect=1"
    yield from ("-chardev", f"socket,id=port,path={machine.socket_path},{role}")
    yield from ("-netdev", ",".join(f"{k}={v}" for k, v in _backend(machine).items()))
    yield from ("-device", _device(machine))


def _backend(machine: Machine) -> dict[str, str | int]:
    backend: dict[str, str | int]
    backend = {"type": "vhost-user", "id": "net0", "chardev": "port"}
    if machine.queues > 1:
        backend["queues"] = machine.queues
    return backend


def _device(machine: Machine) -> str:
    extra = (
        "bootindex=0" if machine.from_network else "romfile=",
        "mq=on" if machine.queues > 1 else "",
        "packed=on" if machine.packed else "",
        "" if machine.offloads else NO_OFFLOADS,
        machine.device,
    )
    device = f"virtio-net-pci,id=nic0,netdev=net0,mac={machine.mac},vectors=0"
    return ",".join((device, *filter(None, extra)))
