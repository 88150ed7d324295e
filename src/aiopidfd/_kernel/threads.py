"""How many threads this process has, which decides whether a fork is safe."""

from __future__ import annotations

import errno
import os

from . import syscalls


def count_threads() -> int | None:
    """Return how many threads this process has, those of C libraries among them; None if there is no /proc to tell.

    io_uring's workers (Linux 5.12+, 5.10.162+) don't count, though the kernel lists them: they run none of the process's
    code, so they hold none of its locks. uvloop's process has one for some seconds whenever a change to its epoll met a lock
    taken.

    OSError: EMFILE, ENFILE: out of descriptors.
    """
    try:
        threads = os.listdir("/proc/self/task")
    except OSError as exc:
        if exc.errno in syscalls.OUT_OF_DESCRIPTORS:
            raise syscalls.error(exc.errno or errno.EIO, "opendir(/proc/self/task)") from exc
        return None  # ENOENT: no /proc, or that of a PID namespace that this process is not in; EACCES: a sandbox
    return 1 if len(threads) == 1 else sum(not _is_uring_worker(thread) for thread in threads)


def _is_uring_worker(thread: str) -> bool:
    try:
        with open(f"/proc/self/task/{thread}/comm", "rb") as comm:
            return comm.read().startswith((b"iou-wrk-", b"iou-sqp-"))
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return False
