"""What the processes may do, as the kernel has it; what becomes of who tries more."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import requirements
from tests.switch import RefusedError, Switch, remove_directory, short_directory
from tests.system.net import Net, exchange_both_ways
from vswitch import privileges, syscalls

SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
FOR_WORKERS = 1 << 1  # CAP_DAC_OVERRIDE
KEPT = sum(1 << capability.bit for capability in privileges.KEPT)
ORDINARY = ("unshare", "--user", "--map-user=54321", "--map-group=54321", "--")


def statuses(pid):
    """What /proc says of each thread of a process."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        lines = (thread / "status").read_text().splitlines()
        yield dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def capabilities(status):
    return dict(zip(SETS, (int(status[name], 16) for name in SETS), strict=True))


def ours(name):
    (status,) = (s for s in statuses(os.getpid()) if s["Pid"] == str(os.getpid()))
    return int(status[name], 16)


def assert_confined(pid, bound):
    for status in statuses(pid):
        assert capabilities(status) == dict.fromkeys(SETS, 0) | {"CapBnd": bound}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    # Private memory alone: no guest's.
    assert int(Path(f"/proc/{pid}/coredump_filter").read_text(), 16) == 0x31
    # Dumpable, or the manager could not tell how it ended.
    assert Path(f"/proc/{pid}/status").stat().st_uid == os.geteuid()


# --- whom root starts ---


@pytest.fixture(scope="module")
def root():
    requirements.require_root()


@pytest.mark.usefixtures("root")
def test_the_manager_keeps_what_ports_need(switch):
    kept = KEPT & ours("CapPrm")
    assert kept
    for status in statuses(switch.pid):
        assert capabilities(status) == {
            "CapInh": 0,
            "CapPrm": kept,
            "CapEff": kept,
            "CapBnd": FOR_WORKERS,
            "CapAmb": 0,
        }
        assert status["NoNewPrivs"] == "1"


@pytest.mark.usefixtures("root")
def test_workers_keep_nothing(switch):
    active, spare = switch.worker_pids()
    for pid in (active, spare):
        assert_confined(pid, FOR_WORKERS)


# --- whom anybody starts ---


def test_an_ordinary_user_can_switch_between_guests():
    """They have no right outside of a namespace, and no name in it."""
    directory = short_directory()
    with Switch(directory, prefix=ORDINARY) as switch:
        net = Net(switch)
        exchange_both_ways(net.guest("a"), net.guest("b"))
        with pytest.raises(RefusedError, match="CAP_NET_ADMIN"):
            switch.add_port("t", "tap:ordinary0")
        switch.wait_for_workers(1, 1)
        bound = ours("CapBnd")
        for status in statuses(switch.pid):
            assert int(status["CapPrm"], 16) == 0
            assert (status["NoNewPrivs"], status["Uid"][:2]) == ("1", "0\t")
            bound = int(status["CapBnd"], 16)
        for pid in switch.worker_pids():
            assert_confined(pid, bound)
        net.check()
        net.close()
    remove_directory(directory)


# --- who tries more ---

_TAKEN_OVER = """
import signal, socket
signal.signal(signal.SIGUSR1, lambda *_: socket.socket())
"""


