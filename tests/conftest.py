"""How thorough property tests are: quick by default, repeatable in CI, deep on request.

`pytest --hypothesis-profile=deep` is for the night. Without Numba an example costs a
hundred times as much, and shows nothing about speed or wraps: a few will do.
"""

import os
from pathlib import Path

from hypothesis import settings

INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT") == "1"

settings.register_profile(
    "quick",
    deadline=None,
    max_examples=50 if INTERPRETED else 100,
    derandomize=os.environ.get("CI") == "true",
)
settings.register_profile("deep", deadline=None, max_examples=20_000)
settings.load_profile("quick")

# Where files take longest; the rest is short.
_FIRST = ("vm", "conformance", "system", "netns")


def pytest_collection_modifyitems(items):
    """Begin with the longest files, so that none is left to one process at the end.

    Of two processes the second takes all that follows while the first has the switch
    compiled: guests of ours, for which it compiles something else, and a switch that is
    interpreted. Otherwise both would compile the same.
    """
    here = Path(__file__).parent

    def folder(path):
        return path.relative_to(here).parts[0]

    def rank(path):
        return _FIRST.index(folder(path)) if folder(path) in _FIRST else len(_FIRST)

    files = sorted(dict.fromkeys(item.path for item in items), key=rank)
    guests = [path for path in files if folder(path) == "guest"][-2:]
    interpreted = here / "vm/test_vhost_net.py"
    for place, path in enumerate((*guests, interpreted), start=1):
        if path in files:
            files.remove(path)
            files.insert(place, path)
    order = {path: number for number, path in enumerate(files)}
    items.sort(key=lambda item: order[item.path])
