"""The system calls of a worker: a seccomp filter, made by libseccomp.

What a worker calls between two frames is known, so that is allowed and no more. A call that
is not in the tables fails as if the kernel had none, which C libraries are prepared for:
another version of one may try something new. What only somebody who has taken a
worker over would call ends it at once with SIGSYS, which the manager logs as the cause;
the kernel's log has the number of the call.

io_uring is none of it: what a ring is asked to do passes by every filter. A worker has its
one ring before, restricted to writes (`ports.uring`).

seccomp(2), seccomp_rule_add(3); the numbers are those of seccomp.h.
"""

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import Final, NamedTuple

from ports.errors import errno_name

_LIBRARY: Final = "libseccomp.so.2"

_KILL: Final = 0x80000000  # the process, not one of its threads
_ERROR: Final = 0x00050000
_ALLOW: Final = 0x7FFF0000

_NOT_EQUAL: Final = 1
_EQUAL: Final = 4
_MASKED: Final = 7  # under a mask, equal

# Attributes of a filter. Workers run no code of guests, so the kernel's measures against
# speculation across a filter, slow before Linux 5.16, would guard nobody.
_OTHER_ARCHITECTURES: Final = 2
_ALL_THREADS: Final = 4
_NO_SLOW_SPECULATION: Final = 7  # since libseccomp 2.5, as the next
_AS_A_TREE: Final = 8
_ATTRIBUTES: Final = {
    _OTHER_ARCHITECTURES: _KILL,
    _ALL_THREADS: 1,
    _NO_SLOW_SPECULATION: 1,
    _AS_A_TREE: 2,
}

# Without a condition; those of the data path cost no more than without a filter.
ALLOWED: Final = (
    *("read", "write", "writev", "sendto", "recvfrom", "sendmmsg", "io_uring_enter"),
    *("sendmsg", "recvmsg", "epoll_wait", "epoll_pwait", "epoll_ctl", "poll", "ppoll"),
    *("close", "dup2", "dup3"),
    *("brk", "munmap", "mremap", "madvise"),
    *("futex", "set_robust_list", "rseq", "sched_yield", "sched_getaffinity"),
    *("gettid", "getpid", "getrandom"),
    *("clock_gettime", "gettimeofday", "time", "nanosleep", "clock_nanosleep"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "setitimer"),
    *("restart_syscall", "exit", "exit_group"),
)

FATAL: Final = (
    # other programs, other processes
    *("execve", "execveat", "fork", "vfork", "kill", "tkill", "pidfd_send_signal"),
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise"),
    *("pidfd_open", "pidfd_getfd", "kcmp", "sched_setaffinity"),
    # connections
    *("socket", "socketpair", "connect", "bind", "listen", "accept", "accept4"),
    # files
    *("creat", "openat2", "open_by_handle_at", "truncate", "ftruncate", "mknod"),
    *("mknodat", "link", "linkat", "symlink", "symlinkat", "rename", "renameat"),
    *("renameat2", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "chmod"),
    *("fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat"),
    # other rights, other views of the system
    *("capset", "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid"),
    *("setgroups", "setfsuid", "setfsgid", "unshare", "setns", "chroot", "pivot_root"),
    *("mount", "umount2", "fsopen", "fsmount", "move_mount", "open_tree"),
    *("mount_setattr", "personality", "modify_ldt", "iopl", "ioperm", "seccomp"),
    # where kernels have been broken
    *("bpf", "io_uring_setup", "io_uring_register", "userfaultfd", "perf_event_open"),
    *("add_key", "request_key", "keyctl", "kexec_load", "kexec_file_load"),
    *("init_module", "finit_module", "delete_module", "pkey_mprotect"),
    *("swapon", "swapoff", "reboot", "settimeofday", "clock_settime", "adjtimex"),
)

_THREAD: Final = 0x10000  # CLONE_THREAD
_EXECUTE: Final = 4  # PROT_EXEC
_ACCESS: Final = 3  # O_ACCMODE; 0 is reading


