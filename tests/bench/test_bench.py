"""The whole bench for a moment: every row is there, and no frame is unaccounted for."""

import itertools
import json
import re
from contextlib import closing

import pytest

from bench import machine, testpmd, traffic, virtio_user
from bench.__main__ import main
from bench.peers import KINDS, Need, Work, running
from tests import requirements
from vswitch.guest.traffic import Totals

# A manager in the background outlives what starts it; here that is this process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:subprocess .* is still running"),
    pytest.mark.timeout(300),
]

SYSTEMS = ["vswitch", "testpmd", "calling"]
# A switch that is started by a command, and calls the guests instead of being called.
COMMAND = """
set -- $SOCKETS
sleep 1000 | dpdk-testpmd --no-pci --no-huge --no-telemetry -m 256 \
    -l $OTHER_CPU,$CPU --main-lcore=$OTHER_CPU \
    --vdev=net_vhost0,iface=$1,client=1 --vdev=net_vhost1,iface=$2,client=1 \
    -- -i --auto-start --no-flush-rx --total-num-mbufs=8192
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What a run wrote."""
    requirements.require_command(testpmd.COMMAND, testpmd.PACKAGE)
    directory = tmp_path_factory.mktemp("bench")
    main(
        [
            *("--only", "64,64-packed,64-dpdk,idle"),
            *("--rounds", "2", "--seconds", "0.1"),
            *("--systems", ",".join(SYSTEMS), "--peer-connects", f"calling={COMMAND}"),
            *("--out", str(directory)),
        ]
    )
    return directory


@pytest.fixture(scope="module")
def result(written):
    return json.loads((written / "report.json").read_text())


@pytest.mark.vm
def test_every_system_has_slices_in_every_case(result):
    names = [case["name"] for case in result["cases"]]
    assert names == ["64", "64-packed", "64-dpdk"]
    for case in result["cases"]:
        assert list(case["slices"]) == SYSTEMS
        for slices in case["slices"].values():
            assert len(slices) == 2
            assert all(one["mpps"] > 0 for one in slices)
            assert all(one["round_trip_ns"] > 0 for one in slices)
    assert list(result["cases"][1]["slices_beside"]) == SYSTEMS
    # What a guest counted and what the switch did agreed each time, or this says not.
    assert result["failed"] == {}


@pytest.mark.vm
def test_dpdk_generates_both_ways_through_packed_rings():
    requirements.require_command(testpmd.COMMAND, testpmd.PACKAGE)
    load = traffic.Load(1500, both_ways=True, packed=True, dpdk=True)
    place, kind, need = machine.place(), KINDS["vswitch"], Need(2, 1514)
    with (
        running("vswitch", kind, need, place) as system,
        closing(virtio_user.Pair(system, load, 256, place)) as pair,
    ):
        assert pair.measure(0.1).mpps > 0
        for port in (1, 2):
            said = pair._pmd.ask(f"show port stats {port}")
            found = dict(re.findall(r"(\w+-\w+): +(\d+)", said))
            assert int(found["TX-bytes"]) > 1400 * int(found["TX-packets"]) > 0
            assert int(found["RX-bytes"]) > 1400 * int(found["RX-packets"]) > 0


@pytest.mark.parametrize(("shape", "copies"), [(traffic.RING, 1), (traffic.TO_ALL, 3)])
def test_every_port_has_its_part_of_a_shape(shape, copies):
    load = traffic.Load(64, pairs=2, shape=shape)
    place, need = machine.place(), Need(4, 1514)
    with (
        running("vswitch", KINDS["vswitch"], need, place) as system,
        traffic.attached(system, traffic.Wiring.of(load), 256) as guests,
    ):
        streams = traffic.Streams(system, load, guests)
        totals = streams.send(0.1)
        one = traffic.measure(streams, place, 0.1)  # counts agree, or it says not
    assert load.copies == copies
    assert all(int(sink.flows["received"][0]) > 0 for sink in streams.sinks)
    assert len(streams.sinks) == {traffic.RING: 4, traffic.TO_ALL: 3}[shape]
    assert totals.received <= copies * totals.sent
    if copies > 1:  # or it would be one to one other
        assert totals.received > totals.sent
    assert 0 <= one.lost < 1


