import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ports.errors import ProtocolError
from ports.vhost.messages import (
    HEADER_LEN,
    RULES,
    U64,
    Config,
    Header,
    Log,
    MemoryRegion,
    MemTable,
    Request,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
    check_request,
    decode_header,
    decode_payload,
    decode_reply,
    encode_reply,
    encode_request,
    request_name,
)

pytestmark = pytest.mark.skipif(
    sys.byteorder != "little", reason="golden bytes are little-endian"
)

REGION = MemoryRegion(0x1000, 0x2000, 0x7F00_0000_0000, 0x3000)
REGION_BYTES = (
    "0010000000000000"  # guest address
    "0020000000000000"  # size
    "00000000007f0000"  # front-end address
    "0030000000000000"  # offset in the file
)
ADDR_BYTES = (
    "01000000"  # ring
    "01000000"  # flags
    "1000000000000000"  # descriptor table
    "2000000000000000"  # used ring
    "3000000000000000"  # available ring
    "4000000000000000"  # log
)

# request, payload, the payload's bytes
GOLDEN = [
    (Request.SET_FEATURES, U64(0x1_4000_0000), "0000004001000000"),
    (Request.SET_PROTOCOL_FEATURES, U64(0x801F), "1f80000000000000"),
    (Request.GET_FEATURES, None, ""),
    (Request.SET_OWNER, None, ""),
    (Request.SET_VRING_NUM, VringState(3, 256), "0300000000010000"),
    (Request.GET_VRING_BASE, VringState(1, 0), "0100000000000000"),
    (Request.SET_VRING_ENABLE, VringState(2, 1), "0200000001000000"),
    (Request.SET_VRING_KICK, VringFd(5, has_fd=True), "0500000000000000"),
    (Request.SET_VRING_CALL, VringFd(5, has_fd=False), "0501000000000000"),
    (
        Request.SET_VRING_ADDR,
        VringAddr(1, 1, desc=0x10, used=0x20, avail=0x30, log=0x40),
        ADDR_BYTES,
    ),
    (
        Request.SET_MEM_TABLE,
        MemTable((REGION, REGION)),
        "0200000000000000" + 2 * REGION_BYTES,
    ),
    (Request.SET_MEM_TABLE, MemTable(()), "0000000000000000"),
    (Request.ADD_MEM_REG, SingleRegion(REGION), "0000000000000000" + REGION_BYTES),
    (Request.SET_LOG_BASE, Log(0x2000, 0x10), "00200000000000001000000000000000"),
    (Request.SEND_RARP, U64(0x5634_1200_5452), "5254001234560000"),
    (Request.NET_SET_MTU, U64(1500), "dc05000000000000"),
    (
        Request.SET_CONFIG,
        Config(offset=6, flags=1, data=b"\x01\x00"),
        "0600000002000000010000000100",
    ),
    (Request.SET_STATUS, U64(0xF), "0f00000000000000"),
]


def header_bytes(request, flags, size):
    return b"".join(n.to_bytes(4, "little") for n in (request, flags, size))


@pytest.mark.parametrize(("request_id", "payload", "golden"), GOLDEN)
def test_request_has_the_bytes_of_the_specification(request_id, payload, golden):
    body = bytes.fromhex(golden)
    plain = header_bytes(request_id, 0x1, len(body)) + body
    assert encode_request(request_id, payload) == plain
    acked = header_bytes(request_id, 0x9, len(body)) + body
    assert encode_request(request_id, payload, need_reply=True) == acked
    assert decode_payload(request_id, body) == payload


@pytest.mark.parametrize(
    ("request_id", "payload", "golden"),
    [
        (Request.GET_FEATURES, U64(0x1_4000_0000), "0000004001000000"),
        (Request.GET_QUEUE_NUM, U64(4), "0400000000000000"),
        (Request.GET_VRING_BASE, VringState(1, 77), "010000004d000000"),
        (Request.SET_MEM_TABLE, U64(0), "0000000000000000"),
        (Request.SET_LOG_BASE, Log(0x2000, 0), "00200000000000000000000000000000"),
        (Request.RESET_DEVICE, U64(1), "0100000000000000"),
    ],
)
def test_reply_has_the_bytes_of_the_specification(request_id, payload, golden):
    body = bytes.fromhex(golden)
    data = header_bytes(request_id, 0x5, len(body)) + body
    assert encode_reply(request_id, payload) == data
    assert decode_reply(request_id, data) == payload


