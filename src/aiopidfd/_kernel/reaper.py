"""C structures that watch many children and reap them in batches: `Reaper` by pidfd, `Pids` by pid."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Final

from .._ext import ffi, lib
from .syscalls import RECORD, close_tracked_fd, error, untrack_fd

ADD_PEEK: Final = lib.AP_ADD_PEEK
ADD_CHECK_CHILD: Final = lib.AP_ADD_CHECK_CHILD

SOURCE_REAPED: Final = lib.AP_SOURCE_REAPED
SOURCE_PEEKED: Final = lib.AP_SOURCE_PEEKED
SOURCE_RECOVERED: Final = lib.AP_SOURCE_RECOVERED
SOURCE_LOST: Final = lib.AP_SOURCE_LOST
SOURCE_PENDING: Final = lib.AP_SOURCE_PENDING
SOURCE_GATE_READY: Final = lib.AP_SOURCE_GATE_READY
SOURCE_GATE_CLOSED: Final = lib.AP_SOURCE_GATE_CLOSED

Record = tuple[int, int, int, int, bytes]
"""pid, pidfd (-1: none), wait status, source (SOURCE_*), rusage. Of a start gate: minus its number, instead of the pid."""


class Batch:
    """Children that were reaped and are not reported yet: an `ap_batch`."""

    __slots__ = ("_records", "struct")

    def __init__(self) -> None:
        self.struct = ffi.new("ap_batch *")
        self._records = memoryview(ffi.buffer(self.struct))[ffi.offsetof("ap_batch", "exits") :]

    def records(self, count: int) -> Iterator[Record]:
        """Return the first `count` records."""
        return RECORD.iter_unpack(self._records[: count * RECORD.size])

    def keep_open(self, pidfd: int) -> None:
        """Remove `pidfd` from the batch, so that `release` does not close it: other code has closed it."""
        for i in range(self.struct.count):
            if self.struct.exits[i].pidfd == pidfd:
                self.struct.exits[i].pidfd = -1

    def release(self) -> None:
        """Close the pidfds of the batch and empty it."""
        lib.ap_batch_release(self.struct)


# As Reaper.add, but the first argument is the reaper's descriptor, and an error is returned as -errno. A method call would
# double the cost.
try_add: Final[Callable[[int, int, int], int]] = lib.ap_reaper_add


class Reaper:
    """One epoll descriptor that holds many pidfds. The C contract is in cffi_build/reaper.h."""

    __slots__ = ("_batch", "fd", "keep_open", "release")

    def __init__(self) -> None:
        """Open the epoll descriptor. EMFILE, ENFILE: out of descriptors."""
        self.fd = -1
        self.reopen()
        self._batch = Batch()
        self.keep_open, self.release = self._batch.keep_open, self._batch.release

    def mark_closed(self) -> None:
        """Note that other code has closed the descriptor. Do not close it: another file may have its number."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            untrack_fd(fd)

    def reopen(self) -> None:
        """Open the epoll descriptor again after a close. EMFILE, ENFILE: out of descriptors."""
        fd = lib.ap_reaper_open()
        if fd < 0:
            raise error(-fd, "epoll_create1()")
        self.fd = fd

    def add(self, pid: int, flags: int) -> int:
        """Open a pidfd for `pid` and add it. Return the pidfd. The errors are those in reaper.h."""
        pidfd = lib.ap_reaper_add(self.fd, pid, flags)
        if pidfd == -errno.ENOENT:  # `pid` is the ID of a thread (EINVAL before Linux 6.9)
            pidfd = -errno.ESRCH
        if pidfd < 0:
            raise error(-pidfd, f"cannot watch pid {pid}")
        return pidfd

    def adopt(self, pid: int, pidfd: int, flags: int) -> None:
        """Add an open pidfd. EEXIST: it was added before. EBADF, EPERM: it is no pidfd."""
        result = lib.ap_reaper_adopt(self.fd, pid, pidfd, flags)
        if result < 0:
            raise error(-result, f"cannot watch pid {pid} by pidfd {pidfd}")

    def add_wake(self, fd: int) -> None:
        """Add the wake descriptor: a write to it makes the reaper readable and sets `woken`. Ignored by a closed reaper."""
        if self.fd < 0:
            return
        result = lib.ap_reaper_add_wake(self.fd, fd)
        if result < 0:
            raise error(-result, "epoll_ctl(EPOLL_CTL_ADD)")

    def modify(self, pid: int, pidfd: int, flags: int) -> None:
        """Change the flags of a pidfd that was added."""
        result = lib.ap_reaper_modify(self.fd, pid, pidfd, flags)
        if result < 0:
            raise error(-result, f"cannot change how pid {pid} is watched")

    def remove(self, pidfd: int) -> None:
        """Remove a pidfd and close it."""
        lib.ap_reaper_remove(self.fd, pidfd)

    def reap(self) -> tuple[int, Iterator[Record]]:
        """Reap children that have ended. Return how many, and their records. Return an unreleased batch again."""
        count = lib.ap_reaper_reap(self.fd, self._batch.struct)
        if count < 0:
            raise error(-count, "epoll_wait()")
        return count, self._batch.records(count)

    @property
    def woken(self) -> bool:
        """Whether the wake descriptor was written to since `clear_woken`."""
        return bool(self._batch.struct.woken)

    def clear_woken(self) -> None:
        """Set `woken` to False."""
        self._batch.struct.woken = 0

    def close(self) -> None:
        """Close the epoll descriptor."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close_tracked_fd(fd)


BATCH_SIZE: Final = lib.AP_BATCH


DOUBT_LATER: Final = lib.AP_DOUBT_LATER
DOUBT_NOW: Final = lib.AP_DOUBT_NOW
DOUBT_ALL: Final = lib.AP_DOUBT_ALL


class Pids:
    """The children that one loop watches by pid. The C contract is in cffi_build/pids.h."""

    __slots__ = ("_batch", "_pids", "keep_open", "release")

    def __init__(self) -> None:
        self._pids = ffi.gc(ffi.new("ap_pids *"), lib.ap_pids_clear)
        self._batch = Batch()
        self.keep_open, self.release = self._batch.keep_open, self._batch.release

    def __len__(self) -> int:
        return int(self._pids.count)

    def add(self, pid: int, peek: bool) -> None:
        """Add a child, or change its `peek`: whether the zombie is left to its owner."""
        if lib.ap_pids_add(self._pids, pid, peek) < 0:
            raise MemoryError

    def remove(self, pid: int) -> bool:
        """Remove a child. Return whether it was there."""
        return lib.ap_pids_remove(self._pids, pid) == 1

    def reap_named(self) -> tuple[int, Iterator[Record]]:
        """Reap the children whose pid a SIGCHLD has named. Return how many, and their records."""
        count = lib.ap_pids_reap_named(self._pids, self._batch.struct)
        return count, self._batch.records(count)

    def reap_first(self) -> tuple[int, Iterator[Record]]:
        """Reap the children that no foreign zombie hides. Return how many, and their records."""
        count = lib.ap_pids_reap_first(self._pids, self._batch.struct)
        return count, self._batch.records(count)

    def reap_all(self) -> tuple[int, Iterator[Record]]:
        """Call waitid() for each child. Return how many have ended, and their records."""
        count = lib.ap_pids_reap_all(self._pids, self._batch.struct)
        return count, self._batch.records(count)

    @property
    def doubt(self) -> int:
        """What is doubtful: DOUBT_*."""
        return int(self._pids.doubt)

    def take_doubt(self) -> int:
        """Return what is doubtful, and doubt no more."""
        doubt, self._pids.doubt = self.doubt, 0
        return doubt
