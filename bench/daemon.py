"""Other people's processes: started in a directory of their own, and surely ended."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

START_S: Final = 30.0
_LAST_WORDS: Final = 500


class DaemonError(Exception):
    """One did not start, or did not do what it should."""


def end_in_order() -> None:
    """From now on SIGTERM ends this process as Ctrl-C does: with all that it started."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def missing(commands: Sequence[str], package: str) -> str:
    """Which of these is not there, and how to get it; or nothing."""
    for command in commands:
        if shutil.which(command) is None:
            return f"{command} is not installed (apt-get install {package})"
    return ""


def ask(
    command: Sequence[str], what: str, environment: Mapping[str, str] = os.environ
) -> str:
    """What a command that controls a daemon says; `what` it is called in an error.

    Raises:
        DaemonError: It failed, with what it said.
    """
    done = subprocess.run(
        list(command),
        check=False,
        env=environment,
        timeout=2 * START_S,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        message = f"{what} failed: {said}"
        raise DaemonError(message)
    return done.stdout


@contextmanager
def run_directory() -> Iterator[Path]:
    """A directory for one run; a short path, as sockets need."""
    directory = Path(tempfile.mkdtemp(prefix="vswitch-bench-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def running(
    command: Sequence[str], log: Path, environment: Mapping[str, str] = os.environ
) -> "Iterator[subprocess.Popen[bytes]]":
    """A process in a group of its own; what it prints goes to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask the group to end; insist."""
    for number in (signal.SIGCONT, signal.SIGTERM):
        tell(process.pid, number)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=START_S)
    tell(process.pid, signal.SIGKILL)
    process.wait()


def tell(group: int, number: signal.Signals) -> None:
    """Send a signal to a process group, as far as it still exists."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def wait_until(
    condition: Callable[[], bool],
    what: str,
    log: Path,
    process: "subprocess.Popen[bytes]",
) -> None:
    """Wait until a process that was started has come so far.

    Raises:
        DaemonError: It ended, or did not come so far in time; with the end of its log.
    """
    deadline = time.monotonic() + START_S
    while not condition():
        ended = process.poll() is not None
        if ended or time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-_LAST_WORDS:].strip()
            when = "when it ended" if ended else f"within {START_S:.0f} s"
            message = f"no {what} {when}, having said: {said or 'nothing'}"
            raise DaemonError(message)
        time.sleep(0.01)
