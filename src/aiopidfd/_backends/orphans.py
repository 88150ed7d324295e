"""Signals for orphans: children whose loop is closed. No loop watches them; the SIGCHLD handler reaps them.

An orphan has no open pidfd. So each signal opens one, and makes sure that it is the same process: an unreaped child of this
process, with the identity that it had when its loop was closed. Meanwhile the handler does not reap it.
"""

from __future__ import annotations

import os

from .._kernel import syscalls
from .._kernel.identity import Identity, identify, inode_of, is_forbidden, read_start_time
from .sigchld_backend import kept_from_handler

# Why a signal was not sent. Messages put the pid before it.
ENDED = "has ended"
NOT_OURS = "is a child of the process that this one was forked from"
UNKNOWN = "may be another one by now: its loop is closed, and to know its identity takes pidfds (Linux 6.9) or /proc"


class Orphan:
    """A child whose loop is closed."""

    __slots__ = ("_identity",)

    def __init__(self, pid: int, pidfd: int) -> None:
        """Store the identity of the child. `pidfd` is open, or -1."""
        self._identity: Identity = identify(pid, pidfd)

    def signal(self, pid: int, pgid: int, signal: int) -> str | None:
        """Signal the child, or its process group `pgid` if that is not 0. Return None, or why no signal was sent.

        OSError: EMFILE, ENFILE: out of descriptors, nothing was sent. EINVAL, EPERM: as kill(2).
        """
        if self._identity is None:
            return UNKNOWN
        try:
            pidfd = syscalls.open_pidfd(pid)
        except ProcessLookupError:
            return ENDED
        except OSError as exc:
            if not is_forbidden(exc) or isinstance(self._identity, int):
                raise
            pidfd = -1
        try:
            with kept_from_handler(pid):
                return self._signal(pid, pidfd, pgid, signal)
        finally:
            if pidfd >= 0:
                os.close(pidfd)

    def _signal(self, pid: int, pidfd: int, pgid: int, signal: int) -> str | None:
        now = inode_of(pid, pidfd) if isinstance(self._identity, int) else read_start_time(pid)
        if now != self._identity:
            return ENDED
        by = (syscalls.P_PID, pid) if pidfd < 0 else (syscalls.P_PIDFD, pidfd)
        try:
            if syscalls.wait_id(*by, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None and not pgid:
                return ENDED  # a zombie. Its group can still be signalled
            if pgid:
                os.killpg(pgid, signal)
            elif pidfd >= 0:
                syscalls.send_signal(pidfd, signal)
            else:
                os.kill(pid, signal)
        except (ChildProcessError, ProcessLookupError):  # another waitpid() reaped it first
            return ENDED
        return None
