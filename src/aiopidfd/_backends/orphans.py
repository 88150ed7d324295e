"""Signals for children whose loop was closed: they are not watched any more, but reaped by the SIGCHLD handler.

No pidfd of theirs is open, so each signal opens one, and makes sure that it is the same process still: a child of ours that
nobody has reaped, and that has the identity that it had when the loop was closed. Meanwhile the handler leaves it alone.
"""

from __future__ import annotations

import os

from .._kernel import syscalls
from .._kernel.identity import Identity, identify, inode_of, is_forbidden, read_start_time
from .sigchld_backend import kept_from_handler

# Why a signal was not sent, as what is said of the process.
ENDED = "has ended"
NOT_OURS = "is not a child of this process, but of the one that this one was forked from"
UNKNOWN = "may be another one by now: its loop is closed, and neither pidfds (Linux 6.9) nor /proc tell"


class Orphan:
    """A child whose loop is closed."""

    __slots__ = ("_identity",)

    def __init__(self, pid: int, pidfd: int) -> None:
        """Remember who the child is: it has not been reaped, unless by another waitpid(). `pidfd` is open still, or -1."""
        self._identity: Identity = identify(pid, pidfd)

    def signal(self, pid: int, pgid: int, signal: int) -> str | None:
        """Signal the child, or its process group `pgid` if that is not 0; return None, or why nobody was signalled.

        OSError: EMFILE, ENFILE: out of descriptors, so that nothing was sent. EINVAL, EPERM: as kill(2).
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
                return ENDED  # a zombie; to its group it still lends its number
            if pgid:
                os.killpg(pgid, signal)
            elif pidfd >= 0:
                syscalls.send_signal(pidfd, signal)
            else:
                os.kill(pid, signal)
        except (ChildProcessError, ProcessLookupError):  # reaped by somebody else
            return ENDED
        return None
