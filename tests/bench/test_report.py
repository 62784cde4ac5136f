"""Reports of figures that were made up."""

import re
from xml.etree import ElementTree as ET

import pytest

from bench import daemon, measure, ovs, report, tcp, uplink, ways
from bench.baseline import figures, judge
from bench.cases import CASES
from bench.machine import Place
from bench.measure import Plan
from bench.peers import Kind
from tests.bench.made_up import case, no_loss, result, searches, slices


@pytest.fixture
def made_up():
    return result(
        case(
            "64",
            "64 bytes",
            vswitch=slices([40, 44, 42], cycles=50),
            ovs_dpdk=slices([10, 11, 10.5], cycles=260),
            testpmd=slices([20, 30, 60]),
        ),
        case(
            "64-packed",
            "64 bytes, packed",
            vswitch=slices([20, 22, 21], waited=0.3),
            ovs_dpdk=slices([10, 11, 10.5]),
            beside={"vswitch": slices([40, 44, 42])},
        ),
        idle={
            "vswitch": {
                "single_us": [0.4, 1.25],
                "wake_us": [31.5, 80.25],
                "cpu_percent": 0.25,
                "memory_mib": 301.6,
                "round_cycles": 94.4,
            }
        },
        starts={"vswitch": 0.64},
        left_out={"vpp": "vpp is not installed (apt-get install vpp)"},
        failed={"testpmd, 64 bytes, packed": "it fell over"},
    )


def row(text, title, name):
    """The cells of one row of one table of the terminal's text."""
    table = text.split(title)[1].split("\n\n")[0]
    (line,) = [one for one in table.splitlines() if one.startswith(name + "  ")]
    return [cell for cell in re.split(r"  +", line.removeprefix(name)) if cell]


def test_rates_are_shown_with_their_spread(made_up):
    assert row(report.text(made_up), "Million frames", "64 bytes") == [
        "42.00 (41.00 to 43.00)",
        "10.50 (10.25 to 10.75)",
        "30.00 (25.00 to 45.00)",
    ]


def test_ratios_are_shown_with_what_they_say(made_up):
    assert row(report.text(made_up), "How many times", "64 bytes") == [
        "4.00 (4.00 to 4.00), 3 pairs: faster",
        "1.47 (1.08 to 1.73), 3 pairs: too noisy to judge",
    ]


def test_a_run_that_is_too_noisy_names_no_winner(made_up):
    said = row(report.text(made_up), "How many times", "64 bytes, packed")
    assert said == ["too noisy to judge"]
    said = row(report.text(made_up), "Within one system", "64 bytes, packed")
    assert said == ["too noisy to judge"]


def test_figures_of_disturbed_slices_are_marked(made_up):
    said = row(report.text(made_up), "Million frames", "64 bytes, packed")
    assert said == ["~21.00 (20.50 to 21.50)", "10.50 (10.25 to 10.75)"]


def test_cycles_are_shown_where_a_system_tells_them(made_up):
    assert row(report.text(made_up), "Busy cycles", "64 bytes") == ["50", "260"]


def test_what_was_left_out_or_failed_is_named(made_up):
    for show in (report.text, report.markdown, report.html):
        said = show(made_up)
        assert "vpp is left out: vpp is not installed (apt-get install vpp)" in said
        assert "failed: testpmd, 64 bytes, packed: it fell over" in said


def test_idle_systems_are_shown(made_up):
    text = report.text(made_up)
    assert row(text, "that send nothing", "CPU") == ["0.2 %"]
    assert row(text, "that send nothing", "cycles a round") == ["94"]
    wake = row(text, "that send nothing", "after 20 ms of silence, us: median, 99 %")
    assert wake == ["31.5, 80.2"]
    assert row(text, "that send nothing", "memory") == ["302 MiB"]
    assert row(text, "that send nothing", "start until its ports are there") == [
        "0.6 s"
    ]


