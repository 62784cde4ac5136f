"""A packet socket's ring in plain memory, and the kernel that fills it.

Written from Documentation/networking/packet_mmap.rst and linux/if_packet.h.
"""

import struct

import numpy as np

BLOCK = 1 << 20
SLOT = 65984
PER_BLOCK = 15
HEADER_LEN = 10
USER, VLAN_VALID, VLAN_TPID_VALID = 1, 1 << 4, 1 << 6


class PacketRing:
    """`size` slots. The kernel's head and the consumer go round independently."""

    def __init__(self, size=5 * PER_BLOCK):
        self.size = size
        self.memory = np.zeros(-(-size // PER_BLOCK) * BLOCK, np.uint8)
        self.head = 0

    @property
    def addr(self):
        return self.memory.ctypes.data

    def begin_at(self, ring, slot):
        """Both sides begin at a slot, as after some use."""
        self.head = ring["next_avail"] = slot

    def slot(self, number):
        """Offset of a slot."""
        return number // PER_BLOCK * BLOCK + number % PER_BLOCK * SLOT

    def status(self, number):
        return struct.unpack_from("<I", self.memory, self.slot(number))[0]

    def fill(self, frame, header=None, tag=None, length=None):
        """Put a frame into the next slot; False if that is not free.

        `tag` is (tpid, tci) of one that was taken out; `length` is more than there is
        room for.
        """
        at = self.slot(self.head)
        if self.status(self.head) != 0:
            return False
        mac = 94
        header = bytes(HEADER_LEN) if header is None else header[:HEADER_LEN]
        body = header + frame
        begin = at + mac - len(header)
        self.memory[begin : begin + len(body)] = np.frombuffer(body, np.uint8)
        status, (tpid, tci) = USER, tag or (0, 0)
        status |= VLAN_VALID | VLAN_TPID_VALID if tag else 0
        fields = (length or len(frame), len(frame), mac, mac + 14, 0, 0, tci, tpid)
        struct.pack_into("<IIHHIIHH", self.memory, at + 4, *fields)
        struct.pack_into("<I", self.memory, at, status)
        self.head = (self.head + 1) % self.size
        return True
