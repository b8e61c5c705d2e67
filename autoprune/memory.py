"""How this process gets memory from the system. For programs of our own: a library leaves its host's settings alone."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, <malloc.h>
_AS_LARGE_AS_CAN_BE = 2**31 - 1
_LARGE, _OLD_LIMIT = 2**30, 2**25
_WEIGHTS = 2**22
LARGE_MODEL = 2**28
"""Bytes of weights from which on what copies of a model leave behind outweighs what activations cost."""


def give_back() -> bool:
    """Let the system have what is free in this process: between stages, of which each has its own peak; whether that
    was done (glibc alone can).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    return trim is not None and bool(trim(0))


def keep_freed_memory() -> bool:
    """Let glibc reuse the memory of large tensors; whether that was done (elsewhere there is nothing to do).

    By default every block above 32 MB is mapped anew and given back when freed, and each of its pages costs a fault:
    a third to a half of a forward pass whose activations are that large.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    grown = mallopt(_MMAP_THRESHOLD, _LARGE) or mallopt(_MMAP_THRESHOLD, _OLD_LIMIT)
    return bool(grown and mallopt(_TRIM_THRESHOLD, _AS_LARGE_AS_CAN_BE))


def suit(model_bytes: int) -> bool:
    """Undo that for a large model, whose weights get blocks of their own that go back once freed; whether it was done.

    Copies that are cut leave holes all over the heap: at 100 M parameters the peak was 10.8 GB.
    """
    if model_bytes < LARGE_MODEL or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, _WEIGHTS) and mallopt(_TRIM_THRESHOLD, _OLD_LIMIT))
