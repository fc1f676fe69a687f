"""Large outputs without page faults: a heap that keeps the memory it was given.

glibc takes a block above its mmap threshold (32 MB at most) from the system and gives it back when
freed, so each fresh output of that size is mapped, zeroed and faulted in page by page: 20 ms for 64
MB, several times what any kernel needs. A program that runs a model usually keeps its memory; told
to, so does the heap.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

# From malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1
_DEFAULTS = (
    (_M_MMAP_MAX, 65_536),
    (_M_TRIM_THRESHOLD, 128 * 1024),
    (_M_MMAP_THRESHOLD, 128 * 1024),
)


def _mallopt(parameter: int, value: int) -> bool:
    return bool(ctypes.CDLL(None).mallopt(ctypes.c_int(parameter), ctypes.c_int(value)))


@contextlib.contextmanager
def kept_heap(wanted: bool = True) -> Iterator[bool]:
    """In the block the C library keeps its memory: none is taken from the system for a single
    allocation, or given back. Yields whether it does so.

    The first calls still grow the heap. Only glibc can be told, process-wide; afterwards its
    initial thresholds hold, fixed.
    """
    keeps = (
        wanted
        and platform.libc_ver()[0] == "glibc"
        and _mallopt(_M_MMAP_MAX, 0)
        and _mallopt(_M_TRIM_THRESHOLD, _NEVER)
    )
    try:
        yield keeps
    finally:
        if keeps:
            for parameter, value in _DEFAULTS:
                _mallopt(parameter, value)
            ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
