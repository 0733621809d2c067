"""The C library's memory allocation in a training on a CPU."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT = 2**31 - 1
"""Bytes of free memory at the end of the heap above which some of it is returned; the highest value of `mallopt`."""
LARGEST = 2**26
"""Bytes from which an allocation is a mapping of its own, which is returned when it is freed."""


def keep_freed_memory() -> bool:
    """Make glibc reuse the memory of freed tensors instead of returning it to the system; False where that can't be.

    By default, glibc returns the free end of its heap, and the system clears every page again on its next use: up to
    6 % of the CPU time of a training step (benchmarks/RESULTS.md). A step allocates the same sizes as the one before,
    so the memory of the process hardly grows. Larger tensors than `LARGEST` would let it grow, since aligned ones don't
    fit into the memory of a freed one of the same size (glibc bug 14581).

    Nothing changes if the environment sets these thresholds (mallopt(3), MALLOC_TRIM_THRESHOLD_ and
    MALLOC_MMAP_THRESHOLD_), or on a system without glibc.
    """
    given = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    if not sys.platform.startswith("linux") or given:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from musl
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, KEPT))
