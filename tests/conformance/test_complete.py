"""The checklist is complete: each number has one test."""

import importlib
import re
from collections import Counter

import pytest

GROUPS = {
    "negotiation": range(1, 12),
    "framing": range(12, 20),
    "memory": range(20, 31),
    "lifecycle": range(31, 51),
    "transmit": range(51, 60),
    "receive": range(60, 66),
    "notifications": range(66, 71),
    "migration": range(71, 78),
}
NUMBERED = re.compile(r"test_(\d\d)_\w+")


@pytest.mark.parametrize("group", GROUPS)
def test_each_number_has_one_test(group):
    module = importlib.import_module(f"tests.conformance.test_{group}")
    names = [name for name in vars(module) if name.startswith("test_")]
    numbers = [NUMBERED.fullmatch(name) for name in names]
    assert all(numbers), names
    assert Counter(int(found[1]) for found in numbers) == Counter(GROUPS[group])


def test_the_groups_are_1_to_77():
    assert sorted(n for group in GROUPS.values() for n in group) == [*range(1, 78)]
