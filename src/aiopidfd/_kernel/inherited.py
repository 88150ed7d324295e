"""What a new process has inherited and does not need. Others wait for the end of it: a pipe, a connection, a lock of a file.

Facts that this rests on:

* An epoll descriptor names a file that it holds by the number *and* the open file. Shared across a fork, it tells whether a
  number is still the same file: EEXIST where it is. Inode numbers do not tell: all eventfds and their like share one.
* Files and folders that epoll refuses with EPERM have no other end. A flock(2), an open-file-description lock and a lease
  belong to the open file, which a forked process shares. /proc/self/fdinfo has a line of each. POSIX locks do not.
* Objects of C and Python that were copied by a fork still close the numbers that they know. So a number is not closed but
  replaced by something harmless, or they would close what has got it next.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import stat
from collections.abc import Collection

# Where nothing tells which are open. Most processes use the lowest numbers, whatever their limit is.
_MAX_TRIED = 1 << 16
_MEMORY_DEVICES = 1  # major number of /dev/null, zero, full, random, urandom


class Snapshot:
    """The descriptors that this process has, to be recognised in a child of it, whatever its fork hooks have opened.

    Take it just before the fork, and close it on both sides.
    """

    def __init__(self) -> None:
        """OSError: EMFILE, ENFILE: out of descriptors."""
        self._numbers = list_descriptors()
        self._known = select.epoll()
        for fd in self._numbers:
            with contextlib.suppress(OSError):  # EPERM: it cannot be polled. EBADF: closed by another thread, or by O_PATH
                self._known.register(fd, 0)

    def find_inherited(self) -> list[int]:
        """In the child: return which of its descriptors are the parent's."""
        return [fd for fd in self._numbers if self._is_same(fd)]

    def _is_same(self, fd: int) -> bool:
        try:
            self._known.register(fd, 0)
        except OSError as exc:
            return (
                exc.errno != errno.EBADF
            )  # EEXIST: it is. Or it cannot be told (EPERM, ELOOP, ENOSPC), and was there before
        return False  # another file has got the number since

    def close(self) -> None:
        """Close it."""
        self._known.close()


def list_descriptors() -> list[int]:
    """Return the numbers of all descriptors that are open; where there is no /proc, of those below 65536."""
    try:
        listed = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # ENOENT: no /proc, or it is that of a PID namespace in which this process is not. EMFILE, ENFILE
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        listed = list(range(_MAX_TRIED if limit == resource.RLIM_INFINITY else min(limit, _MAX_TRIED)))
    return [fd for fd in listed if _is_open(fd)]  # without that of the listing itself


def _is_open(fd: int) -> bool:
    try:
        os.get_inheritable(fd)
    except OSError:  # EBADF
        return False
    return True


def replace_inherited(inherited: Collection[int], keep: int) -> None:
    """Let go of those inherited descriptors that have another end or a lock, but for `keep` and the standard streams.

    Of numbers 0 to 2 those are standard streams that a program would inherit, too: that are not close-on-exec.
    Call it before anything is opened that is to stay, so that what has one of these numbers is what was inherited.
    """
    found = [fd for fd in inherited if fd != keep and _is_open(fd) and not _is_standard_stream(fd) and _has_other_end(fd)]
    null = _open_null()
    for fd in found:
        os.dup2(null, fd, inheritable=False)
    _fill_standard_streams(null)


def close_inherited(keep: int) -> None:
    """In a program that has just been started: close what it has inherited, but for `keep` and the standard streams.

    No object knows those numbers. What the interpreter has opened by itself is close-on-exec.
    """
    for fd in list_descriptors():
        if fd > 2 and fd != keep and os.get_inheritable(fd):
            os.close(fd)
    _fill_standard_streams(_open_null())


def _is_standard_stream(fd: int) -> bool:
    return fd <= 2 and os.get_inheritable(fd)


def _has_other_end(fd: int) -> bool:
    """Return whether somebody may wait for the end of `fd`: not of a file without a lock, a folder, or /dev/null's like."""
    found = os.fstat(fd)
    if stat.S_ISCHR(found.st_mode):
        return os.major(found.st_rdev) != _MEMORY_DEVICES
    return not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)) or _is_locked(fd)


def _is_locked(fd: int) -> bool:
    """Return whether the file is locked by way of this descriptor. Without /proc that is not known, and it counts as not."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii", errors="replace") as fdinfo:
            return any(line.startswith("lock:") for line in fdinfo)
    except OSError:  # ENOENT: no /proc. EMFILE, ENFILE
        return False


def _open_null() -> int:
    """Return a descriptor to replace others by: what is read from it is empty, and what is written to it is lost."""
    try:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # ENOENT, EACCES, ENXIO: an incomplete /dev
        return os.memfd_create("null")


def _fill_standard_streams(null: int) -> None:
    """Leave none of 0 to 2 closed, and close `null`. What is opened later, as the gate of a worker, must not get them."""
    while null <= 2:
        os.set_inheritable(null, True)
        null = os.dup(null)
    os.close(null)
