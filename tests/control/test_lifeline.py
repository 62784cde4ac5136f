"""How the manager hears that a worker has died, whatever that has written."""

import mmap
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from tests.forbid import ROOT
from vswitch import lifeline
from vswitch.records import WORKER

NUMBER = 2
WAIT_S = 60

_HOLD = """
import mmap, os, signal, sys
import numpy as np
from vswitch import lifeline
from vswitch.records import WORKER

file, number, garbage = map(int, sys.argv[1:])
workers = np.frombuffer(mmap.mmap(file, 0), WORKER)
lifeline.hold(workers, number)
if garbage:  # behind the lock word
    workers["life"][number].view("u1")[4:] = 0x41
print(flush=True)
signal.pause()
"""


@pytest.fixture
def workers():
    file = os.memfd_create("workers")
    os.truncate(file, 4 * WORKER.itemsize)
    yield file, np.frombuffer(mmap.mmap(file, 0), WORKER)
    os.close(file)


@pytest.mark.parametrize("garbage", [False, True])
def test_a_death_is_heard_of(workers, garbage):
    file, records = workers
    lifeline.prepare(records, NUMBER)
    heard = threading.Event()
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(file), str(NUMBER), str(int(garbage))],
        stdout=subprocess.PIPE,
        pass_fds=(file,),
        cwd=ROOT,
    ) as worker:
        worker.stdout.readline()
        lifeline.watch(records, NUMBER, heard.set)
        assert not heard.wait(0.05)
        worker.send_signal(signal.SIGKILL)
        assert heard.wait(WAIT_S)
    again = threading.Event()
    lifeline.watch(records, NUMBER, again.set)
    assert again.wait(WAIT_S)  # and also if it was over before
