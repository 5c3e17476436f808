"""Tune the C library's heap for tensors that are allocated and freed by the hundred in each step."""

from __future__ import annotations

import ctypes
import platform
import sys

# <malloc.h> of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Keep freed host memory for reuse instead of returning it to the system; returns whether that took effect.

    glibc maps every block above a few hundred kilobytes separately, and unmaps it when it is freed. Each activation of
    a model on the CPU then costs page faults over zeroed pages, a fifth of a step's time
    (``benchmarks/RESULTS.md``). In the heap, the memory of one step serves the next; the peak stays the same. This
    matters only for computing on the CPU, because a GPU's tensors are not in this heap. Without glibc nothing is
    changed.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # mallopt returns 1 on success; the threshold -1 is the largest value: never trim
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
