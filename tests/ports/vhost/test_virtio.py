"""The one place where the specification's numbers are written as numbers."""

import pytest

from ports.vhost import features, messages, virtio


def layout(dtype):
    return {name: dtype.fields[name][1] for name in dtype.names}


def test_descriptor_is_as_in_virtio_2_7_5():
    assert virtio.DESC_SIZE == 16
    assert layout(virtio.DESC) == {"addr": 0, "len": 8, "flags": 12, "next": 14}
    assert virtio.DESC_F_NEXT == 1
    assert virtio.DESC_F_WRITE == 2
    assert virtio.DESC_F_INDIRECT == 4


def test_available_ring_is_as_in_virtio_2_7_6():
    offsets = (virtio.AVAIL_FLAGS, virtio.AVAIL_IDX, virtio.AVAIL_RING)
    assert offsets == (0, 2, 4)
    assert virtio.AVAIL_F_NO_INTERRUPT == 1
    assert virtio.avail_len(256) == 6 + 2 * 256


def test_used_ring_is_as_in_virtio_2_7_8():
    offsets = (virtio.USED_FLAGS, virtio.USED_IDX, virtio.USED_RING)
    assert offsets == (0, 2, 4)
    assert virtio.USED_ELEM_SIZE == 8
    assert virtio.USED_F_NO_NOTIFY == 1
    assert virtio.used_len(256) == 6 + 8 * 256


def test_largest_queue_is_as_in_virtio_2_7():
    assert virtio.MAX_QUEUE_SIZE == 32768


def test_net_header_is_as_in_virtio_5_1_6():
    assert virtio.NET_HDR_LEN == 12
    assert virtio.NET_HDR_LEN_LEGACY == 10
    assert layout(virtio.NET_HDR) == {
        "flags": 0,
        "gso_type": 1,
        "hdr_len": 2,
        "gso_size": 4,
        "csum_start": 6,
        "csum_offset": 8,
        "num_buffers": 10,
    }


@pytest.mark.parametrize(
    ("mask", "bit", "name"),
    [
        (virtio.F_MTU, 3, "mtu"),
        (virtio.F_MRG_RXBUF, 15, "mrg_rxbuf"),
        (virtio.F_MQ, 22, "mq"),
        (virtio.F_LOG_ALL, 26, "log_all"),
        (virtio.F_ANY_LAYOUT, 27, "any_layout"),
        (virtio.F_INDIRECT_DESC, 28, "indirect_desc"),
        (virtio.F_EVENT_IDX, 29, "event_idx"),
        (virtio.F_PROTOCOL_FEATURES, 30, "protocol_features"),
        (virtio.F_VERSION_1, 32, "version_1"),
        (virtio.F_GUEST_USO4, 54, "guest_uso4"),
        (virtio.F_GUEST_USO6, 55, "guest_uso6"),
        (virtio.F_HOST_USO, 56, "host_uso"),
    ],
)
def test_feature_bits_and_their_names(mask, bit, name):
    assert mask == 1 << bit
    assert features.feature_names(mask) == [name]


@pytest.mark.parametrize(
    ("mask", "bit", "name"),
    [
        (messages.PF_MQ, 0, "mq"),
        (messages.PF_LOG_SHMFD, 1, "log_shmfd"),
        (messages.PF_RARP, 2, "rarp"),
        (messages.PF_REPLY_ACK, 3, "reply_ack"),
        (messages.PF_NET_MTU, 4, "mtu"),
        (messages.PF_BACKEND_REQ, 5, "backend_req"),
        (messages.PF_CONFIG, 9, "config"),
        (messages.PF_CONFIGURE_MEM_SLOTS, 15, "configure_mem_slots"),
        (messages.PF_STATUS, 16, "status"),
    ],
)
def test_protocol_feature_bits_and_their_names(mask, bit, name):
    assert mask == 1 << bit
    assert features.protocol_feature_names(mask) == [name]


def test_names_come_lowest_bit_first_and_unknown_bits_have_one_too():
    mask = virtio.F_VERSION_1 | virtio.F_MRG_RXBUF | 1 << 61
    assert features.feature_names(mask) == ["mrg_rxbuf", "version_1", "bit_61"]
    assert features.feature_names(0) == []