def test_a_worker_that_was_taken_over_ends_and_its_guests_stay(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(_TAKEN_OVER)
    directory = short_directory()
    with Switch(directory, prefix=("env", f"PYTHONPATH={tmp_path}")) as switch:
        net = Net(switch)
        a, b = net.guest("a"), net.guest("b")
        exchange_both_ways(a, b)
        switch.wait_for_workers(1, 1)
        (active,) = switch.workers("active")
        os.kill(active["pid"], signal.SIGUSR1)
        switch.wait_for_log(f"died: SIGSYS pid={active['pid']}")
        exchange_both_ways(a, b)
        assert active["pid"] not in switch.worker_pids()
        net.check()
        net.close()
    remove_directory(directory)


_ATTEMPTS = """
import ctypes, errno, json, mmap, os, sys, threading
from vswitch import privileges, syscalls

libc = ctypes.CDLL(None, use_errno=True)
resolve = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name

def call(name, *arguments):
    # Nothing that any call could use, should it be made after all.
    padded = [ctypes.c_long(n) for n in (*arguments, *[-1] * (6 - len(arguments)))]
    if libc.syscall(ctypes.c_long(resolve(name.encode())), *padded) < 0:
        raise OSError(ctypes.get_errno(), name)

def thread():
    done = []
    one = threading.Thread(target=done.append, args=(1,))
    one.start()
    one.join()
    assert done

def map_memory():
    with mmap.mmap(-1, 1 << 20) as memory:
        memory[5] = 1

attempts = {name: lambda name=name: call(name) for name in syscalls.FATAL} | {
    "a process": lambda: call("clone", 17, 0, 0, 0, 0),  # SIGCHLD
    "a namespace": lambda: call("clone", 17 | 0x10000000, 0, 0, 0, 0),
    "code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "code, later": lambda: call("mprotect", 0, 4096, mmap.PROT_EXEC),
    "a signal": lambda: call("tgkill", os.getppid(), os.getppid(), 0),
    "writing": lambda: os.open(sys.argv[1], os.O_WRONLY),
    "appending": lambda: os.open(sys.argv[1], os.O_RDWR | os.O_APPEND),
    "reading": lambda: os.open(sys.argv[1], os.O_RDONLY),
    "making": lambda: os.open(sys.argv[1] + "2", os.O_RDONLY | os.O_CREAT),
    "listing": lambda: os.listdir("/"),
    "looking": lambda: os.stat(sys.argv[1]),
    "clone3": lambda: call("clone3"),
    "anything else": lambda: call("getpgid"),
    "abort": os.abort,
    "a thread": thread,
    "memory": map_memory,
    "nothing": lambda: None,
}
outcomes = {}
for name, attempt in attempts.items():
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        privileges.give_up()
        assert not syscalls.confine()
        try:
            attempt()
        except OSError as error:
            os._exit(error.errno)
        except BaseException:
            os._exit(255)
        os._exit(0)
    outcomes[name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Exit codes of processes that were confined and then tried something."""
    file = tmp_path_factory.mktemp("attempts") / "file"
    file.touch()
    done = subprocess.run(
        [sys.executable, "-c", _ATTEMPTS, str(file)],
        check=True,
        stdout=subprocess.PIPE,
        timeout=60,
        env=privileges.environment(),
    )
    assert [path.name for path in file.parent.iterdir()] == ["file"]
    return json.loads(done.stdout)


def test_what_only_an_intruder_would_call_is_fatal(outcomes):
    tried = [*syscalls.FATAL, "a process", "a namespace", "code", "code, later"]
    tried += ["a signal", "writing", "appending"]
    assert [n for n in tried if outcomes[n] != -signal.SIGSYS] == []
    assert len(set(tried)) > 100


@pytest.mark.parametrize(
    ("attempt", "outcome"),
    [
        ("reading", "EACCES"),
        ("making", "EACCES"),
        ("listing", "EACCES"),
        ("looking", "ENOSYS"),
        ("clone3", "ENOSYS"),
        ("anything else", "ENOSYS"),
    ],
)
def test_what_a_library_may_try_fails(outcomes, attempt, outcome):
    assert outcomes[attempt] == getattr(errno, outcome)


def test_what_a_worker_needs_is_there(outcomes):
    assert outcomes["abort"] == -signal.SIGABRT
    assert [outcomes[name] for name in ("a thread", "memory", "nothing")] == [0, 0, 0]


def test_without_the_library_workers_start_and_say_so(monkeypatch):
    monkeypatch.setattr(syscalls, "_LIBRARY", "libseccomp-none.so.2")
    assert syscalls.confine() == (
        "there is no libseccomp-none.so.2 (apt-get install libseccomp2)"
    )
