"""Workers killed at random moments under full traffic; the long run is `make soak`."""

import pytest

from tests.system.mayhem import Mayhem, options

SEED = 6
ACTS = 10  # each


@pytest.mark.parametrize(
    ("packed", "workers"), [(False, 1), (True, 2)], ids=["split-1", "packed-2"]
)
def test_whoever_dies_when_guests_keep_their_sessions_and_their_bytes(
    own_net, packed, workers
):
    net = own_net(*options(workers, spares=4))
    Mayhem(net, SEED, packed=packed).run(ACTS)
    for guest in net.guests:
        guest.wait_ready()  # on the connection that it always had
