"""What is left of a fork server whose loop is closed or gone before it: processes that nobody will hear of any more."""

from __future__ import annotations

import contextlib
import select
import signal

from .._fork.handle import AbstractChildProcess
from .._kernel import syscalls

# How long a killed process may take to end. One that a debugger holds takes longer.
_DEATH_MS = 1000


class KillSwitch:
    """The means to end one process when its loop is gone, and with it the registry that watched it."""

    __slots__ = ("_pidfd",)

    def __init__(self, child: AbstractChildProcess) -> None:
        """Keep a pidfd of our own, if there is room for one."""
        self._pidfd = -1
        with contextlib.suppress(OSError):  # EBADF: it has none, or has ended. EMFILE: out of descriptors
            self._pidfd = syscalls.dup_tracked_fd(child.fileno())

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let the process be."""
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            syscalls.close_tracked_fd(pidfd)

    def kill(self) -> None:
        """Kill the process, and wait until it is a zombie: who is to reap it has been asked for that, or will be."""
        if self._pidfd >= 0:
            with contextlib.suppress(OSError):  # ESRCH: reaped. EPERM, EACCES, ENOSYS: a filter that has come since
                syscalls.send_signal(self._pidfd, signal.SIGKILL)
                poll = select.poll()
                poll.register(self._pidfd, select.POLLIN)
                poll.poll(_DEATH_MS)
        self.close()
