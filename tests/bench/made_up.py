"""Results that nobody measured, to be judged and shown."""

from bench.paced import PARTS, Paced
from bench.traffic import Slice


def slices(rates, cycles=None, trip=100.0, waited=0.0):
    return [Slice(mpps, 0.25, 0.0, cycles, trip, waited) for mpps in rates]


def searches(rates, p99_us=None, at_least=False, waited=0.0):
    """Searches with so many microseconds for 99 %, at whatever part."""
    return [
        Paced(mpps, at_least, {p: [0.5, us, 2.0 * us] for p in PARTS}, 100.0, waited)
        for mpps, us in zip(rates, p99_us or [1] * len(rates), strict=True)
    ]


def no_loss(name, title, **by_system):
    return {
        "name": name,
        "title": title,
        "length": 64,
        "percentiles": [50.0, 99.0, 99.9],
        "found": {
            system.replace("_", "-"): [one._asdict() for one in found]
            for system, found in by_system.items()
        },
    }


def case(name, title, beside=None, **by_system):
    def rows(some):
        return {
            name.replace("_", "-"): [one._asdict() for one in found]
            for name, found in some.items()
        }

    return {
        "name": name,
        "title": title,
        "length": 64,
        "slices": rows(by_system),
        "slices_beside": rows(beside or {}),
    }


def result(*cases, **more):
    return {
        "machine": {"processor": "made up"},
        "plan": {"rounds": 5, "seconds": 0.5, "queue_size": 256},
        "versions": {"vswitch": "1.2", "ovs-dpdk": "3.4", "testpmd": "5.6"},
        "left_out": {},
        "failed": {},
        "reference": [10.0, 11.0, 9.0],
        "cases": list(cases),
        "no_loss": [],
        "idle": {},
        "starts": {},
    } | more
