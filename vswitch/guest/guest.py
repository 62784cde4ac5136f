"""A guest with one network device: frames in, frames out, as bytes or arrays.

    with Guest.connect("vm1.sock") as guest:
        guest.send(frame)
        for frame in guest.receive(timeout=1.0):
            ...

Life: open -> (stop -> start | reset)* -> disconnect -> open again ... -> close. Memory,
rings and what is in them survive everything but reset and close, as in a real guest
whose front-end reconnects.

Not thread-safe as a whole; one thread may send while another receives.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ports.native import records_at
from ports.vhost import virtio
from vswitch.guest.layout import Shape

__all__ = ["DEFAULT_FEATURES", "Guest", "records_at"]

DEFAULT_FEATURES: Final = (
    virtio.F_VERSION_1
    | virtio.F_MRG_RXBUF
    | virtio.F_INDIRECT_DESC
    | virtio.F_EVENT_IDX
    | virtio.F_MQ
    | virtio.F_PROTOCOL_FEATURES
)

Frames = bytes | Sequence[bytes] | np.ndarray[Any, np.dtype[np.uint8]]

_PLAIN: Final = Shape()
_MAX_FRAME: Final = 65536 + 64
_ROOM: Final = 4 << 20  # bytes copied out of the rings at a time
_BURST: Final = 1024
