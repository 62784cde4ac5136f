"""Rings that change while workers serve them; the long run is `make soak`."""

import pytest

from tests.fuzz.rings import RingFuzz

ROUNDS = 12


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_whoever_scribbles_over_its_rings_hurts_nobody(net, packed):
    fuzz = RingFuzz(net, seed=1, packed=packed)
    fuzz.run(ROUNDS)
    assert all(fuzz.counts.values()), fuzz.counts
