"""What happens to somebody who is not us: root becomes them first."""

import subprocess
import sys
from typing import NamedTuple

from tests import requirements

# All is imported before: they may not be able to read our files.
_BECOME = """
import os, sys
{imports}
uid, gid, *others = map(int, sys.argv.pop(1).split(","))
os.setgroups(others)
os.setresgid(gid, gid, gid)
os.setresuid(uid, uid, uid)
{code}
"""


# Parsing options loads what the first command needs.
_CLI = """
from contextlib import suppress
from vswitch import cli
from vswitch.errors import NoManagerError
with suppress(NoManagerError):
    cli.app(["--run-dir", "/nowhere", "show"])
"""


class User(NamedTuple):
    """Somebody who has no name on this machine."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    def run(self, imports, code, *arguments):
        """Exit code, output and errors of Python code in a process of theirs."""
        requirements.require_root()
        ids = ",".join(map(str, (self.uid, self.gid, *self.groups)))
        program = _BECOME.format(imports=imports, code=code)
        done = subprocess.run(
            [sys.executable, "-c", program, ids, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    def vswitch(self, run_dir, *arguments):
        """The same of the command `vswitch`."""
        return self.run(_CLI, "cli.main()", "--run-dir", run_dir, *arguments)


STRANGER = User(54321, 54321)
GROUP = 54322
