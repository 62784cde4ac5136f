"""Run a command to which a system call is forbidden, as a container's runtime does it.

    python -m tests.forbid NAME ERRNO COMMAND...

seccomp(2), linux/filter.h; on x86-64.
"""

import ctypes
import os
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORBID = ("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.forbid")

_NUMBERS = {"io_uring_setup": 425}
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000


def forbid(number, error):
    """From now on, and in whatever this becomes, that call fails with that error."""
    lines = (
        (_LOAD, 0, 0, 0),  # its number
        (_JUMP_EQUAL, 0, 1, number),
        (_RETURN, 0, 0, _ERROR | error),
        (_RETURN, 0, 0, _ALLOW),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *x) for x in lines))
    program = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_SET_NO_NEW_PRIVS, 1, 0), (_SET_SECCOMP, _FILTER, program)):
        if libc.prctl(*arguments, 0, 0):
            raise OSError(ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    name, error, *command = sys.argv[1:]
    forbid(_NUMBERS[name], int(error))
    os.execvp(command[0], command)
