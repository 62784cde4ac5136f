"""How thorough property tests are: quick by default, repeatable in CI, deep on request.

`pytest --hypothesis-profile=deep` is for the night. Without Numba an example costs a
hundred times as much, and shows nothing about speed or wraps: a few will do.
"""

import os

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
