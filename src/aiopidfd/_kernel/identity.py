"""What tells a process from a later one that has got its pid.

Facts that this rests on:

* Since Linux 6.9 a pidfd is a file of pidfs, whose inode number is the process's own, and no other's as long as the system
  runs. Before, all pidfds are one inode, that of every anonymous file (an eventfd's, say).
* /proc/PID/stat tells when a process was started, in ticks of 10 ms since the boot. A pid is not used again within a tick,
  unless somebody who may do that asks for it.
"""

from __future__ import annotations

import errno
import os
from typing import Final, Optional, Union

from . import syscalls
from .proc import read_pid, read_state

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")

Identity = Optional[Union[int, bytes]]
"""The inode number of the pidfd; where there is no such thing the time of the start; None: nothing tells."""


def identify(pid: int, pidfd: int = -1) -> Identity:
    """Return who has the number `pid`; None if that cannot be told, or there is nobody.

    `pidfd` is a pidfd of the process, or -1: then one is opened for the moment.
    """
    inode = inode_of(pid, pidfd)
    return inode if inode is not None else read_start_time(pid)


def inode_of(pid: int, pidfd: int = -1) -> int | None:
    """Return the inode number that is this process's own; None: there is none here, or there is no such process."""
    return (syscalls.pidfd_inode(pidfd) if pidfd >= 0 else syscalls.pid_inode(pid)) or None


def read_start_time(pid: int) -> bytes | None:
    """Return when the process was started, a zombie's too; None if /proc does not tell, or there is no such process."""
    state = read_state(pid)
    return None if state is None else state.start_time


def is_started_after(pid: int, boot_time_s: float) -> bool:
    """Return whether a process has the number that was started after that time, by more than the clock of /proc can miss."""
    started = read_start_time(pid)
    return started is not None and int(started) > int(boot_time_s * _TICKS_PER_S)


def is_pidfd_of(fd: int, pid: int) -> bool:
    """Return whether `fd` is a pidfd of the process `pid`, which was not reaped; False, too, where /proc does not tell."""
    return read_pid(fd) == pid


def is_forbidden(exc: OSError) -> bool:
    """Return whether `exc`, from pidfd_open, says that there are no pidfds here."""
    return exc.errno in syscalls.FORBIDDEN or exc.errno == errno.EINVAL
