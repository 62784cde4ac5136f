"""Front-ends that die at a chosen byte."""

from vswitch.guest.frontend import Frontend


class HangUpError(Exception):
    pass


class Quitter(Frontend):
    """A front-end that dies after some messages, in the middle of the next."""

    whole = 0  # messages before
    part = 0  # bytes of the next

    def send_raw(self, data, fds=()):
        if self.whole == 0:
            if self.part:
                super().send_raw(data[: self.part], fds)
            raise HangUpError
        self.whole -= 1
        super().send_raw(data, fds)


def quit_after(guest, path, whole, part, ack):
    """Attach a guest, but hang up at that message and byte."""
    guest.frontend = Quitter.connect(path, ack=ack)
    guest.frontend.whole, guest.frontend.part = whole, part
    try:
        guest._negotiate(guest.frontend)
        guest.start()
    except HangUpError:
        pass
    guest.disconnect()
