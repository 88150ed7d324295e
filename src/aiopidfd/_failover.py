"""What a registry does when its reaper fails: it opens another one, or else asks for its children once a second.

It fails when somebody else closes its descriptor: os.closerange() in a library that makes the process a daemon, or a second
close of a number that was used again. That may have closed the pidfds, too, and all of these numbers may be others' by now.
Or a seccomp filter that has been put in place since forbids epoll_wait.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING

from . import _linux, _reaper
from ._identity import is_pidfd_of

if TYPE_CHECKING:
    from ._collector import Collector
    from ._watched import Child

# One that fails sooner than this is not replaced.
_TRIAL_S = 1.0


def replace_reaper(collector: Collector, exc: OSError) -> None:
    """Have another reaper hold the children, or watch them by pid. Under the lock."""
    reaper, now = collector._reaper, time.monotonic()
    if exc.errno in (errno.EBADF, errno.EINVAL):  # closed, or not an epoll
        reaper.forget()
    else:
        reaper.close()
    collector.gates.fail_all()
    if now - collector.replaced_at > _TRIAL_S:
        try:
            reaper.reopen()
            if collector._sigchld is not None:
                reaper.add_wake(_linux.open_sigchld())
        except OSError:  # out of descriptors; or the one that the handler wakes was closed, too
            reaper.close()
    collector.replaced_at = now
    collector.link.move(reaper.fd)
    for child in tuple(collector._children.values()):
        if child.backend is collector._pidfd:
            _watch_again(collector, child)
    if collector._sigchld is not None:
        collector._start_checking()


def _watch_again(collector: Collector, child: Child) -> None:
    pid, flags = child.pid, _reaper.ADD_PEEK if child.peek else 0
    pidfd, child.pidfd = child.pidfd, -1
    if not is_pidfd_of(pidfd, pid):
        _linux.disown(pidfd)
        pidfd = -1
        if not child.stranger:
            flags |= _reaper.ADD_CHECK_CHILD
    try:
        if collector._reaper.fd < 0:
            child.backend = collector._get_sigchld()
            child.backend.add(pid, flags)
        elif pidfd < 0:
            child.pidfd = collector._reaper.add(pid, flags)
        else:
            collector._reaper.adopt(pid, pidfd, flags)
            child.pidfd, pidfd = pidfd, -1
    except OSError:  # somebody else has reaped it; or out of descriptors
        child.backend = collector._pidfd
        child.pidfd, pidfd = pidfd, -1
        collector._retire(child)
    finally:
        if pidfd >= 0:
            _linux.close_owned(pidfd)
