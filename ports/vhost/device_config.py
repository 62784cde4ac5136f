"""The device's configuration space, for front-ends that keep none of their own.

QEMU does, and warns when it is offered another; so a port offers it only when told to.
Whatever lies behind the fields that we know reads as zeroes. virtio 1.2 §5.1.4.
"""

from typing import Final

import numpy as np

from ports.errors import ProtocolError
from ports.vhost import virtio
from ports.vhost.messages import Config

MAX_LEN: Final = 256  # vhost-user: Virtio device config space
_DEFAULT_MTU: Final = 1500
_MAC: Final = 6


class DeviceConfig:
    """One device's; `mtu` None is Ethernet's."""

    def __init__(self, max_pairs: int, mtu: int | None = None) -> None:
        record = np.zeros(1, virtio.NET_CONFIG)
        record["status"] = virtio.NET_S_LINK_UP
        record["max_virtqueue_pairs"] = max_pairs
        # Drivers refuse a device whose MTU is 0 where the bit is offered.
        record["mtu"] = mtu or _DEFAULT_MTU
        record["speed"] = virtio.NET_SPEED_UNKNOWN
        record["duplex"] = virtio.NET_DUPLEX_UNKNOWN
        self.content = bytearray(record.tobytes().ljust(MAX_LEN, b"\0"))

    def read(self, wanted: Config) -> Config:
        """As many bytes as the request has, from its offset on.

        Raises:
            ProtocolError: They are not all within the space, or none are wanted.
        """
        end = _end(wanted)
        return Config(
            wanted.offset, wanted.flags, bytes(self.content[wanted.offset : end])
        )

    def write(self, given: Config) -> None:
        """Take an address for the device, which is all that a driver may write.

        Raises:
            ProtocolError: It is something else.
        """
        end = _end(given)
        if end > _MAC:
            raise ProtocolError(f"bytes {given.offset} to {end} cannot be written")
        self.content[given.offset : end] = given.data


def _end(piece: Config) -> int:
    end = piece.offset + len(piece.data)
    if not piece.data or end > MAX_LEN:
        text = f"{len(piece.data)} bytes from {piece.offset} on of {MAX_LEN}"
        raise ProtocolError(text)
    return end
