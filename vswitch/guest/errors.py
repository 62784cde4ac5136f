"""What a user of the guest library can catch."""

from vswitch.errors import VswitchError


class GuestError(VswitchError):
    """What failed: what was found (what to do)."""
