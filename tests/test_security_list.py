"""Each known attack on a vhost-user back-end, and the tests that show it comes to nothing.

S: by the front-end's socket. R: by the guest's rings. CVE: what others had. Beside them
defects of others that have no number. What is named here exists; that it runs is the
tests' own affair.
"""

import importlib
import re

import pytest

ATTACKS = "conformance/test_attacks"
BAD_INPUT = "system/test_bad_input"
CHANNEL = "ports/vhost/test_channel"
FRAMING = "conformance/test_framing"
HOSTILE = "datapath/test_hostile"
LIFECYCLE = "conformance/test_lifecycle"
MEMORY = "conformance/test_memory"
MIGRATION = "conformance/test_migration"
NEGOTIATION = "conformance/test_negotiation"
NOTIFICATIONS = "conformance/test_notifications"
OFFLOAD = "datapath/test_offload"
PACKED = "datapath/test_packed"
RECEIVE = "conformance/test_receive"
SCRIBBLED = "datapath/test_scribbled"
SESSION = "ports/vhost/test_session"
SPLIT = "datapath/test_split"
SPLIT_PUT = "datapath/test_split_put"
TRANSMIT = "conformance/test_transmit"

SURPLUS = (
    f"{FRAMING}::test_18_descriptors_that_do_not_belong_are_closed",
    f"{SESSION}::test_surplus_descriptors_are_refused_and_closed",
)
REPEATED = (
    f"{ATTACKS}::test_whatever_is_repeated_takes_the_place_of_what_was_there",
    f"{MEMORY}::test_22_the_same_table_again_maps_nothing_and_leaks_nothing",
)
NOT_OFFERED = (
    f"{FRAMING}::test_14_every_message_that_wants_a_reply_gets_one",
    f"{SESSION}::test_request_that_was_not_offered_is_answered_or_ends_the_session",
)
REGIONS_APART = (
    f"{SPLIT}::test_a_buffer_across_two_regions_is_cut_in_two",
    f"{HOSTILE}::test_take_describes_nothing_but_the_guests_memory",
    f"{HOSTILE}::test_put_writes_nothing_but_the_guests_memory",
)
TRUNCATED = (
    f"{MEMORY}::test_30_memory_that_is_truncated_takes_down_only_its_port",
    f"{ATTACKS}::test_a_log_that_is_truncated_takes_down_only_its_port",
)
BAD_LOG = (
    f"{MIGRATION}::test_74_a_log_that_is_too_small_is_refused_and_none_is_overrun",
)
LOOPS = (
    f"{SPLIT}::test_a_malformed_chain_is_returned_and_counted",
    f"{PACKED}::test_a_chain_without_an_end_breaks_only_its_ring",
    f"{PACKED}::test_a_receive_chain_without_an_end_breaks_only_its_ring",
    "system/test_bad_rings::test_chains_that_hold_no_frame_are_counted_and_given_back",
)
JUMPS = (
    f"{SPLIT}::test_an_available_index_that_jumps_breaks_the_ring",
    f"{SPLIT_PUT}::test_an_available_index_that_jumps_breaks_the_ring",
    f"{TRANSMIT}::test_54_indexes_that_make_no_sense_break_the_ring",
)
READ_ONCE = (
    f"{TRANSMIT}::test_55_bytes_that_change_meanwhile_were_judged_or_do_not_arrive",
)
LYING_HEADERS = (
    f"{TRANSMIT}::test_59_a_header_that_lies_is_dropped_and_a_mark_is_cleaned",
    f"{OFFLOAD}::test_a_header_that_lies_is_refused_and_counted",
    f"{OFFLOAD}::test_a_header_that_lies_of_a_datagram_is_refused_and_counted",
)
NO_LENGTH = (f"{TRANSMIT}::test_53_a_chain_that_holds_no_frame_is_given_back",)
TABLES = (
    f"{TRANSMIT}::test_52_indirect_tables",
    f"{SPLIT}::test_a_malformed_chain_is_returned_and_counted",
    f"{PACKED}::test_a_malformed_chain_is_returned_and_counted",
)
HEADERS_IN_PIECES = (
    f"{TRANSMIT}::test_51_a_header_may_be_apart_or_glued_or_in_pieces",
    f"{SPLIT}::test_a_header_may_be_spread_over_any_descriptors",
    *NO_LENGTH,
)
NO_SUCH_RING = (
    f"{LIFECYCLE}::test_48_a_ring_that_does_not_exist_is_refused",
    f"{SESSION}::test_ring_that_does_not_exist_is_refused",
    f"{SESSION}::test_descriptor_for_a_ring_that_does_not_exist_is_refused",
)
RING_PLACES = (
    f"{BAD_INPUT}::test_a_ring_outside_of_memory_never_starts_and_says_why",
    f"{SESSION}::test_unaligned_ring_is_refused",
    f"{SESSION}::test_ring_that_ends_outside_memory_does_not_run_and_says_so",
    f"{SESSION}::test_ring_whose_parts_overlap_does_not_run_and_says_so",
)
BAD_REGIONS = (
    f"{MEMORY}::test_27_regions_that_overlap_or_wrap_or_are_empty_are_refused",
    f"{SESSION}::test_impossible_table_is_refused_and_the_old_one_kept",
)
QUIESCED = (
    f"{MEMORY}::test_23_a_change_is_acknowledged_when_nobody_uses_the_old_table",
    f"{MEMORY}::test_29_a_ring_whose_memory_is_removed_stops",
    f"{LIFECYCLE}::test_49_whenever_a_front_end_goes_away_nothing_of_it_is_left",
    "system/test_vhost_user::test_ports_removed_while_a_front_end_sets_up_leak_nothing",
)
SEGMENTS = (
    f"{OFFLOAD}::test_a_burst_is_cut_into_so_many_segments_and_no_more",
    f"{OFFLOAD}::test_nothing_more_is_cut_where_nothing_arrives_any_more",
    *LYING_HEADERS,
)

