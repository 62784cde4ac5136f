import asyncio
import time

import pytest

from ports.appear import appeared

LONG = 20.0


def seconds_until(path, timeout, act=lambda: None):
    """How long `appeared` takes when `act` is done once it waits."""

    async def wait():
        waiting = asyncio.create_task(appeared(path, timeout))
        await asyncio.sleep(0)
        act()
        began = time.monotonic()
        await waiting
        return time.monotonic() - began

    return asyncio.run(wait())


def test_a_file_that_is_there_is_not_waited_for(tmp_path):
    (tmp_path / "a").touch()
    assert seconds_until(tmp_path / "a", LONG) < LONG / 2


def test_a_file_that_is_made_ends_the_wait(tmp_path):
    path = tmp_path / "a"
    assert seconds_until(path, LONG, path.touch) < LONG / 2


def test_a_file_that_is_moved_there_ends_the_wait(tmp_path):
    (tmp_path / "b").touch()
    act = lambda: (tmp_path / "b").rename(tmp_path / "a")  # noqa: E731
    assert seconds_until(tmp_path / "a", LONG, act) < LONG / 2


@pytest.mark.parametrize("made", ["d", "d/e"])
def test_a_directory_on_the_way_is_worth_another_look(tmp_path, made):
    (tmp_path / made).parent.mkdir(exist_ok=True)
    path = tmp_path / "d" / "e" / "a"
    assert seconds_until(path, LONG, (tmp_path / made).mkdir) < LONG / 2


def test_other_files_do_not_end_it_but_the_time_does(tmp_path):
    assert seconds_until(tmp_path / "a", 0.05, (tmp_path / "b").touch) >= 0.04
