"""How the C library hands memory back."""

from __future__ import annotations

import contextlib
import ctypes
import os

MMAP_THRESHOLD = -3
"""glibc's number of the option (malloc.h)."""

RETURNED = 2**22
"""Bytes from which a freed block is returned."""


def return_freed_blocks() -> None:
    """Have glibc return a block of 4 MiB or more to the system once it is freed; no effect with other C libraries.

    By default glibc keeps freed blocks of up to 32 MiB in its heap. There the blocks that a layer frees lie between
    those that are still needed, and a later layer's do not fit into the gaps: in long contexts on a CPU, a process took
    twice the memory of its tensors. The environment variable MALLOC_MMAP_THRESHOLD_ has precedence.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not a C library with this function
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, RETURNED)
