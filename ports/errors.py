"""What can go wrong at a port, for those who can act on it.

    PortError
      x ProtocolError     the peer broke its protocol: end that session, keep switching

Texts read `what failed: what was found (what to do)` and do not name the port: whoever
catches one knows which port it was.
"""

import errno
import os
from collections.abc import Mapping


class PortError(Exception):
    """A port cannot be opened, or cannot go on."""


class ProtocolError(PortError):
    """The peer sent what its protocol forbids."""


def errno_name(error: OSError) -> str:
    """The error's symbol, as EACCES."""
    return errno.errorcode.get(error.errno or 0, str(error))


def explain(error: OSError, causes: Mapping[int, str], remedy: str = "") -> str:
    """What was found: the error's symbol, and why by `causes` (errno: text).

    Others are told in the kernel's words, and with `remedy` what to do about them.
    """
    number = error.errno or 0
    words = os.strerror(number) + (f" ({remedy})" if remedy else "")
    return f"{errno_name(error)}: {causes.get(number, words)}"
