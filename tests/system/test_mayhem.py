"""Acts at random moments under full traffic; the long run is `make soak`."""

import pytest

from tests import requirements
from tests.netns.uplink import quiet_namespace
from tests.system.mayhem import Mayhem, options
from tests.system.net import on_a_switch

SEED = 6
MORE = 4  # acts, after one of each kind


@pytest.mark.netns
@pytest.mark.parametrize(
    ("packed", "workers"), [(False, 1), (True, 2)], ids=["split-1", "packed-2"]
)
def test_whatever_is_done_guests_keep_their_sessions_and_their_bytes(packed, workers):
    requirements.require_root()
    with (
        quiet_namespace() as namespace,
        on_a_switch(*options(workers, 4), inside=namespace) as net,
    ):
        mayhem = Mayhem(net, SEED, packed=packed, namespace=namespace)
        mayhem.run(mayhem.kinds + MORE)
        assert len(mayhem.acts) == mayhem.kinds
        for guest in net.guests:
            guest.wait_ready()  # on the connection that it always had
        assert not any(guest.faults() for guest in net.guests)
