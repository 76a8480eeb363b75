"""Memory of training on a processor: freed tensors go back to the system."""

from __future__ import annotations

import ctypes
import sys

_THRESHOLD = 1 << 20
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def return_freed_tensors() -> bool:
    """Let glibc map every block of 1 MB or more by itself; whether it does now.

    By default it raises that limit to 32 MB as such blocks are freed, and carves activations and
    gradients, of about that size, out of one heap. Their lives end in another order than they
    began, so that the heap keeps holes: with a 0.5B model 1 GB of 11. Costs a page fault per 4 KB
    of each new tensor. Does nothing on other systems.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD))
    except (AttributeError, OSError):  # another C library
        return False
