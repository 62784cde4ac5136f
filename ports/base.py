"""Shared records that describe ports, and what every port kind has in common.

Numba-free. The manager writes the control fields, workers the rest; each field says so.
All addresses and fd numbers in these records are valid in every worker.
"""

from typing import Final

import numpy as np

MAX_PORTS: Final = 256
MAX_PAIRS: Final = 8  # queue pairs a port
RINGS_PER_PORT: Final = 2 * MAX_PAIRS
MAX_REGIONS: Final = 32  # rows of one memory table
# Behind them the row of the log of written pages, virtually a region of its own.
LOG_ROW: Final = MAX_REGIONS
TABLE_ROWS: Final = MAX_REGIONS + 1

# PORT.kind
KIND_NONE: Final = 0
KIND_VHOST_USER: Final = 1
KIND_TAP: Final = 2
KIND_ETH: Final = 3
KIND_XDP: Final = 4
KIND_VHOST_NET: Final = 5  # a tap whose frames come and go by the kernel's vhost

# PORT.backend, of a tap
BACKEND_PLAIN: Final = 0
BACKEND_URING: Final = 1

# Ring n of a port is virtqueue n of its device (virtio 1.2 §5.1.2): even ones are the
# guest's receive queues, which we transmit into; odd ones its transmit queues, which we
# receive from. A tap or an interface has a pair for each worker in the same places.
TX: Final = 0
RX: Final = 1

# RING.state. Manager: STOPPED -> STARTING, any -> STOPPED. Owner: STARTING -> RUNNING,
# RUNNING -> BROKEN.
RING_STOPPED: Final = 0
RING_STARTING: Final = 1
RING_RUNNING: Final = 2
RING_BROKEN: Final = 3

NO_FD: Final = -1

RING: Final = np.dtype(
    [
        # Written by the manager while the ring is stopped and every worker knows it,
        # except state, enabled, owner, logged and the fds, which may change at any time.
        ("state", "<i8"),
        ("enabled", "<i8"),  # 0 or 1
        ("logged", "<i8"),  # 1: what we write to the ring is marked in the log
        ("owner", "<i8"),  # worker that polls it (rx), starts and repairs it (both)
        ("port", "<i8"),
        ("shared", "<i8"),  # 1: several workers may put into it, so take the lock
        ("size", "<i8"),  # entries; a power of two where split; frame slots of eth
        ("header_len", "<i8"),  # bytes of virtio-net header, 12 or 10
        ("features", "<i8"),  # negotiated virtio feature bits
        # For the log of written pages: addresses of the guest's.
        ("log_used", "<i8"),  # the used ring; packed: the device's event area
        ("log_desc", "<i8"),  # the descriptor table
        # Our addresses of the three parts; packed: ring, driver's and device's events;
        # eth: the packet socket's ring and nothing; xdp: an XSK record and nothing.
        ("desc", "<i8"),
        ("avail", "<i8"),
        ("used", "<i8"),
        # What a sleeping worker waits for; the tap's queue or packet socket itself for
        # those, which is what we transmit into as well.
        ("kick_fd", "<i8"),
        ("call_fd", "<i8"),
        ("err_fd", "<i8"),
        ("packed", "<i8"),  # 1: packed, 0: split
        ("number", "<i8"),  # of this row, to find its REDO rows
        # Written by the worker that polls it, or by whoever holds the lock.
        ("lock", "<i8"),  # 0 free, else worker number + 1
        # Split: free-running, modulo 2**16. Packed: an index and the lap in bit 15. Eth:
        # the slot to be looked at next.
        ("next_avail", "<i8"),
        ("next_used", "<i8"),
        ("signalled_used", "<i8"),  # next_used at the last call check; -1: call first
        ("redo", "<i8"),  # packed: REDO rows that are being written to the ring
        ("data_pad", "<i8", (8,)),
    ]
)

# What is written to a packed ring to give a batch back; REDO_ROWS rows a ring.
REDO_ROWS: Final = 128
REDO: Final = np.dtype([("addr", "<i8"), ("word", "<i8")])

REGION: Final = np.dtype(
    [
        ("gpa", "<i8"),  # guest-physical address of the first byte
        ("size", "<i8"),  # bytes
        ("addr", "<i8"),  # where every worker has it mapped
        ("frontend_va", "<i8"),  # the front-end's address, used only at set-up
    ]
)

PORT: Final = np.dtype(
    [
        # Written by the manager.
        ("kind", "<i8"),  # KIND_*
        ("up", "<i8"),  # 1: takes part in forwarding
        ("pairs", "<i8"),  # enabled queue pairs that we may transmit into
        ("regions", "<i8"),  # first row in REGION << 8 | number of rows, one store
        ("max_frame", "<i8"),  # longest frame we may transmit, bytes
        ("max_addresses", "<i8"),
        ("offloads", "<i8"),  # F_GUEST_* that the receiver behind the port takes
        ("backend", "<i8"),  # BACKEND_*
        # Written by workers, atomically.
        ("addresses", "<i8"),  # learned addresses behind this port
        # Written by the manager: frames that the kernel had no room for.
        ("missed", "<i8"),
        # Written by the manager, vhost-user: the serial number of the last message that was
        # read; -1: a part of one was.
        ("heard", "<i8"),
        ("data_pad", "<i8", (5,)),
    ]
)
