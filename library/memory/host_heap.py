"""The C library's heap, set for tensors that come and go by the hundred in each step."""

from __future__ import annotations

import ctypes
import platform
import sys

# <malloc.h> of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let freed host memory be used again instead of handing it back to the system; returns whether that took effect.

    glibc gives every block above a few hundred kilobytes a mapping of its own, and unmaps it when it is freed: each
    activation of a model on the CPU is then paid for by page faults over zeroed pages, a fifth of a step's time
    (``benchmarks/RESULTS.md``). Kept in the heap, the memory of one step serves the next; the peak stays the same.
    For computing on the CPU only: a GPU's tensors do not live here. Elsewhere than on glibc nothing is changed.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # mallopt returns 1 on success; -1 as a threshold is the largest there is: never trim
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
