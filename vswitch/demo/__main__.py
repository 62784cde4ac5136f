"""The demo's process: started by `vswitch.demo.run`, perhaps in its own namespace."""

import signal
import sys

# Until the story handles it, Ctrl-C just ends us: there is nothing to clean up yet.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from vswitch.demo.story import play  # noqa: E402 - Numba alone takes half a second

if __name__ == "__main__":
    sys.exit(play(sys.argv[1]))
