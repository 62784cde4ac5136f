from tests.system.conftest import net, own_net, start, switch

__all__ = ["net", "own_net", "start", "switch"]
