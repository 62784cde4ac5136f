"""How a tap's frames come and go: chosen, shown, and refused where it cannot be had."""

import errno

import pytest

from ports import vhost_net
from tests import requirements
from tests.forbid import FORBID
from tests.netns.flows import Connection
from tests.netns.uplink import GUEST_MAC, WIRE_MAC, numbered
from tests.switch import RefusedError, dropped

pytestmark = pytest.mark.netns

BURST = 500
ENOUGH = 2 << 20  # bytes
NEAR, FAR = "10.81.0.1", "10.81.0.2"
FORBIDDEN = "it is forbidden (look at sysctl kernel.io_uring_disabled and seccomp)"


def shown(switch, name):
    port = switch.port(name)
    return port["backend"], port["backend_reason"]


@pytest.fixture(params=["io_uring", "plain"])
def backend(request):
    if request.param == "io_uring":
        requirements.require_io_uring()
    return request.param


# --- frames ---


def test_a_burst_arrives_by_each(bench, switch, backend):
    bench.tap("way0", backend=backend)
    assert shown(switch, "way0") == (backend, "")
    guest, wire = bench.guest("vm"), bench.wire("way0")
    frames = numbered(WIRE_MAC, GUEST_MAC, BURST)
    guest.send_all(frames)
    assert wire.receive(BURST) == frames
    assert switch.counters("way0")["tx_frames"] == BURST
    assert dropped(switch.counters("way0"), "tx") == 0


@pytest.mark.parametrize("offloads", ["on", "off"])
def test_kernels_exchange_streams_by_each(
    bench, switch, namespace, other_namespace, backend, offloads
):
    """Super-frames, and full-sized frames in bursts."""
    requirements.require_command("ethtool", "ethtool")
    for name in ("near", "far"):
        bench.tap(name, backend=backend)
    namespace.ip(f"link set far netns {other_namespace.pid}")
    for side, name, address in (
        (namespace, "near", NEAR),
        (other_namespace, "far", FAR),
    ):
        side.run("ethtool", "-K", name, "tx", offloads)
        side.ip(f"address add {address}/24 dev {name}")
        side.ip(f"link set {name} up")
    with Connection(namespace, other_namespace, FAR, 5000) as connection:
        connection.start()
        switch.wait_for(lambda: min(connection.received) > ENOUGH, "both ways")
        connection.stop()


# --- the choice ---


def test_the_best_is_taken_unless_somebody_asks(bench, switch):
    requirements.require_io_uring()
    bench.tap("best0")
    bench.tap("best1", backend="auto")
    bench.tap("best2", backend="plain")
    lack = vhost_net.missing()
    best = ("io_uring", f"no vhost-net: {lack}") if lack else ("vhost-net", "")
    assert shown(switch, "best0") == shown(switch, "best1") == best
    assert shown(switch, "best2") == ("plain", "")


def test_without_vhost_net_it_is_told_how_to_get_it(bench, switch, namespace):
    """`tests/vm/test_vhost_net.py` has a kernel with it."""
    requirements.require_no_vhost_net()
    text = "ENOENT: there is no /dev/vhost-net (modprobe vhost_net)"
    bench.tap("lack2")
    assert f"no vhost-net: {text}" in shown(switch, "lack2")[1]
    with pytest.raises(RefusedError) as refused:
        switch.add_port("lack3", "tap:lack3", backend="vhost-net")
    text = f"port lack3: cannot use backend vhost-net: {text}"
    assert str(refused.value) == text
    assert namespace.link("lack3") is None


def test_a_port_is_the_same_only_with_its_backend(bench, switch):
    bench.tap("again1", backend="plain")
    for same in ({}, {"backend": None}, {"backend": "auto"}, {"backend": "plain"}):
        assert not switch.add_port("again1", "tap:again1", **same)["changed"]
    text = "again1: the name is taken by tap:again1 plain"
    with pytest.raises(RefusedError, match=text):
        switch.add_port("again1", "tap:again1", backend="io_uring")


def test_where_it_is_forbidden_the_next_is_taken_and_the_reason_shown(
    start, make_bench, namespace
):
    requirements.require_no_vhost_net()
    switch = start(prefix=(*FORBID, "io_uring_setup", str(int(errno.EPERM))))
    bench = make_bench(switch)
    bench.tap("lack0")
    name, reason = shown(switch, "lack0")
    assert (name, reason.split("; ")[1:]) == ("plain", [f"no io_uring: {FORBIDDEN}"])
    with pytest.raises(RefusedError) as refused:
        switch.add_port("lack1", "tap:lack1", backend="io_uring")
    text = f"port lack1: cannot use backend io_uring: {FORBIDDEN}"
    assert str(refused.value) == text
    assert namespace.link("lack1") is None


@pytest.mark.parametrize("name", ["fast", "PLAIN"])
def test_an_unknown_backend_is_refused(switch, namespace, name):
    text = f"backend '{name}' is unknown .known: auto, vhost-net, io_uring, plain."
    with pytest.raises(RefusedError, match=text):
        switch.add_port("odd1", "tap:odd1", backend=name)
    assert namespace.link("odd1") is None


@pytest.mark.parametrize("endpoint", [None, "eth:lo"])
def test_what_is_no_tap_has_no_choice(switch, endpoint):
    text = "cannot use backend 'plain' with .*: only a tap has a choice"
    with pytest.raises(RefusedError, match=text):
        switch.add_port("odd2", endpoint, backend="plain")