SHOWN = {
    # surplus and missing descriptors
    "S1": (
        *SURPLUS,
        f"{BAD_INPUT}::test_anything_but_an_eventfd_is_refused",
        f"{MEMORY}::test_21_regions_and_descriptors_must_be_as_many_or_the_old_table_stays",
    ),
    # descriptors with a message that goes wrong
    "S2": (
        f"{FRAMING}::test_17_a_header_that_cannot_be_followed_ends_the_connection",
        f"{CHANNEL}::test_bad_header_ends_the_session_and_its_descriptors",
        f"{CHANNEL}::test_descriptors_that_do_not_fit_into_our_table_end_the_session",
        f"{CHANNEL}::test_closing_ends_the_descriptors_of_half_a_message",
    ),
    # the same message for ever
    "S3": REPEATED,
    # ring numbers
    "S4": NO_SUCH_RING,
    # ring sizes
    "S5": (
        f"{LIFECYCLE}::test_47_a_ring_size_that_cannot_be_is_refused",
        f"{SESSION}::test_impossible_ring_size_is_refused",
    ),
    # sums of addresses, sizes, offsets
    "S6": (*BAD_REGIONS, *BAD_LOG),
    # regions that overlap
    "S7": (
        *BAD_REGIONS,
        f"{MEMORY}::test_26_a_region_may_be_added_twice_and_removed_twice",
    ),
    # tables that say one thing and bring another
    "S8": (
        f"{MEMORY}::test_21_regions_and_descriptors_must_be_as_many_or_the_old_table_stays",
        f"{BAD_INPUT}::test_payloads_of_a_wrong_size_are_refused",
        f"{SESSION}::test_descriptors_must_match_regions",
        "ports/vhost/test_messages::test_memory_table_with_an_absurd_count_is_refused",
    ),
    # files that are, or become, too short
    "S9": (
        *TRUNCATED,
        f"{MEMORY}::test_27_regions_that_overlap_or_wrap_or_are_empty_are_refused",
        f"{ATTACKS}::test_huge_pages_that_nobody_has_are_refused",
        f"{ATTACKS}::test_a_hole_where_the_rings_were_costs_nobody_else",
    ),
    # descriptors that are no memory
    "S10": (
        f"{BAD_INPUT}::test_memory_that_cannot_be_mapped_is_refused",
        f"{SESSION}::test_memory_must_be_a_file",
    ),
    # descriptors that would block
    "S11": (
        f"{BAD_INPUT}::test_anything_but_an_eventfd_is_refused",
        f"{SESSION}::test_ring_descriptor_that_would_block_is_made_not_to",
        f"{NOTIFICATIONS}::test_70_a_descriptor_that_would_block_holds_no_worker",
    ),
    # where rings lie
    "S12": RING_PLACES,
    # messages in another order, changes while rings run
    "S13": (
        f"{SESSION}::test_ring_starts_in_any_order_and_not_before",
        f"{SESSION}::test_running_ring_takes_the_same_again_and_nothing_else",
        f"{NEGOTIATION}::test_05_other_features_are_refused_while_a_ring_runs",
        f"{LIFECYCLE}::test_39_a_ring_that_was_never_configured_stands_at_0",
        f"{SESSION}::test_no_sequence_of_messages_leaks_a_descriptor_or_raises",
    ),
    # memory that goes while it is used
    "S14": QUIESCED,
    # logs
    "S15": (
        *BAD_LOG,
        f"{SESSION}::test_a_log_that_does_not_fit_is_refused",
        f"{ATTACKS}::test_a_log_that_is_truncated_takes_down_only_its_port",
    ),
    # half a message
    "S16": (
        f"{FRAMING}::test_12_a_message_may_come_one_byte_at_a_time_and_nobody_waits",
        f"{BAD_INPUT}::test_who_stops_in_the_middle_of_a_message_is_cut_off_and_nobody_waits",
        f"{CHANNEL}::test_message_has_a_deadline_from_its_first_byte_to_its_last",
    ),
    # enormous messages
    "S17": (
        f"{FRAMING}::test_17_a_header_that_cannot_be_followed_ends_the_connection",
    ),
    # questions without end
    "S18": (
        f"{BAD_INPUT}::test_who_asks_and_never_reads_holds_up_nobody_else",
        f"{CHANNEL}::test_peer_that_never_reads_is_given_up",
    ),
    # flags
    "S19": (
        f"{FRAMING}::test_17_a_header_that_cannot_be_followed_ends_the_connection",
        "ports/vhost/test_messages::test_unknown_flags_in_a_request_are_ignored",
    ),
    # connections without end
    "S20": (
        f"{ATTACKS}::test_of_a_flood_of_connections_one_is_served",
        f"{LIFECYCLE}::test_50_a_storm_of_reconnects_costs_little_and_says_little",
    ),
    # descriptors in flight
    "S21": NOT_OFFERED,
    # configuration space
    "S22": (
        f"{SESSION}::test_bytes_outside_the_configuration_space_are_refused",
        f"{SESSION}::test_only_the_address_may_be_written",
    ),
    # all descriptors for one port
    "S23": (
        f"{ATTACKS}::test_a_front_end_has_as_many_descriptors_as_its_rings_and_regions_need",
        f"{SESSION}::test_more_regions_than_slots_are_refused",
    ),
    # who may connect
    "sockets": (
        "system/test_access::test_guests_sockets_are_the_switchs_own_unless_somebody_says_otherwise",
        f"{CHANNEL}::test_descriptors_are_closed_on_exec",
    ),
    # available indexes
    "R1": JUMPS,
    # heads, next, loops, length of chains
    "R2": (
        *LOOPS,
        f"{SPLIT}::test_a_head_outside_the_ring_breaks_only_that_ring",
        f"{SPLIT}::test_a_long_chain_of_nothing_does_not_hold_the_worker",
        f"{PACKED}::test_a_long_table_of_nothing_does_not_hold_the_worker",
    ),
    # descriptors that change
    "R3": READ_ONCE,
    # headers that change, or lie
    "R4": (*READ_ONCE, *LYING_HEADERS),
    # buffers across regions, around the end of addresses
    "R5": REGIONS_APART,
    # no length, and a bad address
    "R6": NO_LENGTH,
    # indirect tables
    "R7": TABLES,
    # headers in pieces, chains shorter than one
    "R8": HEADERS_IN_PIECES,
    # addresses that change after they were looked up
    "R9": (
        "datapath/test_judged::test_addresses_that_change_after_the_decision_are_not_delivered",
        *READ_ONCE,
    ),
    # enormous frames, very many pieces
    "R10": (
        f"{SCRIBBLED}::test_a_frame_in_very_many_pieces_is_counted_and_given_back",
        f"{SPLIT}::test_frames_too_short_or_too_long_are_counted",
        "datapath/test_loop::test_a_round_takes_one_burst_of_each_ring",
    ),
    # receive buffers that may not be written, or lie over other things
    "R11": (
        f"{SCRIBBLED}::test_receive_buffers_over_the_rings_and_each_other_hurt_nobody",
        f"{RECEIVE}::test_64_a_chain_that_cannot_be_written_never_is",
        f"{PACKED}::test_a_readable_receive_buffer_is_never_written",
    ),
    # our words in the rings
    "R12": (
        f"{SCRIBBLED}::test_what_a_driver_writes_over_our_words_is_not_read_again",
    ),
    # segments without end
    "R13": SEGMENTS,
    # interrupts without end
    "R14": (f"{SCRIBBLED}::test_a_driver_that_wants_every_call_gets_one_a_burst",),
    # a ring that is refilled for ever
    "R15": ("datapath/test_loop::test_a_round_takes_one_burst_of_each_ring",),
    # laps and flags of packed rings
    "R16": (
        f"{SCRIBBLED}::test_packed_rings_of_anything_hurt_nobody",
        f"{PACKED}::test_many_laps_of_rings_of_any_size",
        f"{PACKED}::test_a_chain_without_an_end_breaks_only_its_ring",
    ),
    # bytes of other guests
    "R17": (
        f"{RECEIVE}::test_65_bytes_behind_a_frame_stay_as_they_were",
        "datapath/test_rings_machine::TestRings",
    ),
    # buffers and tables that lie apart in our memory
    "CVE-2018-1059": (*REGIONS_APART, *TABLES),
    # surplus descriptors; SET_VRING_NUM again and again
    "CVE-2019-14818": (*SURPLUS, *REPEATED),
    # a chain that goes on for ever takes memory for ever
    "CVE-2016-5403": LOOPS,
    # size and offset of a log
    "CVE-2020-10722": (*BAD_LOG, *BAD_REGIONS),
    # a ring's number cut to 16 bits
    "CVE-2020-10723": NO_SUCH_RING,
    # an address that leads nowhere, for no bytes
    "CVE-2020-10725": NO_LENGTH,
    # descriptors with SET_INFLIGHT_FD again and again
    "CVE-2020-10726": (*NOT_OFFERED, *SURPLUS, *REPEATED),
    # read twice, changed in between
    "CVE-2020-14375": READ_ONCE,
    # more queues in flight than there are
    "CVE-2021-3839": NOT_OFFERED,
    # surplus descriptors with messages about descriptors in flight
    "CVE-2022-0669": SURPLUS,
    # a header in more than two descriptors, chains shorter than one
    "CVE-2022-2132": HEADERS_IN_PIECES,
    # a checksum that begins behind the frame
    "CVE-2024-11614": LYING_HEADERS,
    # sessions and operations of the crypto device, which we are not
    "CVE-2020-10724": NOT_OFFERED,
    "CVE-2020-14374": NOT_OFFERED,
    "CVE-2020-14376": NOT_OFFERED,
    "CVE-2020-14377": NOT_OFFERED,
    "CVE-2020-14378": NOT_OFFERED,
    # those of others that have no number
    "csum_start read twice": (*READ_ONCE, *LYING_HEADERS),
    "gso_size": SEGMENTS,
    "length and loops of chains": LOOPS,
    "use after unmap": QUIESCED,
    "available index ahead": JUMPS,
    "used ring that may not be written": (
        f"{ATTACKS}::test_memory_that_may_only_be_read_is_refused",
        *RING_PLACES,
    ),
    "truncated memory": TRUNCATED,
    "descriptors leaked by reconnects": (
        "system/test_load::test_front_ends_come_and_go_and_leave_nothing_behind",
    ),
}


@pytest.mark.parametrize("attack", SHOWN)
def test_what_shows_it_exists(attack):
    assert SHOWN[attack]
    for node in SHOWN[attack]:
        path, name = node.split("::")
        module = importlib.import_module(f"tests.{path.replace('/', '.')}")
        assert re.match("test_|Test", name), node
        assert hasattr(module, name), node


@pytest.mark.parametrize(("letter", "count"), [("S", 23), ("R", 17)])
def test_the_list_is_whole(letter, count):
    numbers = [attack for attack in SHOWN if re.fullmatch(rf"{letter}\d+", attack)]
    assert numbers == [f"{letter}{n}" for n in range(1, count + 1)]


def test_every_test_of_attacks_alone_is_of_some_use():
    """Those files hold nothing else."""
    named = {node for nodes in SHOWN.values() for node in nodes}
    for path in (ATTACKS, SCRIBBLED):
        module = importlib.import_module(f"tests.{path.replace('/', '.')}")
        tests = {f"{path}::{name}" for name in vars(module) if name.startswith("test_")}
        assert tests <= named
