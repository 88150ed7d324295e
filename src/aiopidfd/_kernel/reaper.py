"""The reaper, and the pids that are watched without one: C structures of many children, reaped a batch at a time."""

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
"""pid (of a gate: minus its number), pidfd (-1: none), wait status, source (SOURCE_*), rusage."""


class Batch:
    """What was reaped and nobody has been told yet: an `ap_batch`."""

    __slots__ = ("_records", "struct")

    def __init__(self) -> None:
        self.struct = ffi.new("ap_batch *")
        self._records = memoryview(ffi.buffer(self.struct))[ffi.offsetof("ap_batch", "exits") :]

    def records(self, count: int) -> Iterator[Record]:
        """Return the first `count` records."""
        return RECORD.iter_unpack(self._records[: count * RECORD.size])

    def keep_open(self, pidfd: int) -> None:
        """Take `pidfd` out of the batch: somebody else has closed it."""
        for i in range(self.struct.count):
            if self.struct.exits[i].pidfd == pidfd:
                self.struct.exits[i].pidfd = -1

    def release(self) -> None:
        """Close the pidfds of the batch and empty it."""
        lib.ap_batch_release(self.struct)


# Do what Reaper.add does, and return minus the errno where that raises. No method, whose call costs as much again: the first
# argument is the reaper's descriptor.
try_add: Final[Callable[[int, int, int], int]] = lib.ap_reaper_add


class Reaper:
    """One epoll descriptor that holds many pidfds. The C contract is in cffi_build/reaper.h."""

    __slots__ = ("_batch", "fd", "keep_open", "release")

    def __init__(self) -> None:
        """Open it. EMFILE, ENFILE: out of descriptors."""
        self.fd = -1  # as once closed
        self.reopen()
        self._batch = Batch()
        self.keep_open, self.release = self._batch.keep_open, self._batch.release

    def mark_closed(self) -> None:
        """Be closed: somebody else has closed the descriptor, whose number may be another one's by now."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            untrack_fd(fd)

    def reopen(self) -> None:
        """Be open again, once closed. EMFILE, ENFILE: out of descriptors."""
        fd = lib.ap_reaper_open()
        if fd < 0:
            raise error(-fd, "epoll_create1()")
        self.fd = fd

    def add(self, pid: int, flags: int) -> int:
        """Open a pidfd for `pid` and hold it; return it. Errors as in reaper.h."""
        pidfd = lib.ap_reaper_add(self.fd, pid, flags)
        if pidfd == -errno.ENOENT:  # the ID of a thread (EINVAL before Linux 6.9)
            pidfd = -errno.ESRCH
        if pidfd < 0:
            raise error(-pidfd, f"cannot watch pid {pid}")
        return pidfd

    def adopt(self, pid: int, pidfd: int, flags: int) -> None:
        """Hold an open pidfd. EEXIST: held already; EBADF, EPERM: not a pidfd."""
        result = lib.ap_reaper_adopt(self.fd, pid, pidfd, flags)
        if result < 0:
            raise error(-result, f"cannot watch pid {pid} by pidfd {pidfd}")

    def add_wake(self, fd: int) -> None:
        """Hold a descriptor that is no pidfd: each write to it makes us readable, and `woken` true. Not if we are closed."""
        if self.fd < 0:
            return
        result = lib.ap_reaper_add_wake(self.fd, fd)
        if result < 0:
            raise error(-result, "epoll_ctl(EPOLL_CTL_ADD)")

    def modify(self, pid: int, pidfd: int, flags: int) -> None:
        """Change the flags of a held pidfd."""
        result = lib.ap_reaper_modify(self.fd, pid, pidfd, flags)
        if result < 0:
            raise error(-result, f"cannot change how pid {pid} is watched")

    def remove(self, pidfd: int) -> None:
        """Let go of a pidfd and close it."""
        lib.ap_reaper_remove(self.fd, pidfd)

    def reap(self) -> tuple[int, Iterator[Record]]:
        """Reap what has ended, unless what was reaped before is not released yet; return how many there are, and what."""
        count = lib.ap_reaper_reap(self.fd, self._batch.struct)
        if count < 0:
            raise error(-count, "epoll_wait()")
        return count, self._batch.records(count)

    @property
    def woken(self) -> bool:
        """Whether the wake descriptor was written to, until `clear_woken`."""
        return bool(self._batch.struct.woken)

    def clear_woken(self) -> None:
        """Say that the wake was heeded."""
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
    """The children that one loop watches by pid, and their reaping. The C contract is in cffi_build/pids.h."""

    __slots__ = ("_batch", "_pids", "keep_open", "release")

    def __init__(self) -> None:
        self._pids = ffi.gc(ffi.new("ap_pids *"), lib.ap_pids_clear)
        self._batch = Batch()
        self.keep_open, self.release = self._batch.keep_open, self._batch.release

    def __len__(self) -> int:
        return int(self._pids.count)

    def add(self, pid: int, peek: bool) -> None:
        """Add a child, or change whether it is only peeked at."""
        if lib.ap_pids_add(self._pids, pid, peek) < 0:
            raise MemoryError

    def remove(self, pid: int) -> bool:
        """Remove a child; return whether it was there."""
        return lib.ap_pids_remove(self._pids, pid) == 1

    def reap_named(self) -> tuple[int, Iterator[Record]]:
        """Reap those that signals have named; return how many there are, and what."""
        count = lib.ap_pids_reap_named(self._pids, self._batch.struct)
        return count, self._batch.records(count)

    def reap_first(self) -> tuple[int, Iterator[Record]]:
        """Reap those that no foreign zombie hides; return how many there are, and what."""
        count = lib.ap_pids_reap_first(self._pids, self._batch.struct)
        return count, self._batch.records(count)

    def reap_all(self) -> tuple[int, Iterator[Record]]:
        """Ask for each; return how many have ended, and what."""
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
