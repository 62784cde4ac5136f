import pytest

from tests.switch import Switch, remove_directory, short_directory
from tests.system.net import Net
from tests.system.shell import Shell


@pytest.fixture(scope="module")
def switch():
    """A switch that the tests of a module share; each adds ports of its own."""
    directory = short_directory()
    with Switch(directory) as it:
        it.wait_for_workers(1, 1)
        yield it
    remove_directory(directory)


@pytest.fixture
def net(switch):
    """Ports and guests on the shared switch."""
    yield from _net(switch)


@pytest.fixture
def start():
    """Make a switch of the test's own, with options; they end with the test."""
    started = []

    def make(*options):
        it = Switch(short_directory(), *options)
        started.append(it)
        it.start()
        return it

    yield make
    for it in started:
        it.close()
        remove_directory(it.directory)


@pytest.fixture
def own_net(start):
    """Make ports and guests on a switch of the test's own."""
    nets = []

    def make(*options):
        nets.append(_net(start(*options)))
        return next(nets[-1])

    yield make
    for net in nets:
        next(net, None)


@pytest.fixture
def shell(tmp_path):
    """No switch yet; one that the test leaves running is taken down."""
    it = Shell(tmp_path)
    yield it
    it.run("down")


def _net(switch):
    net = Net(switch)
    try:
        yield net
        net.check()
    finally:
        net.close()
