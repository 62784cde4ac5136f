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
    """Begin with the longest files, so that none is left to one process at the end."""
    here = Path(__file__).parent

    def rank(item):
        folder = item.path.relative_to(here).parts[0]
        return _FIRST.index(folder) if folder in _FIRST else len(_FIRST)

    items.sort(key=rank)
