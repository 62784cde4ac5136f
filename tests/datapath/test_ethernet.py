"""Addresses as numbers, against bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswitch.datapath import ethernet

ADDRESSES = st.binary(min_size=6, max_size=6)


def number(address):
    return int.from_bytes(address, "little")


@given(ADDRESSES, ADDRESSES, st.binary(min_size=2, max_size=2), st.integers(0, 7))
def test_addresses_are_read_at_any_alignment(dst, src, ethertype, offset):
    # Beyond the smallest frame there may be no memory to read.
    memory = np.frombuffer(bytes(offset) + dst + src + ethertype, np.uint8)
    frame = memory.ctypes.data + offset
    assert ethernet.read_address(frame, ethernet.DESTINATION) == number(dst)
    assert ethernet.read_address(frame, ethernet.SOURCE) == number(src)


@given(ADDRESSES)
def test_the_first_bit_on_the_wire_marks_a_group(address):
    assert ethernet.is_group(number(address)) == bool(address[0] & 1)


@given(ADDRESSES)
def test_no_other_address_is_reserved(address):
    reserved = address[:5] == b"\x01\x80\xc2\x00\x00" and address[5] < 16
    assert ethernet.is_reserved(number(address)) == reserved


@pytest.mark.parametrize("last", [0x00, 0x0E, 0x0F, 0x10, 0x80])
@pytest.mark.parametrize("changed", [0, 1, 2, 3, 4, None])
def test_sixteen_addresses_are_reserved(last, changed):
    address = bytearray(b"\x01\x80\xc2\x00\x00") + bytes([last])
    if changed is not None:
        address[changed] ^= 0x10
    reserved = changed is None and last < 16
    assert ethernet.is_reserved(number(address)) == reserved
