"""Keeps freed memory in the process, so that a step does not ask the kernel for the same pages again.

glibc gives large freed blocks back at once; the next layer's tensors then come as fresh pages that the kernel clears,
tens of thousands a step.
"""

from __future__ import annotations

import ctypes
import functools
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters in malloc.h
_LARGEST_MMAP_THRESHOLD = 1 << 25  # glibc takes no more


@functools.cache
def keep_freed_memory() -> bool:
    """Raises glibc's thresholds for the rest of the process; returns False where the C library is another."""
    library = _glibc()
    if library is None:
        return False
    taken = library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    return bool(taken and library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))


def give_back_freed_memory() -> None:
    """Gives what is freed and kept back to the kernel, so that the memory in use can be seen; without glibc nothing."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