u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
regions = st.builds(MemoryRegion, u64, u64, u64, u64)
PAYLOADS = {
    None: st.none(),
    U64: st.builds(U64, u64),
    VringState: st.builds(VringState, u32, u32),
    VringAddr: st.builds(VringAddr, u32, u32, u64, u64, u64, u64),
    MemTable: st.builds(MemTable, st.lists(regions, max_size=32).map(tuple)),
    SingleRegion: st.builds(SingleRegion, regions),
    VringFd: st.builds(VringFd, st.integers(0, 255), st.booleans()),
    Log: st.builds(Log, u64, u64),
    Config: st.builds(Config, u32, u32, st.binary(max_size=256)),
}


@given(st.data())
def test_every_request_survives_the_round_trip(data):
    request, rule = data.draw(st.sampled_from(sorted(RULES.items())))
    payload = data.draw(PAYLOADS[rule.payload])
    message = encode_request(request, payload)
    header = decode_header(message[:HEADER_LEN])
    check_request(header)
    assert header == Header(request, 1, len(message) - HEADER_LEN)
    assert decode_payload(request, message[HEADER_LEN:]) == payload


@given(st.sampled_from(sorted(RULES)), st.binary(max_size=100))
def test_arbitrary_payloads_are_read_or_refused(request, data):
    try:
        payload = decode_payload(request, data)
    except ProtocolError:
        pass
    else:
        assert len(encode_request(request, payload)) == HEADER_LEN + len(data)


@pytest.mark.parametrize(
    ("request_id", "size"),
    [
        (Request.GET_FEATURES, 1),
        (Request.SET_FEATURES, 0),
        (Request.SET_FEATURES, 7),
        (Request.SET_VRING_NUM, 9),
        (Request.SET_VRING_ADDR, 32),
        (Request.SET_MEM_TABLE, 4),
        (Request.SET_MEM_TABLE, 8 + 31),
        (Request.ADD_MEM_REG, 32),
        (Request.SET_CONFIG, 11),
        (Request.SET_CONFIG, 13),
    ],
)
def test_wrong_size_is_refused(request_id, size):
    with pytest.raises(ProtocolError, match=f"{request_id.name}: payload has"):
        decode_payload(request_id, bytes(size))


def test_memory_table_shorter_than_its_count_is_refused():
    body = bytes.fromhex("0300000000000000" + 2 * REGION_BYTES)
    with pytest.raises(ProtocolError, match="72 bytes, not 104 for 3 regions"):
        decode_payload(Request.SET_MEM_TABLE, body)


def test_memory_table_with_an_absurd_count_is_refused():
    with pytest.raises(ProtocolError, match="4294967295 regions"):
        decode_payload(Request.SET_MEM_TABLE, bytes.fromhex("ffffffff00000000"))


def test_unknown_request_is_refused_and_has_a_name_for_the_log():
    with pytest.raises(ProtocolError, match="request 77: not known"):
        decode_payload(77, b"")
    assert request_name(8) == "SET_VRING_NUM"


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (Header(1, 0x0, 0), "version 0"),
        (Header(1, 0x2, 0), "version 2"),
        (Header(1, 0x5, 0), "is a reply"),
        (Header(1, 0x1, 4097), "4097 bytes, more than 4096"),
        (Header(1, 0x1, 0xFFFF_FFFF), "more than 4096"),
    ],
)
def test_header_that_derails_the_stream_is_refused(header, match):
    with pytest.raises(ProtocolError, match=match):
        check_request(header)


def test_unknown_flags_in_a_request_are_ignored():
    check_request(Header(1, 0xFFFF_FFF1 & ~0x4, 0))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x01", "reply has 1 bytes"),
        (encode_reply(Request.GET_QUEUE_NUM, U64(1)), "reply is to GET_QUEUE_NUM"),
        (encode_request(Request.GET_FEATURES, U64(1)), "flags 0x1, not 0x5"),
        (encode_reply(Request.GET_FEATURES, U64(1))[:-1], "7 bytes, not 8"),
        (encode_reply(Request.GET_FEATURES, VringAddr(0, 0, 0, 0, 0, 0)), "40 bytes"),
    ],
)
def test_malformed_reply_is_refused(data, match):
    with pytest.raises(ProtocolError, match=match):
        decode_reply(Request.GET_FEATURES, data)
