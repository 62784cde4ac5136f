"""A switch, guests and testpmds of one test; whatever is started here ends with it."""

from contextlib import ExitStack

from tests.switch import Switch
from tests.vm.testpmd import Testpmd
from vswitch.demo.qemu import Machine, QemuGuest


class Lab(Switch):
    """A running switch and what is plugged into it."""

    def __init__(self, directory, image=None, *options, prefix=()):
        super().__init__(directory, *options, prefix=prefix)
        self._image = image
        self._owned = ExitStack()

    def close(self):
        self._owned.close()
        super().close()

    def boot(self, *machines, wait=True):
        """Start guests, all at once; a port is added for each that has none yet."""
        known = [port["name"] for port in self.ask("show")["ports"]]
        guests = []
        for machine in machines:
            if machine.name not in known:
                self.add_port(
                    machine.name, mode="client" if machine.server else "server"
                )
            guest = QemuGuest(self._image, machine, self.directory)
            guests.append(self._owned.enter_context(guest))
        for guest in guests:
            if wait:
                guest.wait_ready()
        return guests

    def plug(self, guest, device=""):
        """Put a network device into a running guest; its driver and address come up."""
        guest.plug_device(device)
        guest.check(
            "until [ -e /sys/class/net/eth0 ]; do sleep 0.05; done;"
            f" ip address add {guest.machine.address} dev eth0 && ip link set eth0 up"
        )
        self.wait_for_state(guest.machine.name, "up")

    def machine(self, number, **options):
        """Guest number 1, 2 ...: vm1 with 10.77.0.1 and so on."""
        name = f"vm{number}"
        return Machine(
            name=name,
            socket_path=self.socket(name),
            mac=f"52:54:00:00:00:{number:02x}",
            address=f"10.77.0.{number}/24",
            **options,
        )

    def testpmd(self, name, *options, **arguments):
        pmd = Testpmd(self.socket(name), *options, **arguments)
        return self._owned.enter_context(pmd)
