"""The one way to measure things beside each other: in turns.

Whatever the machine does meanwhile meets all of them. Every other round goes backwards, so
that none always follows the same one.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

Party = TypeVar("Party")
Measured = TypeVar("Measured")


def take_turns(
    rounds: int, parties: Sequence[Party], measure: Callable[[Party], Measured]
) -> list[list[Measured]]:
    """Measure each party once a round; what was found, by party and round."""
    found: list[list[Measured]] = [[] for _ in parties]
    order = list(range(len(parties)))
    for _ in range(rounds):
        for number in order:
            found[number].append(measure(parties[number]))
        order.reverse()
    return found
