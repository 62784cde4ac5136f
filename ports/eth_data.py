"""Data half of an eth port: frames in the ring of a packet socket.

A received frame is described where the kernel put it, and its slot goes back when the
burst is released. Between the two a worker may die: the slots are still ours then, and
the heir takes the burst again from the recorded position. A transmitted burst is one
system call, straight from the senders' buffers.

A virtio-net header comes and goes with each frame, as with a tap. A VLAN tag that the
kernel took out of a frame is put back in, in a copy of the frame's head: the slot stays
as it was, or an heir would put it in twice.

There is no transmit ring: a frame would be copied into it as it is now copied by the
kernel, and on its way to a peer on this machine once more (`skb_orphan_frags`). And the
queueing discipline is not bypassed: what bypasses it is dropped where the driver's queue
is full, and super-frames are where the device cannot cut them (`__dev_direct_xmit`).
"""

import errno
from typing import Final

from ports import gathered, offload
from ports.burst import (
    ADDRESSES_LEN,
    BAD_HEADER,
    BURST_SIZE,
    ETH_SNAPSHOT,
    HEADER_SLOT,
    MAX_FRAME,
    MAX_TARGETS,
    MESSAGE,
    MIN_FRAME,
    SEGMENT,
    TOO_LONG,
    TOO_SHORT,
)
from ports.native import (
    Record,
    copy_bytes,
    jit,
    load_acquire_u64,
    load_u16,
    load_u32,
    load_u64,
    sendmmsg_fd,
    store_any_u16,
    store_release_u32,
)
from ports.packet_ring import (
    BLOCK,
    MAC,
    SLOT,
    SLOTS_PER_BLOCK,
    SNAPLEN,
    TP_STATUS_KERNEL,
    TP_STATUS_USER,
    TP_STATUS_VLAN_VALID,
    VLAN_TCI,
    VLAN_TPID,
    VNET_HDR_LEN,
)
from ports.views import frame_at, message_at, segment_at

_SEGMENT_SIZE: Final = SEGMENT.itemsize
_MESSAGE_SIZE: Final = MESSAGE.itemsize

_TAG: Final = 4
_ETHERTYPE: Final = 12
_VLAN: Final = 0x8100
_U32: Final = 0xFFFFFFFF
_EAGAIN: Final = errno.EAGAIN
_EINVAL: Final = errno.EINVAL
_EMSGSIZE: Final = errno.EMSGSIZE
_ENOBUFS: Final = errno.ENOBUFS
_ENOMEM: Final = errno.ENOMEM


# --- receive ---


@jit
def receive(ring: Record, ctx: Record) -> int:
    """Describe up to a burst of frames; return how many."""
    memory = int(ring["desc"])
    size = int(ring["size"])
    position = int(ring["next_avail"])
    features = int(ring["features"])
    for i in range(BURST_SIZE):
        at = position + i
        slot = _slot_at(memory, at if at < size else at - size)
        # Pairs with the kernel's write of the status: the slot is complete once we have
        # seen it is ours. Status and length are one word.
        word = load_acquire_u64(slot)
        if word & TP_STATUS_USER == 0:
            return i
        frame = frame_at(int(ctx["burst"]), i)
        frame["offload"] = 0
        length = load_u32(slot + SNAPLEN)
        if length < MIN_FRAME:
            frame["length"] = TOO_SHORT
            continue
        if length < (word >> 32) & _U32 or length > MAX_FRAME:
            frame["length"] = TOO_LONG
            continue
        eth = slot + load_u16(slot + MAC)
        if offload.asks(eth - VNET_HDR_LEN):
            offload.begin(eth - VNET_HDR_LEN, eth, length)
        if word & TP_STATUS_VLAN_VALID == 0:
            frame["addr"] = eth
            frame["eth"] = eth
            frame["length"] = length
            frame["segments"] = 1
        else:
            _describe_tagged(ctx, frame, i, slot, length, features)
    return BURST_SIZE


@jit
def _describe_tagged(
    ctx: Record,
    frame: Record,
    i: int,
    slot: int,
    length: int,
    features: int,
) -> None:
    """Describe a frame whose tag is in the slot's header: a head of ours, and the rest."""
    eth = slot + load_u16(slot + MAC)
    head = int(ctx["heads"]) + (i + 1) * ETH_SNAPSHOT
    if length + _TAG > MAX_FRAME:
        frame["length"] = TOO_LONG
        return
    header = eth - VNET_HDR_LEN
    if offload.asks(header):
        clean = int(ctx["headers"]) + i * HEADER_SLOT
        if not offload.accept(frame, length, header, features, clean):
            frame["length"] = BAD_HEADER
            return
        offload.shift(clean, _TAG)
    copy_bytes(head, eth, ADDRESSES_LEN)
    _store_big16(head + _ETHERTYPE, load_u16(slot + VLAN_TPID))
    _store_big16(head + _ETHERTYPE + 2, load_u16(slot + VLAN_TCI))
    first = 2 * i
    opening = segment_at(int(ctx["segments"]), first)
    opening["addr"] = head
    opening["len"] = ADDRESSES_LEN + _TAG
    rest = segment_at(int(ctx["segments"]), first + 1)
    rest["addr"] = eth + ADDRESSES_LEN
    rest["len"] = length - ADDRESSES_LEN
    frame["addr"] = eth
    frame["eth"] = head
    frame["length"] = length + _TAG
    frame["segments"] = 2
    frame["first_segment"] = first


