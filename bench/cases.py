"""What is measured: the table of cases."""

from typing import Final, NamedTuple

from bench.peers import Need
from bench.traffic import RING, TO_ALL, Load


class Case(NamedTuple):
    """A load for every system, and perhaps one that it is measured beside."""

    name: str
    title: str
    load: Load
    beside: Load | None = None  # on the same system, in the same rounds
    quick: bool = True
    no_loss: bool = False  # search for the rate without loss (`paced`)

    @property
    def need(self) -> Need:
        """What systems it can share with other cases."""
        return Need(2 * self.load.pairs, max(self.load.length, _USUAL))


_USUAL: Final = 1514
_MANY: Final = 1 << 16
# Seven, four and one of them; with its checksum the longest has 1518 on a wire.
_IMIX: Final = (64, 570, 64, 570, 64, 64, 1514, 64, 570, 64, 570, 64)

CASES: Final = (
    Case("64", "64 bytes", Load(64)),
    Case("128", "128 bytes", Load(128), quick=False),
    Case("256", "256 bytes", Load(256), quick=False),
    Case("512", "512 bytes", Load(512)),
    Case("1024", "1024 bytes", Load(1024), quick=False),
    Case("1500", "1500 bytes", Load(1500)),
    Case(
        "imix",
        "IMIX (7 of 64 bytes, 4 of 570, 1 of 1514)",
        Load(1514, mix=_IMIX),
        quick=False,
    ),
    Case("64-no-loss", "64 bytes without loss", Load(64, timed=True), no_loss=True),
    Case(
        "1500-no-loss",
        "1500 bytes without loss",
        Load(1500, timed=True),
        quick=False,
        no_loss=True,
    ),
    Case("64-both-ways", "64 bytes, both directions", Load(64, both_ways=True)),
    Case("64-packed", "64 bytes, packed rings", Load(64, packed=True), Load(64)),
    Case(
        "64-addresses",
        "64 bytes, 64 Ki addresses",
        Load(64, addresses=_MANY),
        Load(64),
        quick=False,
    ),
    Case(
        "64-ordinary",
        "64 bytes, guests use their data",
        Load(64, raw=False),
        quick=False,
    ),
    Case(
        "1500-ordinary",
        "1500 bytes, guests use their data",
        Load(1500, raw=False),
        quick=False,
    ),
    Case("64-dpdk", "64 bytes, DPDK's generator", Load(64, dpdk=True), quick=False),
    Case(
        "1500-dpdk",
        "1500 bytes, DPDK's generator",
        Load(1500, dpdk=True),
        quick=False,
    ),
    Case(
        "512-packed",
        "512 bytes, packed rings",
        Load(512, packed=True),
        Load(512),
        quick=False,
    ),
    Case("9000", "9000 bytes", Load(9000)),
    Case("64-4-ports", "64 bytes, 4 ports in pairs", Load(64, pairs=2), quick=False),
    Case("64-8-ports", "64 bytes, 8 ports in pairs", Load(64, pairs=4), quick=False),
    Case("64-16-ports", "64 bytes, 16 ports in pairs", Load(64, pairs=8)),
    Case(
        "64-ring",
        "64 bytes, 16 ports, each to the next",
        Load(64, pairs=8, shape=RING),
        quick=False,
    ),
    Case(
        "64-to-all",
        "64 bytes, one to 15 others by broadcast",
        Load(64, pairs=8, shape=TO_ALL),
        quick=False,
    ),
    Case("64-32-ports", "64 bytes, 32 ports in pairs", Load(64, pairs=16), quick=False),
)
# Not of frames in a stream:
IDLE: Final = "idle"  # what systems take while nothing comes
STARTS: Final = "starts"  # how soon they forward (`starts`)
