"""The identity of a process: it distinguishes the process from a later one with the same pid.

Facts:

* Since Linux 6.9 a pidfd is a file of pidfs. Its inode number belongs to one process as long as the system runs. Before 6.9
  all pidfds share one inode with all anonymous files, such as an eventfd.
* /proc/PID/stat has the start time of a process, in ticks of 10 ms since the boot. The kernel does not use a pid again
  within one tick, unless a privileged process asks for that pid.
"""

from __future__ import annotations

import errno
import os
from typing import Final, Optional, Union

from . import syscalls
from .proc import read_pid, read_state

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")

Identity = Optional[Union[int, bytes]]
"""The inode number of the pidfd, or else the start time, or None if neither is known."""


def identify(pid: int, pidfd: int = -1) -> Identity:
    """Return the identity of the process `pid`. None if it is not known, or there is no such process.

    `pidfd` is a pidfd of the process, or -1: then this opens and closes one.
    """
    inode = inode_of(pid, pidfd)
    return inode if inode is not None else read_start_time(pid)


def inode_of(pid: int, pidfd: int = -1) -> int | None:
    """Return the inode number of the process. None: there is no such process, or Linux is older than 6.9."""
    return (syscalls.pidfd_inode(pidfd) if pidfd >= 0 else syscalls.pid_inode(pid)) or None


def read_start_time(pid: int) -> bytes | None:
    """Return the start time of a process or a zombie. None if /proc does not show it, or there is no such process."""
    state = read_state(pid)
    return None if state is None else state.start_time


def is_started_after(pid: int, boot_time_s: float) -> bool:
    """Return whether the process `pid` was started after that time, by more than one tick of /proc's clock."""
    started = read_start_time(pid)
    return started is not None and int(started) > int(boot_time_s * _TICKS_PER_S)


def is_pidfd_of(fd: int, pid: int) -> bool:
    """Return whether `fd` is a pidfd of the process `pid`. False if it was reaped, or /proc does not show it."""
    return read_pid(fd) == pid


def is_forbidden(exc: OSError) -> bool:
    """Return whether `exc`, from pidfd_open(), means that pidfds are not available here."""
    return exc.errno in syscalls.FORBIDDEN or exc.errno == errno.EINVAL
