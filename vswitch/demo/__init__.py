"""The demo: real guests talk through the switch, on the machine of whoever asks.

    image, qemu, shell, qmp     the real guests, which the tests use too
    screen, switch              what is shown; the switch through its own commands
    real, builtin               the two kinds of guests of the story
    story, throughput           what happens, in its order

Everything happens in a private temporary directory and, where the kernel allows it, in a
network namespace of the demo's own, so that no name or address of the host is touched.
"""

import os
import shutil
import subprocess
import sys
from typing import Final

from vswitch.errors import ConfigError

GUESTS: Final = ("auto", "qemu", "builtin")


def run(guests: str = "auto") -> int:
    """Play the demo and return its exit code.

    Args:
        guests: "qemu", "builtin", or "auto": QEMU where it is installed.

    Raises:
        ConfigError: There is no such kind of guest.
    """
    if guests not in GUESTS:
        text = f"cannot play the demo with guests {guests!r}: no such kind"
        raise ConfigError(f"{text} (known: {', '.join(GUESTS)})")
    inside = [sys.executable, "-m", "vswitch.demo", guests]
    namespace = _own_network()
    sys.stdout.flush()
    os.execvp((namespace + inside)[0], namespace + inside)  # noqa: S606 - no shell wanted


def _own_network() -> list[str]:
    """The command that starts another in a network namespace; empty if we may not."""
    ways: list[list[str]] = [["unshare", "--net"]]
    if os.geteuid() != 0:
        ways = [["unshare", "--user", "--map-root-user", "--net"]]
    for way in ways if shutil.which("unshare") else []:
        if subprocess.run([*way, "true"], capture_output=True, check=False).returncode:
            continue
        return [*way, "--"]
    return []
