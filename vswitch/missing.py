"""A port that is wanted and could not be opened: shown with the reason, tried again."""

from collections.abc import Sequence
from typing import Any

from ports.host import NO_CHOICE, State


class MissingPort:
    """Stands where the port would be."""

    backend = NO_CHOICE
    warnings: Sequence[str] = ()

    def __init__(self, name: str, kind: str, mode: str, reason: str) -> None:
        self.name = name
        self.kind = kind
        self.mode = mode
        self.reason = reason

    async def open(self) -> None:
        """Do nothing."""

    async def resume(self, _kept: dict[str, Any], _fds: Sequence[int]) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    def state(self) -> State:
        """Down, and why."""
        return State("down", f"{self.reason}; it is tried again")

    def features(self) -> list[str]:
        """Nothing was negotiated."""
        return []

    def queues(self) -> dict[str, int]:
        """None."""
        return {"enabled": 0, "max": 0}
