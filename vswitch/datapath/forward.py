"""Decide where the frames of a burst go, then send them port by port.

Two passes on purpose: the first reads each frame's addresses and gives it an egress
port or a verdict; the second copies all frames for one egress with that port's state in
registers and publishes them with one store. A flooded frame is one more copy in every
port's list, in its place among the others, so a pair of stations never sees frames
reordered.

virtio-net has no frame check sequence and neither have we: a frame is forwarded as is.
"""

from typing import Final

from ports import dispatch
from ports.burst import (
    BAD_CHAIN,
    BAD_HEADER,
    BURST_SIZE,
    ETH_SNAPSHOT,
    TOO_LONG,
    TOO_SHORT,
)
from ports.native import Record, jit, load_u64, prefetch_read, store_u64
from ports.views import frame_at, port_at
from vswitch.datapath import fdb
from vswitch.datapath.ethernet import (
    DESTINATION,
    SOURCE,
    is_group,
    is_reserved,
    keep_addresses,
    read_address,
)
from vswitch.datapath.views import header_at, tally_at

# FRAME.egress below zero.
FLOOD: Final = -1
DROP: Final = -2
# To learn an address, or to look for one that nobody has at hand, takes several times as
# long as to forward a small frame, and bursts are how rings share a worker: who invents
# addresses is to have no more than his part. The rest of the burst is not looked at.
_NEW_A_BURST: Final = 8
_NO_PORT: Final = -1
_NO_KEY: Final = 0
_NO_ADDRESS: Final = -1  # differs from whatever a frame may hold


@jit
def forward_burst(ctx: Record, worker: int, ring: Record, n: int, now_s: int) -> None:
    """Send the first `n` frames of the burst, which came in by `ring`, on their way."""
    ingress = int(ring["port"])
    n_egresses, flooded = decide(ctx, worker, ring, n, now_s)
    if flooded == 0:
        _send_lists(ctx, worker, n_egresses)
    else:
        _send_to_all(ctx, worker, ingress, n)


@jit
def _ask_ahead(ctx: Record, seed: int, offset: int, i: int, n: int) -> int:
    """Have the buckets of the frames after the i-th of `n` on their way to the cache.

    `offset` is that of the address within a frame. Returns `n`: nothing is left to ask.
    """
    table = int(ctx["fdb"])
    burst = int(ctx["burst"])
    for k in range(i + 1, n):
        frame = frame_at(burst, k)
        if int(frame["length"]) >= 0:
            key = read_address(int(frame["eth"]), offset)
            prefetch_read(fdb.bucket_of(table, seed, key))
    return n


