"""What the bench knows of the machine, and makes others do on it."""

import os
import signal
import subprocess
import sys

from bench import machine
from tests.switch import wait_for

# Three threads that are never done.
BUSY = """
import threading

def work():
    while True:
        pass

for _ in range(2):
    threading.Thread(target=work).start()
print("busy", flush=True)
work()
"""


def test_who_is_halted_runs_no_more():
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, process_group=0) as process:
        try:
            assert process.stdout.readline() == b"busy\n"
            assert not machine.is_halted(process.pid)
            os.killpg(process.pid, signal.SIGSTOP)
            wait_for(lambda: machine.is_halted(process.pid), "three stopped threads")
            ran = machine.cpu_seconds(process.pid)
            assert all(machine.cpu_seconds(process.pid) == ran for _ in range(100))
            os.killpg(process.pid, signal.SIGCONT)
            wait_for(
                lambda: machine.cpu_seconds(process.pid) > ran, "a thread that runs"
            )
            assert not machine.is_halted(process.pid)
        finally:
            process.kill()


def test_who_is_gone_is_halted():
    with subprocess.Popen([sys.executable, "-c", ""], process_group=0) as process:
        pass
    assert machine.is_halted(process.pid)
