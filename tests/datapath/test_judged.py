"""What was judged is what is delivered, whatever the guest writes in between."""

import itertools
import os

import pytest

from ports import dispatch
from ports.base import KIND_TAP
from tests.datapath.bench import A, B
from tests.datapath.rings import frame_to
from tests.datapath.vhost_nets import VhostNet
from vswitch.datapath import forward, loop


@pytest.mark.parametrize("cuts", [(), (12, 17), (30,)])
@pytest.mark.parametrize("to", ["split", "small buffers", "tap", "vhost-net"])
def test_addresses_that_change_after_the_decision_are_not_delivered(bench, to, cuts):
    a, b = bench.guest(A), bench.guest(B)
    frame = frame_to(B, A, 200)
    whole = bytes(12) + frame
    edges = [0, *cuts, len(whole)]
    for n, (begin, end) in enumerate(itertools.pairwise(edges)):
        gpa = a.put(0x20000 + begin, whole[begin:end])
        a.tx.describe(n, gpa, end - begin, int(end < len(whole)), n + 1)
    a.tx.offer(0)
    ends = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    if to == "tap":
        bench.plane.shared.ports[B]["kind"] = KIND_TAP
        b.rx.record["kick_fd"] = ends[1]
    elif to == "vhost-net":
        net = VhostNet()
        net.attach(bench.plane.shared.ports[B], b.tx.record, b.rx.record)
    else:
        b.post(4, length=2048 if to == "split" else 100)
    loop.start_rings(bench.plane.ctx, 0)
    ctx, ring = bench.plane.ctx, a.tx.record
    port = bench.plane.shared.ports[A]
    n = dispatch.receive(ring, port, ctx, bench.plane.tally(A))
    forward.decide(ctx, 0, ring, n, 0)
    a.write(0x20000 + 12, b"\xee" * 12)  # the guest changes its mind
    forward._send_to_all(ctx, 0, A, n)
    if to == "tap":
        got = os.read(ends[0], 4096)
    elif to == "vhost-net":
        got = b"".join(net.send()[0])
        net.close()
    else:
        got = b"".join(
            b.buffer(head, length, size=2048 if to == "split" else 100)
            for head, length in b.rx.reap()
        )
    for end in ends:
        os.close(end)
    assert got[12:] == frame
