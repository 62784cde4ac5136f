"""A multiprocess shared-memory packet switch for virtual machines."""

__version__ = "0.1.0"
