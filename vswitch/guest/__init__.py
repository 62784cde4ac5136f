"""A guest in Python: the driver side of vhost-user and virtio-net.

For tests, the demo, the traffic generator, and programs that want a port on the switch
without a virtual machine. Written from the specifications, and knows nothing of the
switch's own half, so that a mistake there is not repeated here.
"""

from vswitch.guest.errors import GuestError
from vswitch.guest.guest import DEFAULT_FEATURES, Guest
from vswitch.guest.header import OFFLOADS, NetHeader
from vswitch.guest.layout import Shape

__all__ = ["DEFAULT_FEATURES", "OFFLOADS", "Guest", "GuestError", "NetHeader", "Shape"]
