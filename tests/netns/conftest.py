from contextlib import ExitStack

import pytest

from tests import requirements
from tests.netns import uplink
from tests.netns.uplink import Bench
from tests.switch import Switch, remove_directory, short_directory
from tests.system.net import ALL_CPUS


def quiet_namespace():
    requirements.require_root()
    return uplink.quiet_namespace()


@pytest.fixture(scope="module")
def namespace():
    with quiet_namespace() as it:
        yield it


@pytest.fixture
def other_namespace():
    with quiet_namespace() as it:
        yield it


@pytest.fixture(scope="module")
def far():
    """Where the other ends are."""
    with quiet_namespace() as it:
        yield it


@pytest.fixture(scope="module")
def switch(namespace):
    """A switch inside the namespace that the tests of a module share."""
    directory = short_directory()
    with Switch(directory, prefix=namespace.prefix) as it:
        it.wait_for_workers(1, 1)
        yield it
    remove_directory(directory)


@pytest.fixture(scope="module")
def two_workers(namespace):
    """The same with two workers."""
    directory = short_directory()
    options = ("--workers", 2, "--cpus", ALL_CPUS)
    with Switch(directory, *options, prefix=namespace.prefix) as it:
        it.wait_for_workers(2, 1)
        yield it
    remove_directory(directory)


@pytest.fixture
def start(namespace):
    """Make a switch inside the namespace, with options, that ends with the test."""
    started = []

    def make(*options, prefix=()):
        it = Switch(short_directory(), *options, prefix=[*namespace.prefix, *prefix])
        started.append(it)
        it.start()
        return it

    yield make
    for it in started:
        it.close()
        remove_directory(it.directory)


@pytest.fixture
def bench(switch, namespace):
    """Taps, guests and sockets on the shared switch; they end with the test."""
    with Bench(switch, namespace) as it:
        yield it
        it.check()


@pytest.fixture
def plugged(bench, far, kind):
    """Plug in a port of the module's kind with a guest; it, and the far end's wire."""

    def plug(name, **options):
        return bench.plug(kind, name, far, **options)

    return plug


@pytest.fixture
def make_bench(namespace):
    """The same on a switch of the test's own."""
    with ExitStack() as owned:
        benches = []

        def make(switch):
            benches.append(owned.enter_context(Bench(switch, namespace)))
            return benches[-1]

        yield make
        for it in benches:
            it.check()