class Condition(NamedTuple):
    """What an argument of a call has to be."""

    argument: int
    how: int
    value: int
    masked: int = 0  # what is left of it under `value` as a mask


class Rule(NamedTuple):
    """What becomes of a call."""

    name: str
    action: int
    condition: Condition | None = None


def _rules(pid: int) -> list[Rule]:
    """All rules. Of the conditions of a call one holds at most, so order is nothing."""
    refuse = _ERROR | errno.EACCES
    return [
        *(Rule(name, _ALLOW) for name in ALLOWED),
        *(Rule(name, _KILL) for name in FATAL),
        # Threads, no processes. clone3 hides its flags; C libraries do without it.
        Rule("clone", _ALLOW, Condition(0, _MASKED, _THREAD, _THREAD)),
        Rule("clone", _KILL, Condition(0, _MASKED, _THREAD, 0)),
        # Memory, no code.
        *(
            rule
            for name in ("mmap", "mprotect")
            for rule in (
                Rule(name, _ALLOW, Condition(2, _MASKED, _EXECUTE, 0)),
                Rule(name, _KILL, Condition(2, _MASKED, _EXECUTE, _EXECUTE)),
            )
        ),
        # A traceback reads the sources, if it may.
        *(
            Rule(
                name,
                _KILL if access else refuse,
                Condition(argument, _MASKED, _ACCESS, access),
            )
            for name, argument in (("open", 1), ("openat", 2))
            for access in range(_ACCESS + 1)
        ),
        # A library that aborts signals itself.
        Rule("tgkill", _ALLOW, Condition(0, _EQUAL, pid)),
        Rule("tgkill", _KILL, Condition(0, _NOT_EQUAL, pid)),
    ]


class _Compare(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("how", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("masked", ctypes.c_uint64),
    )


def confine() -> str:
    """Filter the calls of all threads of this process, and of those it will start.

    Returns:
        Why they are not; empty if they are.
    """
    try:
        library = _load()
    except OSError:
        return f"there is no {_LIBRARY} (apt-get install libseccomp2)"
    filter_ = library.seccomp_init(_ERROR | errno.ENOSYS)
    if not filter_:
        return f"{_LIBRARY} makes none"
    try:
        for attribute, value in _ATTRIBUTES.items():
            library.seccomp_attr_set(filter_, attribute, value)  # as far as it knows it
        for rule in _rules(os.getpid()):
            if failed := _add(library, filter_, rule):
                return f"{_LIBRARY} makes no rule for {rule.name}: {failed}"
        return _name(library.seccomp_load(filter_))
    finally:
        library.seccomp_release(filter_)


def _add(library: ctypes.CDLL, filter_: int, rule: Rule) -> str:
    """Add a rule; what failed. A call that the library does not know fails anyway."""
    number = library.seccomp_syscall_resolve_name(rule.name.encode())
    if number < 0:
        return ""
    conditions = [_Compare(*rule.condition)] if rule.condition else []
    array = (_Compare * len(conditions))(*conditions)
    added: int = library.seccomp_rule_add_array(
        filter_, rule.action, number, len(conditions), array
    )
    return _name(added)


def _name(result: int) -> str:
    return errno_name(OSError(-result, os.strerror(-result))) if result < 0 else ""


def _load() -> ctypes.CDLL:
    """The library; it outlives no call that needs it. Raises OSError."""
    library = ctypes.CDLL(_LIBRARY)
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    library.seccomp_init.restype = pointer
    arguments: dict[str, Sequence[object]] = {
        "seccomp_init": (number,),
        "seccomp_release": (pointer,),
        "seccomp_load": (pointer,),
        "seccomp_attr_set": (pointer, ctypes.c_int, number),
        "seccomp_syscall_resolve_name": (ctypes.c_char_p,),
        "seccomp_rule_add_array": (
            *(pointer, number, ctypes.c_int, ctypes.c_uint),
            ctypes.POINTER(_Compare),
        ),
    }
    for name, types in arguments.items():
        getattr(library, name).argtypes = types
    return library
