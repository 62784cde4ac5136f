"""A guest that changes bytes while they are looked at, as fast as one process can.

python race.py FD SIZE (OFFSET FORMAT ONE OTHER)...: map the file and write the two values
in turn at each offset, until killed. Each is one store of 1, 2, 4 or 8 bytes. Neighbours
change at different rates, so that every mix of their values is there for a while.
"""

import itertools
import mmap
import sys

import numpy as np

RATES = 4
WIDTH = {"B": np.uint8, "H": np.uint16, "I": np.uint32, "Q": np.uint64}


def main():
    fd, size, *rest = sys.argv[1:]
    memory = mmap.mmap(int(fd), int(size))
    words = []
    for offset, kind, one, other in zip(*[iter(rest)] * 4, strict=True):
        word = np.frombuffer(memory, WIDTH[kind], 1, int(offset))
        words.append((word, len(words) % RATES, (int(one), int(other))))
    print("begun", flush=True)  # noqa: T201 (whoever started us waits for it)
    for turn in itertools.count():
        for word, rate, values in words:
            word[0] = values[turn >> rate & 1]


if __name__ == "__main__":
    main()
