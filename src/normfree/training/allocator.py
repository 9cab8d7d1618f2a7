"""Keep freed memory in the process on glibc: a training step frees and asks for the same blocks again and again.

By default glibc hands blocks of more than 128 KiB back to the system at once, and each step pays the page faults
to get them again. Only commands call this; importing the library never touches the allocator.
"""

from __future__ import annotations

import ctypes
import platform

# Names and numbers of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Stop glibc from returning freed blocks to the system; True where that took effect.

    Peak memory stays what it was, but it is held until the process ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST_INT), (M_TOP_PAD, 64 * 2**20))
    return [mallopt(name, value) for name, value in settings] == [1, 1, 1]
