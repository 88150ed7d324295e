"""The pidfd backend: one epoll of pidfds, reaped in C a batch at a time."""

from __future__ import annotations

import errno
import os

from .._kernel import syscalls
from .._kernel.reaper import Reaper
from .backend import Backend


class PidfdBackend(Backend):
    """Watches processes by pidfd: no signal, no thread, one wake-up for many exits."""

    __slots__ = ("_reaper",)

    name = "pidfd"

    def __init__(self, reaper: Reaper) -> None:
        self._reaper = reaper

    def add(self, pid: int, flags: int) -> int:
        """Open a pidfd and have the reaper hold it."""
        return self._reaper.add(pid, flags)

    def adopt(self, pid: int, pidfd: int, flags: int) -> int:
        """Have the reaper hold an open pidfd."""
        self._reaper.adopt(pid, pidfd, flags)
        return pidfd

    def modify(self, pid: int, pidfd: int, flags: int) -> None:
        """Change the flags of a held pidfd."""
        self._reaper.modify(pid, pidfd, flags)

    def remove(self, pid: int, pidfd: int) -> None:
        """Take the pidfd out of the reaper and close it."""
        self._reaper.remove(pidfd)

    def is_recycled(self, pid: int, pidfd: int) -> bool:
        """Return whether the process of the pidfd is gone and another process has the pid."""
        try:
            syscalls.send_signal(pidfd, 0)
        except OSError as exc:
            if exc.errno != errno.ESRCH:  # EPERM, EACCES, ENOSYS: another user's, or a filter
                return False
        else:
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:  # no process has the pid
            return False
        except PermissionError:  # a process of another user has the pid
            pass
        return True

    def send_signal(self, pid: int, pidfd: int, signal: int) -> None:
        """Signal by pidfd. If a new filter forbids that, signal by pid: until it is reaped, the pid is the child's."""
        try:
            syscalls.send_signal(pidfd, signal)
        except OSError as exc:
            if exc.errno not in syscalls.FORBIDDEN:
                raise
            try:
                syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                raise syscalls.error(errno.ESRCH, f"kill({pid}, signal {signal})") from exc
            os.kill(pid, signal)  # EPERM again if the child runs as another user

    def signal_group(self, pid: int, pidfd: int, pgid: int, signal: int) -> None:
        """Signal the group by the pidfd of its leader (Linux 6.9), or by number while a member is not reaped."""
        if pgid == pid:
            try:
                syscalls.send_signal(pidfd, signal, syscalls.PIDFD_SIGNAL_PROCESS_GROUP)
            except OSError as exc:
                if exc.errno != errno.EINVAL:  # before Linux 6.9 the flag is unknown
                    raise
            else:
                return
        syscalls.send_signal(pidfd, 0)  # ESRCH once reaped. Until then, even as a zombie, the child keeps its group
        os.killpg(pgid, signal)