@pytest.fixture
def searched():
    return result(
        no_loss=[
            no_loss(
                "64-no-loss",
                "64 bytes without loss",
                vswitch=searches([20, 22, 21], [3, 3, 3], at_least=True),
                ovs_dpdk=searches([7, 7, 7], [6, 6, 6]),
                testpmd=searches([5, 5, 5], [1, 1, 1], waited=0.3),
            )
        ]
    )


def test_rates_without_loss_and_times_below_them_are_shown(searched):
    text, name = report.text(searched), "64 bytes without loss"
    assert row(text, "Million frames a second without loss", name) == [
        "at least 21.00 (20.50 to 21.50)",
        "7.00 (7.00 to 7.00)",
        "~5.00 (5.00 to 5.00)",
    ]
    times = ["0.5, 3.0, 6.0", "0.5, 6.0, 12.0", "~0.5, 1.0, 2.0"]
    for part in ("10", "50", "90"):
        assert row(text, "Microseconds from", f"{name}, at {part} %") == times
    assert row(text, "How many times as high", name) == [
        "3.00 (2.93 to 3.07), 3 pairs: higher",
        "too noisy to judge",
    ]
    assert row(text, "How many times as long 99 %", name) == [
        "0.50 (0.50 to 0.50), 3 pairs: below",
        "too noisy to judge",
    ]
    assert row(text, "How the machine was", name) == ["9", "6", "6", "100"]
    assert "Busy cycles" not in text  # nothing was measured of that


def test_rates_without_loss_are_in_the_document_and_the_page(searched):
    said = report.markdown(searched)
    assert "| 64 bytes without loss | at least 21.00 (20.50 to 21.50) | 7.00" in said
    plots = re.findall(r"<svg.*?</svg>", report.html(searched), re.DOTALL)
    bars = [
        [float(bar.get("width")) for bar in tree.findall(".//{*}rect")]
        for tree in map(ET.fromstring, plots)
    ]
    assert [len(one) for one in bars] == [3 + 3, 3 + 3]
    assert bars[0][3] / bars[0][4] == pytest.approx(21 / 7, rel=0.01)
    assert bars[1][3] / bars[1][4] == pytest.approx(3 / 6, rel=0.01)


def test_first_frames_are_shown_warm_and_cold(made_up):
    made_up["first_frames"] = {
        "warm": {"vswitch": [0.9, 1.0, 1.1], "testpmd": [0.5, 0.5, 0.5]},
        "cold": {"vswitch": [42.0]},
    }
    text = report.text(made_up)
    warm = row(text, "Seconds from", "with what it keeps from earlier ones")
    assert warm == ["1.00 (0.95 to 1.05)", "0.50 (0.50 to 0.50)"]
    cold = row(text, "Seconds from", "without")
    assert cold == ["42.00 (42.00 to 42.00)", "keeps nothing"]


def test_ways_between_taps_are_shown(made_up):
    made_up["taps"] = {
        "bridge": {"tcp": [16.0, 17.0, 18.0], "small": [0.5, 0.5, 0.5]},
        "vde": {"tcp": [1.0, 1.0, 1.0], "small": [0.25, 0.5, 0.25]},
    }
    shown = row(report.text(made_up), "From one tap", "vde")
    assert shown == ["1.00 (1.00 to 1.00)", "0.25 (0.25 to 0.38)"]


def test_tcp_between_guests_is_shown_with_and_without_offloads(made_up):
    made_up["tcp"] = [
        {
            "rings": "split",
            "offloads": offloads,
            "slices": [{"gbps": gbps} for gbps in rates],
        }
        for offloads, rates in ((True, [3, 6, 4]), (False, [1, 2, 1]))
    ]
    assert row(report.text(made_up), "TCP between", "split") == [
        "4.00 (3.50 to 5.00)",
        "1.00 (1.00 to 1.50)",
        "3.00 (3.00 to 3.50)",
    ]


