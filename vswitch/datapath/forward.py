"""Decide where the frames of a burst go, then send them port by port.

Two passes on purpose: the first reads each frame's addresses and gives it an egress port
or a verdict; the second copies all frames for one egress with that port's state in
registers and publishes them with one store. A flooded frame is one more copy in every
port's list, in its place among the others, so a pair of stations never sees frames
reordered.

virtio-net has no frame check sequence and neither have we: a frame is forwarded as is.
"""

from typing import Final

from ports import dispatch
from ports.burst import BAD_CHAIN, BAD_HEADER, TOO_LONG, TOO_SHORT, Scratch
from ports.native import Record, jit
from vswitch.datapath import fdb
from vswitch.datapath.ethernet import (
    is_group,
    is_reserved,
    read_destination,
    read_source,
)
from vswitch.records import Shared

# FRAME.egress below zero.
FLOOD: Final = -1
DROP: Final = -2
_NO_FRAME: Final = -1
_NO_KEY: Final = 0


@jit
def forward_burst(
    shared: Shared, scratch: Scratch, worker: int, ring: Record, n: int, now_s: int
) -> None:
    """Send the first `n` frames of the burst, which came in by `ring`, on their way."""
    ingress = int(ring["port"])
    flooded = decide(shared, scratch, worker, ring, n, now_s)
    if flooded == 0:
        _send_lists(shared, scratch, worker, scratch.egresses[-1])
    else:
        _send_to_all(shared, scratch, worker, ingress, n)


@jit
def decide(
    shared: Shared, scratch: Scratch, worker: int, ring: Record, n: int, now_s: int
) -> int:
    """Give each frame an egress; build each egress port's list; count what is dropped.

    `scratch.egresses` lists the ports with frames, its last element how many there are.

    Returns:
        How many frames are to be flooded.
    """
    header = shared.header[0]
    ageing_s = int(header["ageing_s"])
    seed = int(header["hash_seed"])
    forward_reserved = int(header["forward_reserved"])
    ingress = int(ring["port"])
    header_len = int(ring["header_len"])
    tally = shared.counters[worker, ingress]
    burst = scratch.burst
    last_src = int(ring["last_src"])
    learned_s = int(ring["last_src_s"])
    last_dst = _NO_KEY
    last_egress = DROP
    n_egresses = 0
    n_bytes = 0
    forwarded = 0
    flooded = 0
    for i in range(n):
        frame = burst[i]
        length = int(frame["length"])
        if length < 0:
            frame["egress"] = DROP
            _count_malformed(tally, length)
            continue
        n_bytes += length
        eth = int(frame["eth"])
        dst = read_destination(eth)
        src = read_source(eth)
        if header_len > 0 and dispatch.asks_for_offload(frame, header_len):
            frame["egress"] = DROP
            tally["rx_drop_bad_header"] += 1
            continue
        if src != last_src or now_s != learned_s:
            if src == _NO_KEY or is_group(src):
                frame["egress"] = DROP
                tally["rx_drop_bad_source"] += 1
                continue
            fdb.learn(shared, src, ingress, worker, now_s, tally)
            last_src = src
            learned_s = now_s
        if is_group(dst):
            if forward_reserved == 0 and is_reserved(dst):
                frame["egress"] = DROP
                tally["rx_drop_reserved"] += 1
                continue
            egress = FLOOD
        elif dst == last_dst:
            egress = last_egress
        else:
            egress = fdb.lookup(
                fdb.bucket_of(shared.fdb, seed, dst), dst, now_s, ageing_s
            )
            if egress == fdb.NOT_FOUND:
                egress = FLOOD
            last_dst = dst
            last_egress = egress
        if egress == FLOOD:
            frame["egress"] = FLOOD
            flooded += 1
            continue
        if egress == ingress:
            frame["egress"] = DROP
            tally["rx_drop_hairpin"] += 1
            continue
        frame["egress"] = egress
        frame["next"] = _NO_FRAME
        forwarded += 1
        if scratch.first[egress] == _NO_FRAME:
            scratch.first[egress] = i
            scratch.egresses[n_egresses] = egress
            n_egresses += 1
        else:
            burst[scratch.last[egress]]["next"] = i
        scratch.last[egress] = i
    scratch.egresses[-1] = n_egresses
    ring["last_src"] = last_src
    ring["last_src_s"] = learned_s
    tally["rx_frames"] += n
    tally["rx_bytes"] += n_bytes
    tally["rx_forwarded"] += forwarded
    tally["rx_flooded"] += flooded
    return flooded


@jit
def _count_malformed(tally: Record, verdict: int) -> None:
    if verdict == BAD_CHAIN:
        tally["rx_drop_bad_chain"] += 1
    elif verdict == TOO_SHORT:
        tally["rx_drop_too_short"] += 1
    elif verdict == TOO_LONG:
        tally["rx_drop_too_long"] += 1
    elif verdict == BAD_HEADER:
        tally["rx_drop_bad_header"] += 1


@jit
def _send_lists(shared: Shared, scratch: Scratch, worker: int, n_egresses: int) -> None:
    """Send every egress port's list, in the order in which the ports came up."""
    for at in range(n_egresses):
        egress = scratch.egresses[at]
        n = 0
        i = scratch.first[egress]
        while i != _NO_FRAME:
            scratch.picked[n] = i
            n += 1
            i = int(scratch.burst[i]["next"])
        scratch.first[egress] = _NO_FRAME
        _transmit(shared, scratch, worker, egress, n)


@jit
def _send_to_all(
    shared: Shared, scratch: Scratch, worker: int, ingress: int, n: int
) -> None:
    """Send to each port its own frames and the flooded ones, in order of arrival.

    A port that is not up gets no flooded frames, and none are counted for it.
    """
    for egress in range(int(shared.header[0]["port_slots"])):
        listed = scratch.first[egress] != _NO_FRAME
        scratch.first[egress] = _NO_FRAME
        floods = egress != ingress and int(shared.ports[egress]["up"]) != 0
        if not listed and not floods:
            continue
        picks = 0
        for i in range(n):
            to = int(scratch.burst[i]["egress"])
            if to == egress or (floods and to == FLOOD):
                scratch.picked[picks] = i
                picks += 1
        _transmit(shared, scratch, worker, egress, picks)


@jit
def _transmit(
    shared: Shared, scratch: Scratch, worker: int, egress: int, n: int
) -> None:
    dispatch.transmit(
        shared.ports,
        shared.rings,
        shared.regions,
        scratch,
        egress,
        worker,
        n,
        shared.counters[worker, egress],
    )
