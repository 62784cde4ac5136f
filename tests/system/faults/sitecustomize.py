"""Faults for workers, on the module path of a test's switch: a signal begins each.

The handlers are C's, so they run at once, in the middle of a turn as well.
"""

import ctypes
import os
import signal
import sys


def _spin(_):
    while True:
        pass


def _wait(_):
    os.read(_SILENT, 1)


# Made before the worker gives up its right to.
_SILENT = os.pipe()[0]
_FAULTS = {signal.SIGUSR1: _spin, signal.SIGUSR2: _wait}

if "vswitch.worker" in sys.orig_argv:
    _kept = []
    for _number, _fault in _FAULTS.items():
        _kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(_fault))
        ctypes.CDLL(None).signal(int(_number), _kept[-1])
