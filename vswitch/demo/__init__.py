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

from vswitch.demo import image, qemu
from vswitch.demo.screen import Screen
from vswitch.errors import ConfigError, VswitchError

GUESTS: Final = ("auto", "qemu", "builtin")
_INTERRUPTED: Final = 130


def run(guests: str = "auto") -> int:
    """Play the demo and return its exit code.

    Args:
        guests: "qemu", "builtin", or "auto": QEMU where it is installed.

    Raises:
        ConfigError: There is no such kind of guest.
        VswitchError: QEMU guests were asked for and there is no image for them.
    """
    if guests not in GUESTS:
        text = f"cannot play the demo with guests {guests!r}: no such kind"
        raise ConfigError(f"{text} (known: {', '.join(GUESTS)})")
    if guests != "builtin" and qemu.is_installed():
        guests = _with_image(guests)
    inside = [sys.executable, "-m", "vswitch.demo", guests]
    namespace = _own_network()
    sys.stdout.flush()
    os.execvp((namespace + inside)[0], namespace + inside)  # noqa: S606 - no shell wanted


def _with_image(guests: str) -> str:
    """Fetch the guests' image while there is a network; the guests to play with."""
    try:
        if image.cached() is None:
            Screen().note("fetching Debian's cloud kernel and busybox, once ...")
            image.prepare()
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except VswitchError as error:
        if guests == "qemu":
            raise
        Screen().note(f"{error}: using built-in guests instead")
        return "builtin"
    return guests


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