@jit
def decide(
    ctx: Record, worker: int, ring: Record, n: int, now_s: int
) -> tuple[int, int]:
    """Give each frame an egress; build each egress port's list; count what is dropped.

    Returns:
        How many ports have a list, and how many frames are to be flooded.
    """
    header = header_at(int(ctx["header"]), 0)
    ageing_s = int(header["ageing_s"])
    seed = int(header["hash_seed"])
    forward_reserved = int(header["forward_reserved"])
    ingress = int(ring["port"])
    header_len = int(ring["header_len"])
    tally = tally_at(ctx, worker, ingress)
    burst = int(ctx["burst"])
    heads = int(ctx["heads"])
    counts = int(ctx["counts"])
    egresses = int(ctx["egresses"])
    last_src = _NO_ADDRESS
    last_dst = _NO_ADDRESS  # of a frame before this that went where `listed` says
    listed = _NO_PORT  # the port whose list is at hand: its address, its length
    row = 0
    count = 0
    n_egresses = 0
    room = _NEW_A_BURST
    n_bytes = 0
    forwarded = 0
    flooded = 0
    offloads = 0
    asked_src = 0
    asked_dst = 0
    for i in range(n):
        frame = frame_at(burst, i)
        length = int(frame["length"])
        if length < 0:
            frame["egress"] = DROP
            _count_malformed(tally, length)
            continue
        n_bytes += length
        eth = int(frame["eth"])
        dst = read_address(eth, DESTINATION)
        src = read_address(eth, SOURCE)
        if header_len > 0 and dispatch.asks_for_offload(frame, header_len):
            if not dispatch.accept_offload(ring, ctx, frame, i):
                frame["egress"] = DROP
                tally["rx_drop_bad_header"] += 1
                continue
            offloads += 1
        judged = heads + (i + 1) * ETH_SNAPSHOT
        keep_addresses(judged, dst, src)
        frame["eth"] = judged
        if dst != last_dst or src != last_src:
            last_dst = _NO_ADDRESS
            if src != last_src:
                if src == _NO_KEY or is_group(src):
                    frame["egress"] = DROP
                    tally["rx_drop_bad_source"] += 1
                    continue
                if room > 0:
                    if i > 0 and asked_src == 0:  # nor come from one
                        asked_src = _ask_ahead(ctx, seed, SOURCE, i, n)
                    room -= fdb.learn(ctx, src, ingress, worker, now_s, tally)
                else:
                    tally["fdb_refused"] += 1
                last_src = src
            if is_group(dst):
                if forward_reserved == 0 and is_reserved(dst):
                    frame["egress"] = DROP
                    tally["rx_drop_reserved"] += 1
                    continue
                egress = FLOOD
            else:
                if i > 0 and asked_dst == 0:  # not all frames go to one address
                    asked_dst = _ask_ahead(ctx, seed, DESTINATION, i, n)
                bucket = fdb.bucket_of(int(ctx["fdb"]), seed, dst)
                egress = fdb.lookup(bucket, dst, now_s, ageing_s)
            if egress < 0:  # to all, or not known
                frame["egress"] = FLOOD
                flooded += 1
                continue
            if egress == ingress:
                frame["egress"] = DROP
                tally["rx_drop_hairpin"] += 1
                continue
            if egress != listed:
                if listed != _NO_PORT:
                    store_u64(counts + 8 * listed, count)
                listed = egress
                row = _list_of(ctx, egress)
                count = load_u64(counts + 8 * egress)
                if count == 0:
                    store_u64(egresses + 8 * n_egresses, egress)
                    n_egresses += 1
            last_dst = dst
        frame["egress"] = listed
        store_u64(row + 8 * count, i)
        count += 1
        forwarded += 1
    if listed != _NO_PORT:
        store_u64(counts + 8 * listed, count)
    ctx["offloads"] = offloads
    tally["rx_frames"] += n
    tally["rx_bytes"] += n_bytes
    tally["rx_forwarded"] += forwarded
    tally["rx_flooded"] += flooded
    return n_egresses, flooded


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
def _list_of(ctx: Record, egress: int) -> int:
    """Address of the list of frames for a port."""
    return int(ctx["lists"]) + 8 * BURST_SIZE * egress


@jit
def _send_lists(ctx: Record, worker: int, n_egresses: int) -> None:
    """Send every egress port's list, in the order in which the ports came up."""
    for at in range(n_egresses):
        egress = load_u64(int(ctx["egresses"]) + 8 * at)
        count = int(ctx["counts"]) + 8 * egress
        n = load_u64(count)
        store_u64(count, 0)
        ctx["picked"] = _list_of(ctx, egress)
        dispatch.transmit(ctx, egress, worker, n, tally_at(ctx, worker, egress))


@jit
def _send_to_all(ctx: Record, worker: int, ingress: int, n: int) -> None:
    """Send to each port its own frames and the flooded ones, in order of arrival.

    A port that is not up gets no flooded frames, and none are counted for it.
    """
    for egress in range(int(header_at(int(ctx["header"]), 0)["port_slots"])):
        count = int(ctx["counts"]) + 8 * egress
        listed = load_u64(count) > 0
        store_u64(count, 0)
        up = int(port_at(int(ctx["ports"]), egress)["up"]) != 0
        floods = egress != ingress and up
        if not listed and not floods:
            continue
        picked = _list_of(ctx, egress)
        picks = 0
        for i in range(n):
            to = int(frame_at(int(ctx["burst"]), i)["egress"])
            if to == egress or (floods and to == FLOOD):
                store_u64(picked + 8 * picks, i)
                picks += 1
        ctx["picked"] = picked
        dispatch.transmit(ctx, egress, worker, picks, tally_at(ctx, worker, egress))
