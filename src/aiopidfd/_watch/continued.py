"""A loop that goes on in a forked child of its process, as in a daemon. It stops watching the children of its parent.

The fork is a plain `os.fork()` without exec. A child of `afork` does not use the loops of its parent.

Facts that this module rests on:

* Both processes share the loop's epoll. While the parent's reaper is open, the epoll reports it to the child, too. The child
  cannot remove the reaper for itself alone. So it opens an epoll of its own.
* /proc/self/fdinfo lists the descriptors that an epoll watches. The data of each event is the number of the descriptor, in
  asyncio and in libuv.
* A loop knows its readers by descriptor number. If the descriptor of a reader is closed and a new one gets its number,
  add_reader of asyncio and of uvloop does not change the epoll, and the new descriptor is never reported. So the number is
  kept occupied.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from contextvars import Context

from .._backends.backend import logger
from .._kernel.exit_status import ExitStatus
from .._kernel.syscalls import occupy
from .collector import Collector


def inherit(registry: Collector) -> None:
    """In a newly forked child: occupy the number of the closed reaper. If the loop goes on, it calls `leave`."""
    registry.inherited = True
    occupy(registry._reaper.fd)
    registry.gates.forget()
    loop = registry.loop()
    if loop is not None:
        with contextlib.suppress(RuntimeError):  # it is closed; or, in debug mode, it ran in another thread
            loop.call_soon(leave, registry, context=Context())


def leave(registry: Collector) -> None:
    """Remove the reader of `registry` from its loop, and report to all observers that the exit status is lost here."""
    loop, fd = registry.loop(), registry._reaper.fd
    if loop is None or fd < 0:  # this was done already
        return
    with contextlib.suppress(OSError):  # without /proc the epoll stays shared
        _unshare_epolls(fd)
    registry.link.drop()
    registry._reaper.close()
    _report_all_lost(registry, loop)


def _unshare_epolls(reaper: int) -> None:
    """Replace each epoll that watches `reaper` by a new one that watches everything else."""
    for name in os.listdir("/proc/self/fd"):
        watched = _list_watched(name)
        if any(fd == reaper for fd, _, _ in watched):
            with select.epoll() as epoll:
                for fd, events, inode in watched:
                    # OSError: EBADF, it was closed. EEXIST: it is listed twice, once for a file that only the parent has.
                    with contextlib.suppress(OSError):
                        if fd != reaper and os.fstat(fd).st_ino == inode:
                            epoll.register(fd, events)
                os.dup2(epoll.fileno(), int(name), inheritable=False)


def _list_watched(epoll: str) -> list[tuple[int, int, int]]:
    """Return number, events and inode of each descriptor that an epoll watches; [] if the descriptor is not an epoll."""
    try:
        with open(f"/proc/self/fdinfo/{epoll}", encoding="ascii") as info:
            lines = [line.split() for line in info if line.startswith("tfd:")]
    except FileNotFoundError:  # this was the descriptor of os.listdir()
        return []
    return [(int(line[1]), int(line[3], 16), int(line[7].partition(":")[2], 16)) for line in lines]


def _report_all_lost(registry: Collector, loop: asyncio.AbstractEventLoop) -> None:
    children = list(registry._children.values())
    registry._children.clear()
    if children:
        logger.warning(
            "%d watched processes are children of the parent process; their exit status is lost in this forked child",
            len(children),
        )
    for child in children:
        child.pidfd = -1
        child.result = ExitStatus(child.pid, 0, "not-child" if child.stranger else "lost")
        registry._notifier.pending.append(child)
    registry._notifier.notify_all()
    registry.gates.give_up()
