"""DPDK's testpmd with one virtio-user port: a front-end and driver that we did not write."""

import re
import time
from pathlib import Path

from bench import testpmd

TESTPMD = testpmd.COMMAND
_EAL_OPTIONS = (
    # Its own memory, and both threads where they leave a core to a worker.
    *("--no-huge", "-m", "256", "-l", "0,1", "--main-lcore=1"),
    # Say which paths the driver takes, and take those with the widest vectors too.
    *("--log-level=pmd.net.virtio.init:info", "--force-max-simd-bitwidth=512"),
)
_STATISTIC = re.compile(r"([RT]X-(?:packets|bytes|errors|dropped|missed)): +(\d+)")


class Testpmd(testpmd.Testpmd):
    """One testpmd as a guest.

    Its `name` is the port's. `options` are those of the virtual device: `server=1`,
    `queues=2`, `mrg_rxbuf=0`. `forward` is testpmd's forwarding mode: rxonly, txonly,
    io, macswap.
    """

    def __init__(self, path, *options, forward="rxonly", mac=None, arguments=()):
        device = [f"net_virtio_user0,path={path}", *options]
        if mac:
            device.append(f"mac={mac}")
        self.name = Path(path).stem
        super().__init__(
            self.name,
            [*_EAL_OPTIONS, f"--vdev={','.join(device)}"],
            ["--total-num-mbufs=4096", f"--forward-mode={forward}", *arguments],
        )

    def statistics(self):
        """The port's own counters: RX-packets, TX-packets, TX-errors ..."""
        return {
            name: int(value)
            for name, value in _STATISTIC.findall(self.ask("show port stats 0"))
        }

    def wait_for(self, condition, timeout=30.0):
        """Ask for the counters until `condition` holds for them."""
        deadline = time.monotonic() + timeout
        while not condition(found := self.statistics()):
            assert time.monotonic() < deadline, f"still {found} after {timeout} s"
        return found
