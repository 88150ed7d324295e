"""Inherited descriptors that a new process does not need: find them, and close or replace them.

As long as they are open, other processes wait: for the end of a pipe or a connection, or for a lock on a file.

Facts:

* epoll identifies a file by the descriptor number *and* the open file. An epoll descriptor that is shared across a fork
  shows whether a number is still the same file: EPOLL_CTL_ADD fails with EEXIST if it is. Inode numbers do not show it: all
  eventfds and other anonymous files share one.
* Files and directories, which epoll refuses with EPERM, have no other end. flock(2) locks, open file description locks and
  leases belong to the open file, which a forked process shares. /proc/self/fdinfo has a line for each. POSIX locks do not
  belong to the open file.
* Objects of C and Python that a fork has copied still close the numbers that they know. If such a number was closed, they
  would close the next file with this number. So it is replaced by a harmless file instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import stat
from collections.abc import Collection

# The numbers that are tried where no /proc lists the open ones. Most processes use low numbers, whatever their limit is.
_MAX_TRIED = 1 << 16
_MEMORY_DEVICES = 1  # major number of /dev/null, zero, full, random, urandom


class Snapshot:
    """The descriptors of this process. A forked child can distinguish them from those that its fork hooks have opened.

    Make it just before the fork, and close it in both processes.
    """

    def __init__(self) -> None:
        """OSError: EMFILE, ENFILE: out of descriptors."""
        self._numbers = list_descriptors()
        self._known = select.epoll()
        for fd in self._numbers:
            # EPERM: it cannot be polled. EBADF: another thread has closed it, or it was opened with O_PATH.
            with contextlib.suppress(OSError):
                self._known.register(fd, 0)

    def find_inherited(self) -> list[int]:
        """In the child: return those descriptors that are the parent's."""
        return [fd for fd in self._numbers if self._is_same(fd)]

    def _is_same(self, fd: int) -> bool:
        try:
            self._known.register(fd, 0)
        except OSError as exc:
            # EEXIST: it is the same file. EPERM, ELOOP, ENOSPC: not known, and taken for the same file.
            return exc.errno != errno.EBADF
        return False  # another file has this number now

    def close(self) -> None:
        """Close the epoll descriptor."""
        self._known.close()


def list_descriptors() -> list[int]:
    """Return all open descriptors. Without /proc, return those below 65536."""
    try:
        listed = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # ENOENT: no /proc, or that of a PID namespace without this process. EMFILE, ENFILE: out of descriptors
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        listed = list(range(_MAX_TRIED if limit == resource.RLIM_INFINITY else min(limit, _MAX_TRIED)))
    return [fd for fd in listed if _is_open(fd)]  # listdir() has closed its own


def _is_open(fd: int) -> bool:
    try:
        os.get_inheritable(fd)
    except OSError:  # EBADF
        return False
    return True


def replace_inherited(inherited: Collection[int], keep: int) -> None:
    """Replace inherited descriptors that have another end or a lock. Keep `keep` and the standard streams.

    The standard streams are those of 0 to 2 that are not close-on-exec, as a program would inherit them. Call this before
    the process opens anything else: each of these numbers must still be the inherited file.
    """
    found = [fd for fd in inherited if fd != keep and _is_open(fd) and not _is_standard_stream(fd) and _has_other_end(fd)]
    null = _open_null()
    for fd in found:
        os.dup2(null, fd, inheritable=False)
    _fill_standard_streams(null)


def close_inherited(keep: int) -> None:
    """In a program that was just started: close all inherited descriptors but `keep` and the standard streams.

    No object refers to them. Descriptors that the interpreter has opened itself are close-on-exec, so they stay open.
    """
    for fd in list_descriptors():
        if fd > 2 and fd != keep and os.get_inheritable(fd):
            os.close(fd)
    _fill_standard_streams(_open_null())


def _is_standard_stream(fd: int) -> bool:
    return fd <= 2 and os.get_inheritable(fd)


def _has_other_end(fd: int) -> bool:
    """Return whether another process may wait for this file: not for a directory, /dev/null, or a file without a lock."""
    found = os.fstat(fd)
    if stat.S_ISCHR(found.st_mode):
        return os.major(found.st_rdev) != _MEMORY_DEVICES
    return not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)) or _is_locked(fd)


def _is_locked(fd: int) -> bool:
    """Return whether the open file has a lock. Without /proc this is not known, and the answer is False."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii", errors="replace") as fdinfo:
            return any(line.startswith("lock:") for line in fdinfo)
    except OSError:  # ENOENT: no /proc. EMFILE, ENFILE: out of descriptors
        return False


def _open_null() -> int:
    """Open /dev/null, or an empty file in memory where there is no usable /dev."""
    try:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # ENOENT, EACCES, ENXIO: an incomplete /dev
        return os.memfd_create("null")


def _fill_standard_streams(null: int) -> None:
    """Open `null` as each of 0 to 2 that is closed, then close it. A later file must not become a standard stream."""
    while null <= 2:
        os.set_inheritable(null, True)
        null = os.dup(null)
    os.close(null)
