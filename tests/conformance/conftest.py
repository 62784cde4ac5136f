"""One switch a module, and two guests on it that must not notice anything.

After each test the witnesses forward, every frame is accounted for, no worker has died,
and the processes hold as many descriptors and mappings as before the test.
"""

from pathlib import Path

import pytest

from tests import requirements
from tests.conformance.dirty import DirtyLog
from tests.conformance.hand import HandGuest, PackedHandGuest
from tests.switch import Switch, remove_directory, short_directory
from tests.system.net import Net, assert_footprint, exchange_both_ways, footprint
from tests.vm.conftest import (  # noqa: F401 (fixtures of test 77)
    guest_image,
    namespace,
    short_path,
    uplink_lab,
)
from vswitch.guest.frontend import Frontend


@pytest.fixture(scope="module")
def switch():
    """A switch with one worker and a spare."""
    directory = short_directory()
    with Switch(directory) as it:
        it.wait_for_workers(1, 1)
        yield it
    remove_directory(directory)


@pytest.fixture(scope="module")
def witnesses(switch):
    """Two guests that behave, all the while."""
    net = Net(switch)
    try:
        pair = net.guest("w1", tx_buffer_len=9300), net.guest("w2")
        net.pin(*pair)
        yield pair
        net.check()
    finally:
        net.close()


class Scene(Net):
    """The ports and guests of one test, beside the witnesses."""

    def __init__(self, switch, witnesses):
        super().__init__(switch)
        self.witnesses = witnesses
        self._by_hand = []
        self._frontends = []

    def by_hand(self, name, *, port=(), packed=False, **options):
        """A guest with rings written by hand on a port of its own, attached and up."""
        guest = self.prepared_by_hand(name, port=port, packed=packed, **options)
        guest.open()
        self.switch.wait_for_state(name, "up")
        return guest

    def prepared_by_hand(self, name, *, port=(), packed=False, **options):
        """The same, not attached yet."""
        kind = PackedHandGuest if packed else HandGuest
        guest = kind(self.add_port(name, **dict(port)), **options)
        self._by_hand.append(guest)
        return guest

    def connect(self, name, **options):
        """A front-end connected to a port that is there, with nothing said yet."""
        frontend = Frontend.connect(self.switch.socket(name), **options)
        self._frontends.append(frontend)
        return frontend

    def hang_up(self, frontend, name):
        """Close a front-end and wait until its port is free for the next."""
        frontend.close()
        self.switch.wait_for_state(name, "waiting-for-frontend")

    def wait_for_count(self, name, counter, count):
        """Wait until a port's counter is that. Frames are seen before they are counted."""
        self.switch.wait_for(
            lambda: self.switch.counters(name)[counter] == count,
            lambda: f"{counter} to be {count}: {self.switch.counters(name)}",
        )

    def drain(self):
        """Take what was flooded to the witnesses."""
        for guest in self.witnesses:
            while guest.receive(timeout=0):
                pass

    def assert_undisturbed(self):
        """The witnesses hear each other as ever."""
        self.drain()
        exchange_both_ways(*self.witnesses)

    def close(self):
        for one in (*self._by_hand, *self._frontends):
            one.close()
        super().close()


@pytest.fixture
def huge_pages():
    """Sixteen huge pages that nobody uses."""
    requirements.require_root()
    setting = Path("/proc/sys/vm/nr_hugepages")
    before = int(setting.read_text())
    setting.write_text(str(before + 16))
    try:
        if int(setting.read_text()) < before + 16:
            pytest.skip("needs 32 MiB of memory that can become huge pages")
        yield
    finally:
        setting.write_text(str(before))


@pytest.fixture
def net(switch, witnesses):
    """A scene; what has to hold at the end of every test is checked at its end."""
    pids, before = switch.worker_pids(), footprint(switch)
    scene = Scene(switch, witnesses)
    try:
        yield scene
        scene.check()
    finally:
        scene.close()
    scene.assert_undisturbed()
    assert switch.worker_pids() == pids, switch.log
    assert_footprint(switch, before)


@pytest.fixture
def make_log():
    """Make logs that end with the test."""
    made = []

    def make(highest, **options):
        made.append(DirtyLog(highest, **options))
        return made[-1]

    yield make
    for log in made:
        log.close()
