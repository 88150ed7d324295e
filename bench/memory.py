"""A parent of a given size."""

from __future__ import annotations

import mmap
import os

_PAGE = mmap.PAGESIZE
_ballast: list[mmap.mmap] = []


def grow_to(megabytes: int) -> None:
    """Fill this process's memory up to a resident size of `megabytes`, in small pages as a Python heap has them."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    size = (megabytes << 20) - resident
    if size <= 0:
        return
    # Private: a fork does not copy the page tables of shared memory, so that shared ballast would weigh nothing.
    ballast = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ballast.madvise(mmap.MADV_NOHUGEPAGE)
    pages = (size + _PAGE - 1) // _PAGE
    ballast[::_PAGE] = b"x" * pages
    _ballast.append(ballast)
