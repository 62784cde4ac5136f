"""A multiprocess shared-memory packet switch for virtual machines."""

from typing import Final

__version__: Final = "0.1.0"
