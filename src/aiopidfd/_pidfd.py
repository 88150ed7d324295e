"""The pidfd backend: a nested epoll of pidfds, reaped in C a batch at a time."""

from __future__ import annotations

import errno
import os

from . import _linux
from ._backend import Backend


class PidfdBackend(_linux.Reaper, Backend):
    """Watch processes by pidfd: no signal, no thread, one wake-up for many exits."""

    __slots__ = ()

    name = "pidfd"

    def remove(self, pid: int, pidfd: int) -> None:  # the pid is in the contract for backends that have no pidfd
        """Let go of the pidfd and close it."""
        self.remove_pidfd(pidfd)

    def send_signal(self, pid: int, pidfd: int, signal: int) -> None:
        """Signal by pidfd."""
        _linux.send_signal(pidfd, signal)

    def signal_group(self, pid: int, pidfd: int, pgid: int, signal: int) -> None:
        """Signal the group by the pidfd of its leader where the kernel can (6.9), else while the child pins the group."""
        if pgid == pid:
            try:
                _linux.send_signal(pidfd, signal, _linux.PIDFD_SIGNAL_PROCESS_GROUP)
            except OSError as exc:
                if exc.errno != errno.EINVAL:  # before Linux 6.9 the flag is unknown
                    raise
            else:
                return
        _linux.send_signal(pidfd, 0)  # ESRCH once reaped; until then the child, were it a zombie, keeps its group's number
        os.killpg(pgid, signal)