@pytest.mark.vm
def test_frames_keep_their_order(result):
    slices = [one for case in result["cases"] for one in case["slices"]["vswitch"]]
    assert [one["reordered"] for one in slices] == 4 * [0] + 2 * [None]


@pytest.mark.vm
def test_cycles_are_those_that_systems_tell(result):
    slices = result["cases"][0]["slices"]
    assert all(one["cycles"] > 0 for one in slices["vswitch"] + slices["testpmd"])
    assert all(one["cycles"] is None for one in slices["calling"])


@pytest.mark.vm
def test_idle_systems_were_looked_at(result):
    assert list(result["idle"]) == SYSTEMS
    assert result["idle"]["testpmd"]["cpu_percent"] > 0  # it polls
    assert all(found["memory_mib"] > 10 for found in result["idle"].values())
    for found in result["idle"].values():
        assert 0 < found["single_us"][0] <= found["single_us"][1]
        assert 0 < found["wake_us"][0] <= found["wake_us"][1]
    assert all(result["starts"][name] > 0 for name in SYSTEMS)


@pytest.mark.vm
def test_reports_have_the_rows(written):
    document = (written / "report.md").read_text()
    assert "| 64 bytes |" in document
    assert "| 64 bytes, packed rings |" in document
    assert "<svg" in (written / "report.html").read_text()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo no cards; exit 3", "when it ended, having said: no cards"),
        ("touch $SOCKETS; exec sleep 1000", "cannot connect to"),
    ],
)
def test_a_peer_that_fails_is_named_and_the_rest_goes_on(
    command, said, tmp_path, capsys
):
    with pytest.raises(SystemExit, match="failed"):
        main(
            [
                *(
                    "--peer",
                    f"lame={command}",
                    "--systems",
                    "lame",
                    "--only",
                    "64,idle",
                ),
                *("--rounds", "1", "--seconds", "0.1", "--out", str(tmp_path)),
            ]
        )
    assert "failed: lame, " in capsys.readouterr().out
    failed = json.loads((tmp_path / "report.json").read_text())["failed"]
    assert all(said in reason for reason in failed.values())


@pytest.mark.parametrize(
    ("work", "harm"),
    [
        (Work(frames=9), {}),
        (Work(delivered=9), {}),
        (Work(dropped=0), {}),
        (Work(10, 8, 2), {"duplicates": 1}),
        (Work(), {"foreign": 1}),
        (Work(), {"corrupt": 1}),
    ],
    ids=str,
)
def test_counts_that_do_not_agree_are_no_figure(work, harm):
    with pytest.raises(traffic.CountsError, match=r"somebody: the counts"):
        traffic.check("somebody", Totals(sent=10, received=8, lost=2, **harm), work)


@pytest.mark.parametrize("work", [Work(10, 8, 2), Work(10), Work()], ids=str)
def test_counts_that_agree_are(work):
    traffic.check("somebody", Totals(sent=10, received=8, lost=2), work)


def test_counts_are_taken_until_they_agree():
    late, whole = Totals(sent=10, received=7), Totals(sent=10, received=10)
    counts = iter([(late, Work(7, 7)), (late, Work(10, 10)), (whole, Work(10, 10))])
    assert traffic.first_agreeing("somebody", counts) == (whole, Work(10, 10))


def test_counts_that_never_agree_are_no_figure(monkeypatch):
    monkeypatch.setattr(traffic, "_PATIENCE_S", 0.0)
    never = itertools.repeat((Totals(sent=10, received=8), Work(10, 9, 1)))
    with pytest.raises(traffic.CountsError, match=r"somebody: the counts"):
        traffic.first_agreeing("somebody", never)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--systems", "nobody"], "no such system: nobody"),
        (["--only", "everything"], "no such case: everything"),
        (["--peer", "vpp"], "it is not NAME=COMMAND"),
        (["--cpus", "0,0"], "two processors are needed"),
    ],
)
def test_what_is_not_known_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
