"""The command as users type it."""

import json
import os
import select
import signal
import subprocess
import sys

VSWITCH = [sys.executable, "-m", "vswitch.cli"]
FAILED, NO_MANAGER = 1, 3


class Shell:
    """Runs `vswitch` in a directory of its own."""

    def __init__(self, directory):
        self.directory = directory
        self.run_dir = directory / "run"

    def start(self, *arguments, **options):
        environment = os.environ | {"VSWITCH_RUN_DIR": str(self.run_dir)}
        return subprocess.Popen(
            [*VSWITCH, *arguments],
            cwd=self.directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, *arguments):
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def ok(self, *arguments):
        code, out, err = self.run(*arguments)
        assert code == 0, (out, err)
        return out

    def json(self, *arguments):
        return json.loads(self.ok(*arguments, "-j"))

    def kill_manager(self):
        """kill -9; it has ended when its lock is free."""
        pid = int((self.run_dir / "pid").read_text())
        process = os.pidfd_open(pid)
        signal.pidfd_send_signal(process, signal.SIGKILL)
        select.select([process], [], [], 60)
        os.close(process)

    def error(self, *arguments):
        """The exit code and the one line of an error."""
        code, _, err = self.run(*arguments)
        assert code != 0
        assert err.startswith("vswitch: ")
        assert err.count("\n") == 1, err
        return code, err
