"""Rows of the shared tables and of a burst, as jitted code sees them."""

from typing import Final

from ports.base import PORT, REDO, REGION, RING
from ports.burst import AIM, FRAME, MESSAGE, SEGMENT
from ports.native import records_at
from ports.uring import REQUEST, RESULT, URING
from ports.xdp_ring import XSK

port_at: Final = records_at(PORT)
ring_at: Final = records_at(RING)
redo_at: Final = records_at(REDO)
region_at: Final = records_at(REGION)
frame_at: Final = records_at(FRAME)
aim_at: Final = records_at(AIM)
segment_at: Final = records_at(SEGMENT)
message_at: Final = records_at(MESSAGE)
xsk_at: Final = records_at(XSK)
uring_at: Final = records_at(URING)
request_at: Final = records_at(REQUEST)
result_at: Final = records_at(RESULT)
