"""The C library's allocator, told that a training run takes again the memory it gives back."""

import ctypes

# glibc's numbers for mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Make glibc keep freed memory; do nothing where the C library is another.

    Every step on the CPU frees gigabytes and takes them again. By default each large block goes back to the system, and
    coming back costs page faults: 6 to 8 % of a step of pretraining, a fifth of a classifier's (docs/results.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # large blocks from the heap ...
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # ... which is not cut back
