import time

import pytest

from vswitch import tables

PORT = {
    "name": "vm1",
    "kind": "vhost-user",
    "state": "up",
    "reason": "1 queue pair",
    "queues": {"enabled": 1, "max": 8},
    "backend": "",
    "backend_reason": "",
}
WORKER = {
    "id": 0,
    "pid": 4711,
    "cpu": 1,
    "role": "active",
    "state": "polling",
    "busy_percent": 35.06,
}
COUNTS = {
    "rx_frames": 12345,
    "rx_bytes": 790080,
    "rx_drop_bad_chain": 0,
    "tx_frames": 7,
    "tx_bytes": 448,
    "tx_drop_ring_full": 3,
}
WORK = {
    "frames": 12345,
    "cycles_per_frame": 48.4,
    "busy_cycles": 597_498,
    "cycles_per_s": 2_000_000_000,
}


def test_columns_are_aligned_and_lines_end_with_their_text():
    text = tables.align(("NAME", "N"), [("a", "1"), ("longer", "1000")], frozenset({1}))
    assert text.splitlines() == ["NAME       N", "a          1", "longer  1000"]
    assert tables.align(("A", "B"), [("x", "")]).splitlines() == ["A  B", "x"]


def test_show_gives_state_and_reason_of_each_port():
    port = PORT | {"since": time.time() - 300}
    lines = tables.show({"workers": [WORKER], "ports": [port]}).splitlines()
    assert lines[1].split() == ["0", "4711", "1", "active", "polling", "35.1", "%"]
    assert lines[4].split(maxsplit=6)[:3] == ["vm1", "vhost-user", "up"]
    assert "5 min" in lines[4]
    assert lines[4].endswith("1/8  -        1 queue pair")


def test_show_says_how_a_port_moves_frames_and_why_not_better():
    port = PORT | {
        "since": 0,
        "backend": "plain",
        "backend_reason": "no io_uring: lost",
    }
    lines = tables.show({"workers": [WORKER], "ports": [port]}).splitlines()
    assert lines[4].endswith("  plain    1 queue pair; no io_uring: lost")


def test_show_without_ports_says_how_to_add_one():
    assert "vswitch add-port" in tables.show({"workers": [WORKER], "ports": []})


def test_the_fdb_says_where_an_address_is():
    entry = {"mac": "52:54:00:00:00:01", "ifname": "vm1", "vlan": 0, "age_s": 5}
    learned = entry | {"state": "learned"}
    static = entry | {"state": "static", "vlan": 7}
    lines = tables.fdb([learned, static]).splitlines()
    assert lines[1].split() == ["vm1", "-", "52:54:00:00:00:01", "learned", "5", "s"]
    assert lines[2].split() == ["vm1", "7", "52:54:00:00:00:01", "static", "-"]
    assert tables.fdb([]) == "no addresses"


def test_stats_name_drops_only_where_there_are_any():
    text = tables.stats({"ports": {"vm1": COUNTS}, "workers": {"0": WORK}})
    assert "12,345" in text
    assert text.count("tx_drop_ring_full") == 1
    assert "rx_drop_bad_chain" not in text
    assert "rx_missed" not in text
    clean = COUNTS | {"tx_drop_ring_full": 0}
    text = tables.stats({"ports": {"vm1": clean}, "workers": {"0": WORK}})
    assert "DROP " not in text


def test_stats_name_what_the_kernel_had_no_room_for():
    missed = COUNTS | {"tx_drop_ring_full": 0, "rx_missed": 4321}
    text = tables.stats({"ports": {"eth1": missed}, "workers": {"0": WORK}})
    lines = [line.split() for line in text.splitlines()]
    assert ["eth1", "rx_missed", "4,321"] in lines


def test_rates_are_the_difference_by_the_time():
    before = {"ports": {"vm1": COUNTS}, "workers": {"0": WORK}}
    after = {
        "ports": {
            "vm1": COUNTS
            | {"rx_frames": 12345 + 2_000_000, "tx_drop_ring_full": 3 + 500},
            "vm2": COUNTS,
        },
        "workers": {
            "0": WORK
            | {"frames": 12345 + 2_000_000, "busy_cycles": 597_498 + 100_000_000}
        },
    }
    lines = tables.rates(before, after, 2.0).splitlines()
    assert lines[1].split()[:3] == ["vm1", "1.00", "M/s"]
    assert lines[1].endswith("250 /s  tx_drop_ring_full")
    assert lines[2].startswith("vm2")
    assert lines[5].split() == ["0", "1.00", "M/s", "2.5", "%", "50"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 "),
        (999, "999 "),
        (999.4, "999 "),
        (999.6, "1.00 k"),
        (12_345, "12.3 k"),
        (999_600, "1.00 M"),
        (38_100_000, "38.1 M"),
        (2.5e15, "2500 T"),
    ],
)
def test_numbers_have_three_digits_and_a_prefix(number, text):
    assert tables.si(number) == text
