"""Count the threads of this process: a fork is safe when there is one."""

from __future__ import annotations

import errno
import os

from . import syscalls


def count_threads() -> int | None:
    """Return the number of threads, including those of C libraries. None if there is no /proc.

    Workers of io_uring are not counted. The kernel lists them (Linux 5.12+, 5.10.162+), but they run no code of the process,
    so they hold no lock. A process with uvloop has such a worker for some seconds, after a change to its epoll found a lock
    taken.

    OSError: EMFILE, ENFILE: out of descriptors.
    """
    try:
        threads = os.listdir("/proc/self/task")
    except OSError as exc:
        if exc.errno in syscalls.OUT_OF_DESCRIPTORS:
            raise syscalls.error(exc.errno or errno.EIO, "opendir(/proc/self/task)") from exc
        return None  # ENOENT: no /proc, or that of a PID namespace without this process. EACCES: a sandbox
    return 1 if len(threads) == 1 else sum(not _is_uring_worker(thread) for thread in threads)


def _is_uring_worker(thread: str) -> bool:
    try:
        with open(f"/proc/self/task/{thread}/comm", "rb") as comm:
            return comm.read().startswith((b"iou-wrk-", b"iou-sqp-"))
    except (FileNotFoundError, ProcessLookupError):  # it has ended by now
        return False
