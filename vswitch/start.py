"""Start a manager in the background and wait until frames can flow; wait for one's end."""

import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgpack

from vswitch import privileges
from vswitch.control import rundir
from vswitch.errors import VswitchError

_END_S: Final = 15.0


def start(
    arguments: Sequence[str], run_dir: Path, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Start a manager; what it says of itself once it is ready.

    Args:
        arguments: Options of `python -m vswitch.manager`.
        run_dir: The run directory; its log gets what the manager prints.
        on_progress: Called with functions compiled and functions in all.

    Raises:
        VswitchError: It did not start.
    """
    rundir.make(run_dir)
    log = run_dir / rundir.LOG
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb", buffering=0) as status:
        process = _spawn([*arguments, "--status-fd", str(write_end)], log, write_end)
        os.close(write_end)
        try:
            for event in msgpack.Unpacker(status, read_size=1):
                if "progress" in event:
                    on_progress(*event["progress"])
                elif "error" in event:
                    error = VswitchError(event["error"]["message"])
                    error.code = event["error"]["code"]
                    raise error
                else:
                    return dict(event["ready"])
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    said = lines[-1] if lines else "nothing"
    text = f"the manager ended with status {process.returncode}, having said: {said}"
    raise VswitchError(f"{text} (more in {log})")


@contextmanager
def until_ended(pid: int) -> Iterator[int]:
    """Have a manager told to end in the block, and wait for it; yields its pidfd.

    Raises:
        VswitchError: It does not end.
    """
    process = os.pidfd_open(pid)
    try:
        yield process
        if not select.select([process], [], [], _END_S)[0]:
            text = f"the manager, pid {pid}, did not end within {_END_S:.0f} s"
            advice = f"kill -9 {pid}, then vswitch up goes on, vswitch down cleans up"
            raise VswitchError(f"{text} ({advice})")
    finally:
        os.close(process)


def command(arguments: Sequence[str]) -> list[str]:
    """The command that runs a manager."""
    return [sys.executable, "-m", "vswitch.manager", *arguments]


def _spawn(
    arguments: Sequence[str], log: Path, status_fd: int
) -> "subprocess.Popen[bytes]":
    try:
        output = log.open("ab")
    except OSError as error:
        raise rundir.unusable(log.parent, error) from error
    with output:
        return subprocess.Popen(
            command(arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(status_fd,),
            start_new_session=True,
            env=privileges.environment(),
        )
