"""Counters of one port as one worker saw it; a reader sums over the workers.

Each received frame is exactly one of rx_forwarded, rx_flooded or one rx_drop_*; each
copy meant for a port is exactly one of its tx_frames or one tx_drop_*. rx is into the
switch, tx is out of it. Field names are the names users see: to add a counter, add a
row here and one increment where it happens.

Writer: the worker that owns the row, and nobody else, so there are no atomics.
"""

from typing import Final

import numpy as np

NAMES: Final = (
    "rx_frames",
    "rx_bytes",
    "rx_forwarded",
    "rx_flooded",
    "rx_drop_bad_chain",  # descriptors that break the spec, or no room for a header
    "rx_drop_too_short",  # less than an Ethernet header
    "rx_drop_bad_header",  # asks for an offload that was not negotiated
    "rx_drop_too_long",  # more bytes or segments than we carry
    "rx_drop_bad_source",  # source address is zero or a group address
    "rx_drop_reserved",  # 01:80:c2:00:00:0x while reserved addresses are not forwarded
    "rx_drop_hairpin",  # destination lives behind the ingress port
    "rx_drop_disabled",  # taken from a ring that the front-end disabled
    "tx_frames",
    "tx_bytes",
    "tx_drop_ring_full",  # the guest offers no buffers (or the tap's queue is full)
    "tx_drop_not_ready",  # no driver behind the port
    "tx_drop_too_long",  # larger than the guest's buffers or the port's MTU
    "tx_drop_bad_chain",  # receive buffers that break the spec
    "tx_drop_lock_busy",  # another worker held the ring for too long
    "tx_drop_link_down",  # the tap interface is down or gone
    "tx_drop_bad_offload",  # cannot be segmented: its bytes are not what its header says
    "tx_drop_gso_limit",  # a burst would be cut into too many segments; see `offload`
    # A frame that had to be segmented for this port is one copy but many tx_*: copies =
    # tx_frames + tx_drop_* - tx_gso_segments + tx_gso_split.
    "tx_gso_split",  # frames that were segmented
    "tx_gso_segments",  # what they were cut into
    # Not part of the ledger.
    "tx_csum_completed",  # checksums completed for a receiver that cannot
    "fdb_learned",
    "fdb_moved",
    # Source not learned: the port is at its limit, or the burst brought too many before.
    "fdb_refused",
    "fdb_evicted",
    "fdb_expired",
    "calls",  # interrupts sent to the guest
    "broken_rings",
)

# 64-byte multiples keep two workers' rows off one cache line.
_PAD: Final = -len(NAMES) % 8

COUNTERS: Final = np.dtype(
    [(name, "<i8") for name in NAMES] + [("pad", "<i8", (_PAD,))] * bool(_PAD)
)