@jit
def release(ring: Record, n: int) -> None:
    """Give the slots of the last `n` frames back to the kernel."""
    memory = int(ring["desc"])
    size = int(ring["size"])
    position = int(ring["next_avail"])
    for _ in range(n):
        store_release_u32(_slot_at(memory, position), TP_STATUS_KERNEL)
        position = position + 1 if position + 1 < size else 0
    ring["next_avail"] = position


@jit
def has_frame(ring: Record) -> bool:
    """Whether the next slot is ours."""
    slot = _slot_at(int(ring["desc"]), int(ring["next_avail"]))
    return load_acquire_u64(slot) & TP_STATUS_USER != 0


@jit
def resync(ring: Record) -> None:
    """Find the position again where a worker died between giving back and saying so.

    Behind slots that went back are others that are ours. Otherwise the kernel is about
    to fill the next slot, and does so before any behind it: hence the second look.
    """
    memory = int(ring["desc"])
    size = int(ring["size"])
    position = int(ring["next_avail"])
    for k in range(size):
        at = position + k if position + k < size else position + k - size
        if load_acquire_u64(_slot_at(memory, at)) & TP_STATUS_USER:
            if not has_frame(ring):
                ring["next_avail"] = at
            return


@jit
def _slot_at(memory: int, slot: int) -> int:
    block = slot // SLOTS_PER_BLOCK
    return memory + block * BLOCK + (slot - block * SLOTS_PER_BLOCK) * SLOT


# --- transmit ---


@jit
def transmit(port: Record, ring: Record, ctx: Record, n: int, tally: Record) -> int:
    """Send the `n` picked frames; return how many the kernel took.

    It judges by itself what is too long for the interface, except for super-frames.
    """
    fd = int(ring["kick_fd"])
    max_frame = int(port["max_frame"])
    arrived = 0
    messages = 0
    row = 0
    for k in range(n):
        frame = frame_at(int(ctx["burst"]), load_u64(int(ctx["picked"]) + 8 * k))
        if offload.is_cut(frame) and _is_too_long(ctx, frame, max_frame):
            tally["tx_drop_too_long"] += 1
            continue
        if row + 2 + int(frame["segments"]) > MAX_TARGETS:
            arrived += _send(fd, ctx, messages, tally)
            messages = 0
            row = 0
        message = message_at(int(ctx["messages"]), messages)
        message["pieces"] = int(ctx["targets"]) + row * _SEGMENT_SIZE
        header = int(ctx["message_headers"]) + messages * HEADER_SLOT
        length = int(frame["length"])
        behind = gathered.gather(ctx, frame, length, header, VNET_HDR_LEN, row)
        message["n_pieces"] = behind - row
        row = behind
        messages += 1
    arrived += _send(fd, ctx, messages, tally)
    tally["tx_frames"] += arrived
    return arrived


@jit
def _is_too_long(ctx: Record, frame: Record, max_frame: int) -> bool:
    """Whether a super-frame's segments would be; a tag is in addition to the MTU."""
    if offload.ethertype(ctx, frame) == _VLAN:
        max_frame += _TAG
    return offload.segment_length(ctx, frame) > max_frame


@jit
def _send(fd: int, ctx: Record, count: int, tally: Record) -> int:
    """Send messages and count what becomes of each; return how many the kernel took."""
    messages = int(ctx["messages"])
    at = 0
    arrived = 0
    while at < count:
        got = sendmmsg_fd(fd, messages + at * _MESSAGE_SIZE, count - at)
        if got > 0:
            for k in range(at, at + got):
                sent = int(message_at(messages, k)["sent"])
                tally["tx_bytes"] += sent - VNET_HDR_LEN
            arrived += got
            at += got
            continue
        at += 1
        if got in (-_EAGAIN, -_ENOBUFS, -_ENOMEM):
            tally["tx_drop_ring_full"] += 1
        elif got == -_EMSGSIZE:
            tally["tx_drop_too_long"] += 1
        elif got == -_EINVAL:
            tally["tx_drop_bad_offload"] += 1
        else:
            tally["tx_drop_link_down"] += 1
    return arrived


@jit
def _store_big16(addr: int, value: int) -> None:
    store_any_u16(addr, (value & 0xFF) << 8 | value >> 8)
