"""What a port's control half needs from the switch that it is part of.

The manager implements it. Everything here is awaited in the port's own task; the records
are plain memory that workers look at, and `sync` returns when all of them have.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

from numpy import void
from numpy.typing import NDArray


class Mapping(NamedTuple):
    """A part of a file, mapped at the same address in every worker."""

    addr: int
    length: int
    offset: int
    number: int  # of the file's descriptor in every worker


class State(NamedTuple):
    """What a user wants to know of a port: a word, and why."""

    word: str
    reason: str


class Backend(NamedTuple):
    """How a port's frames come and go, where its kind has a choice."""

    name: str
    reason: str  # why it is not a better one, if there is


NO_CHOICE: Final = Backend("", "")


class Answer(NamedTuple):
    """Bytes for a front-end."""

    place: int  # of its connection, among the descriptors beside it
    data: bytes


def nothing() -> None:
    """Do nothing."""


class Host(Protocol):
    """The switch, as a port sees it."""

    @property
    def ports(self) -> NDArray[void]:
        """PORT records, by slot."""

    @property
    def rings(self) -> NDArray[void]:
        """RING records, RINGS_PER_PORT for each slot."""

    @property
    def regions(self) -> NDArray[void]:
        """REGION records, two tables of TABLE_ROWS for each slot."""

    @property
    def active(self) -> Sequence[int]:
        """The workers that forward; in place of one that is replaced, another."""

    @property
    def several(self) -> bool:
        """Whether several workers may transmit into one ring."""

    def owner_for(self, slot: int, pair: int) -> int:
        """The worker that is to serve a queue pair."""

    async def map(
        self,
        fd: int,
        length: int,
        offset: int,
        alignment: int,
        lost: Callable[[], None] = nothing,
    ) -> Mapping:
        """Map a part of a file in every worker. Raises OSError.

        `lost` is called, maybe more than once, when a worker has found that the file
        has become too short; by then there are zeroes in the mapping's place.
        """

    async def unmap(self, mappings: Sequence[Mapping]) -> None:
        """Take mappings away that nothing refers to any more."""

    async def install(self, fds: Sequence[int]) -> list[int]:
        """Give every worker duplicates of descriptors; their numbers there."""

    async def uninstall(self, numbers: Sequence[int]) -> None:
        """Take descriptors away that no record names any more."""

    async def sync(self) -> None:
        """Return when no worker uses what the records said before."""

    def keep(
        self,
        slot: int,
        state: dict[str, Any],
        fds: Sequence[int],
        answer: Answer | None = None,
    ) -> bool:
        """Have what a port is outlive this process, in place of what it kept before.

        Returns at once, and the state is safe by then. `fds` stay the caller's. With it,
        in one step, an answer is sent, if there is room for it; False if it is not.
        """

    def settle(self) -> None:
        """Return when all answers have been sent, and what is kept no more is closed."""

    def keep_message(
        self, slot: int, words: dict[str, Any] | None, fds: Sequence[int] = ()
    ) -> None:
        """The same, beside `keep`, for a message to a port; None: there is none now."""

    async def announce(self, slot: int, address: bytes) -> None:
        """Tell every port that `address` (6 bytes) lives behind port `slot` from now."""

    async def forget(self, slot: int) -> None:
        """Forget the addresses that were learned behind a port. Never fails."""
