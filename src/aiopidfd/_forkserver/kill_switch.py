"""Kill a fork server or an idle worker after its loop is closed or collected."""

from __future__ import annotations

import contextlib
import select
import signal

from .._fork.handle import AbstractChildProcess
from .._kernel import syscalls

# How long a killed process may take to exit. A process that a debugger holds takes longer.
_DEATH_MS = 1000


class KillSwitch:
    """A duplicate of a child's pidfd. It can kill the child after the loop, and so the registry, is closed."""

    __slots__ = ("_pidfd",)

    def __init__(self, child: AbstractChildProcess) -> None:
        """Duplicate the child's pidfd, if possible."""
        self._pidfd = -1
        with contextlib.suppress(OSError):  # EBADF: no pidfd, or the child has exited. EMFILE: too many open files
            self._pidfd = syscalls.dup_tracked_fd(child.fileno())

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the pidfd. The process runs on."""
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            syscalls.close_tracked_fd(pidfd)

    def kill(self) -> None:
        """Kill the process, and wait until it is a zombie. The caller has it reaped."""
        if self._pidfd >= 0:
            with contextlib.suppress(OSError):  # ESRCH: reaped. EPERM, EACCES, ENOSYS: a new seccomp filter
                syscalls.send_signal(self._pidfd, signal.SIGKILL)
                poll = select.poll()
                poll.register(self._pidfd, select.POLLIN)
                poll.poll(_DEATH_MS)
        self.close()
