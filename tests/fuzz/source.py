"""Choices read off bytes, so that whoever mutates the bytes varies the choices."""


class Source:
    """Bytes and how far they have been read; behind their end there are zeroes."""

    def __init__(self, data):
        self._data, self._at = data, 0

    def __bool__(self):
        return self._at < len(self._data)

    def byte(self):
        return self.take(1)[0]

    def number(self, width):
        return int.from_bytes(self.take(width), "little")

    def take(self, count):
        data = self._data[self._at : self._at + count]
        self._at += count
        return data.ljust(count, b"\0")

    def pick(self, choices):
        return choices[self.byte() % len(choices)]

    def known(self, choices, width):
        """One of the choices, or any number of so many bytes."""
        at = self.byte()
        return choices[at] if at < len(choices) else self.number(width)
