"""Feature bits: what we offer, and the words that users see for them.

Numba-free. A front-end acknowledges every bit that it knows, so nothing is offered
before it works; and since a running guest keeps the bits it acknowledged, a later
version may only ever offer more.
"""

from typing import Final

from ports.vhost import messages, virtio

# UDP segments (USO): Linux has them since 6.2, QEMU since 8.2; older ones do not ask. A
# receiver that has them over one version of IP only gets segments.
RECEIVER_USO: Final = virtio.F_GUEST_USO4 | virtio.F_GUEST_USO6
SENDER_USO: Final = virtio.F_HOST_USO

# What a guest's driver takes that another guest's may send, and the other way round.
#
# Not UDP fragments (UFO, 10 and 14). The header has no room for the identification that
# IPv6 fragments need, so whoever fragments would have to invent one. Linux has sent no
# such frame since 4.14, neither its guests nor its taps, though its guests acknowledge
# both bits to this day. And a bit once offered has to be offered for ever.
RECEIVER: Final = (
    virtio.F_GUEST_CSUM
    | virtio.F_GUEST_TSO4
    | virtio.F_GUEST_TSO6
    | virtio.F_GUEST_ECN
    | RECEIVER_USO
)
SENDER: Final = (
    virtio.F_CSUM
    | virtio.F_HOST_TSO4
    | virtio.F_HOST_TSO6
    | virtio.F_HOST_ECN
    | SENDER_USO
)

OFFERED: Final = (
    RECEIVER
    | SENDER
    | virtio.F_MTU
    | virtio.F_MRG_RXBUF
    | virtio.F_GUEST_ANNOUNCE
    | virtio.F_MQ
    | virtio.F_LOG_ALL
    | virtio.F_ANY_LAYOUT
    | virtio.F_INDIRECT_DESC
    | virtio.F_EVENT_IDX
    | virtio.F_PROTOCOL_FEATURES
    | virtio.F_VERSION_1
    | virtio.F_RING_PACKED
    | virtio.F_IN_ORDER
)
OFFERED_PROTOCOL: Final = (
    messages.PF_MQ
    | messages.PF_LOG_SHMFD
    | messages.PF_RARP
    | messages.PF_REPLY_ACK
    | messages.PF_NET_MTU
    | messages.PF_RESET_DEVICE
    | messages.PF_CONFIGURE_MEM_SLOTS
    | messages.PF_STATUS
)

# virtio 1.2 §5.1.3 and §6, by bit; 26 and 30 are vhost's.
_NAMES: Final = {
    0: "csum",
    1: "guest_csum",
    2: "ctrl_guest_offloads",
    3: "mtu",
    5: "mac",
    7: "guest_tso4",
    8: "guest_tso6",
    9: "guest_ecn",
    10: "guest_ufo",
    11: "host_tso4",
    12: "host_tso6",
    13: "host_ecn",
    14: "host_ufo",
    15: "mrg_rxbuf",
    16: "status",
    17: "ctrl_vq",
    18: "ctrl_rx",
    19: "ctrl_vlan",
    20: "ctrl_rx_extra",
    21: "guest_announce",
    22: "mq",
    23: "ctrl_mac_addr",
    24: "notify_on_empty",
    26: "log_all",
    27: "any_layout",
    28: "indirect_desc",
    29: "event_idx",
    30: "protocol_features",
    32: "version_1",
    33: "access_platform",
    34: "ring_packed",
    35: "in_order",
    36: "order_platform",
    38: "notification_data",
    40: "ring_reset",
    54: "guest_uso4",
    55: "guest_uso6",
    56: "host_uso",
    57: "hash_report",
    60: "rss",
}

# vhost-user: protocol features, by bit.
_PROTOCOL_NAMES: Final = {
    0: "mq",
    1: "log_shmfd",
    2: "rarp",
    3: "reply_ack",
    4: "mtu",
    5: "backend_req",
    6: "cross_endian",
    8: "pagefault",
    9: "config",
    10: "backend_send_fd",
    11: "host_notifier",
    12: "inflight_shmfd",
    13: "reset_device",
    14: "inband_notifications",
    15: "configure_mem_slots",
    16: "status",
    17: "xen_mmap",
    18: "shared_object",
    19: "device_state",
}


def feature_names(mask: int) -> list[str]:
    """Names of the virtio feature bits in `mask`, lowest bit first."""
    return _names(mask, _NAMES)


def protocol_feature_names(mask: int) -> list[str]:
    """Names of the vhost-user protocol feature bits in `mask`, lowest bit first."""
    return _names(mask, _PROTOCOL_NAMES)


def _names(mask: int, names: dict[int, str]) -> list[str]:
    bits = (bit for bit in range(mask.bit_length()) if mask >> bit & 1)
    return [names.get(bit, f"bit_{bit}") for bit in bits]
