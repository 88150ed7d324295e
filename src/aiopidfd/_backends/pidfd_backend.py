"""The pidfd backend: one epoll of pidfds, reaped in C a batch at a time."""

from __future__ import annotations

import errno
import os

from .._kernel import syscalls
from .._kernel.reaper import Reaper
from .backend import Backend


class PidfdBackend(Backend):
    """Watch processes by pidfd: no signal, no thread, one wake-up for many exits."""

    __slots__ = ("_reaper",)

    name = "pidfd"

    def __init__(self, reaper: Reaper) -> None:
        self._reaper = reaper

    def add(self, pid: int, flags: int) -> int:
        """Open a pidfd and hold it."""
        return self._reaper.add(pid, flags)

    def adopt(self, pid: int, pidfd: int, flags: int) -> int:
        """Hold an open pidfd."""
        self._reaper.adopt(pid, pidfd, flags)
        return pidfd

    def modify(self, pid: int, pidfd: int, flags: int) -> None:
        """Change the flags of a held pidfd."""
        self._reaper.modify(pid, pidfd, flags)

    def remove(self, pid: int, pidfd: int) -> None:
        """Let go of the pidfd and close it."""
        self._reaper.remove(pidfd)

    def is_recycled(self, pid: int, pidfd: int) -> bool:
        """Ask by pidfd and by pid: gone by the one, and there by the other."""
        try:
            syscalls.send_signal(pidfd, 0)
        except OSError as exc:
            if exc.errno != errno.ESRCH:  # EPERM, EACCES, ENOSYS: it runs as another user, or a filter does not let us know
                return False
        else:
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:  # nobody has the number
            return False
        except PermissionError:  # another user's process has it
            pass
        return True

    def send_signal(self, pid: int, pidfd: int, signal: int) -> None:
        """Signal by pidfd; by pid where a filter that has come since forbids that: not reaped, it is still the child's."""
        try:
            syscalls.send_signal(pidfd, signal)
        except OSError as exc:
            if exc.errno not in syscalls.FORBIDDEN:
                raise
            try:
                syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                raise syscalls.error(errno.ESRCH, f"kill({pid}, signal {signal})") from exc
            os.kill(pid, signal)  # EPERM again if it is the child that forbids it, being another user's now

    def signal_group(self, pid: int, pidfd: int, pgid: int, signal: int) -> None:
        """Signal the group by the pidfd of its leader where the kernel can (6.9), else while the child pins the group."""
        if pgid == pid:
            try:
                syscalls.send_signal(pidfd, signal, syscalls.PIDFD_SIGNAL_PROCESS_GROUP)
            except OSError as exc:
                if exc.errno != errno.EINVAL:  # before Linux 6.9 the flag is unknown
                    raise
            else:
                return
        syscalls.send_signal(pidfd, 0)  # ESRCH once reaped; until then the child, were it a zombie, keeps its group's number
        os.killpg(pgid, signal)