def test_tcp_is_left_out_where_there_is_no_qemu(made_up, monkeypatch):
    monkeypatch.setattr(tcp, "QEMU", "no-such-qemu")
    tcp.add_to(made_up, 1, print)
    said = report.text(made_up)
    assert "TCP between real guests is left out: no-such-qemu is not installed" in said


def test_taps_are_left_out_where_they_cannot_be_measured(made_up, monkeypatch):
    monkeypatch.setattr(uplink, "lacking", lambda: "network namespaces need root")
    uplink.add_to(made_up, 1, print)
    said = report.text(made_up)
    assert "taps is left out: network namespaces need root" in said
    assert "From one tap" not in said


def test_all_rows_are_in_the_document(made_up):
    said = report.markdown(made_up)
    assert "| 64 bytes | 42.00 (41.00 to 43.00) | 10.50 (10.25 to 10.75) |" in said
    for line in said.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_the_page_has_plots_and_needs_no_other_file(made_up):
    page = report.html(made_up)
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 2
    bars = [
        [float(bar.get("width")) for bar in tree.findall(".//{*}rect")]
        for tree in map(ET.fromstring, plots)
    ]
    # A square for each series, then the bars; the longest is as long as the plot.
    assert len(bars[0]) == 3 + 5
    assert bars[0][3] / bars[0][4] == pytest.approx(42 / 10.5, rel=0.01)
    assert len(bars[1]) == 2 + 1  # the rest was too noisy
    assert not re.search(r"(src|href)=|url\(|@import", page)


def test_a_system_that_is_missing_is_named():
    told = []
    absent = Kind(None, lambda: daemon.missing(["no-such-command"], "its-package"))
    found = measure.run(
        {"ghost": absent}, [], Plan(1, 0.1), Place(1, 0), told.append, with_idle=False
    )
    reason = "no-such-command is not installed (apt-get install its-package)"
    assert told == [f"ghost is left out: {reason}"]
    assert f"ghost is left out: {reason}" in report.text(found)


def test_open_vswitch_is_missing_where_its_commands_are(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    said = "ovsdb-tool is not installed (apt-get install openvswitch-switch"
    assert ovs.missing().startswith(said)


def test_ways_are_missing_where_their_commands_are(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ways.missing("vde") == "vde_switch is not installed (apt-get install vde2)"
    assert ways.missing("tap") == ways.missing("bridge") == ""


def test_cases_of_a_generator_that_is_missing_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    told = []
    cases = [case for case in CASES if case.load.dpdk]
    found = measure.run({}, cases, Plan(1, 0.1), Place(1, 0), told.append)
    reason = "dpdk-testpmd is not installed (apt-get install dpdk-dev)"
    assert told[0] == f"DPDK's generator is left out: {reason}"
    assert cases
    assert found["cases"] == []


# --- the guard ------------------------------------------------------------------------


def test_figures_are_rates_beside_the_reference_loop(made_up):
    found = figures(made_up)
    assert list(found) == ["64"]  # the other was disturbed
    assert found["64"].median == pytest.approx(4.2)


@pytest.mark.parametrize(
    ("rates", "status", "text"),
    [
        ([40, 44, 42], 0, "as before"),
        ([37, 39, 38], 0, "as before"),  # within the tolerance
        ([30, 31, 32], 1, "slower"),
        ([30, 40, 41], 0, "as before"),  # the spread reaches it
        ([90, 91, 92], 0, "as before"),
    ],
)
def test_slower_is_more_than_noise(rates, status, text):
    now = figures(result(case("64", "64 bytes", vswitch=slices(rates))))
    said, found = judge({"64": [4.2, 4.1, 4.3]}, now)
    assert found == status
    assert row(said, "baseline ", "64")[-1] == text


def test_a_case_without_enough_good_slices_is_not_judged():
    noisy = slices([40, 44]) + slices([1], trip=400)
    now = figures(result(case("64", "64 bytes", vswitch=noisy)))
    said, status = judge({"64": [4.2, 4.1, 4.3]}, now)
    assert "too noisy to judge" in said
    assert status == 2
