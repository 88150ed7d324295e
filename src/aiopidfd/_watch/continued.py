"""A loop that goes on in a forked child of its process, as a daemon's does: it stops watching for its parent.

The fork is a plain one, without exec. (A child of `afork` gives up its parent's loops.)

Facts that this rests on:

* Both processes share the loop's epoll. While the parent has its reaper open, the epoll reports it to the child, too. The
  child cannot take it out for itself alone. So it makes itself an epoll of its own.
* /proc/self/fdinfo lists what an epoll watches. asyncio and libuv have it return the number of the descriptor.
* A loop knows its readers by number. If a reader's descriptor is closed and a new one gets its number, add_reader of asyncio
  and of uvloop changes nothing in the epoll, and the new one is never reported. So the number is kept occupied.
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
    """In a newly forked child: occupy the number of the closed reaper, and have the loop call `leave` if it goes on."""
    registry.inherited = True
    occupy(registry._reaper.fd)
    registry.gates.forget()
    loop = registry.loop()
    if loop is not None:
        with contextlib.suppress(RuntimeError):  # closed; or in debug mode: it has run in another thread, which is not here
            loop.call_soon(leave, registry, context=Context())


def leave(registry: Collector) -> None:
    """Take the reader of `registry` out of its loop, and notify all that wait for a child of our parent."""
    loop, fd = registry.loop(), registry._reaper.fd
    if loop is None or fd < 0:  # done already
        return
    with contextlib.suppress(OSError):  # there is no /proc: the epoll stays shared
        _unshare_epolls(fd)
    registry.link.drop()
    registry._reaper.close()
    _report_all_lost(registry, loop)


def _unshare_epolls(reaper: int) -> None:
    """Replace each epoll that watches `reaper` by one of our own that watches all the rest."""
    for name in os.listdir("/proc/self/fd"):
        watched = _list_watched(name)
        if any(fd == reaper for fd, _, _ in watched):
            with select.epoll() as epoll:
                for fd, events, inode in watched:
                    # OSError: EBADF, closed since. EEXIST: listed twice, once for a file that only our parent has.
                    with contextlib.suppress(OSError):
                        if fd != reaper and os.fstat(fd).st_ino == inode:
                            epoll.register(fd, events)
                os.dup2(epoll.fileno(), int(name), inheritable=False)


def _list_watched(epoll: str) -> list[tuple[int, int, int]]:
    """Return the number, the events and the inode of what an epoll watches; nothing for what is none."""
    try:
        with open(f"/proc/self/fdinfo/{epoll}", encoding="ascii") as info:
            lines = [line.split() for line in info if line.startswith("tfd:")]
    except FileNotFoundError:  # the descriptor of the listing itself
        return []
    return [(int(line[1]), int(line[3], 16), int(line[7].partition(":")[2], 16)) for line in lines]


def _report_all_lost(registry: Collector, loop: asyncio.AbstractEventLoop) -> None:
    children = list(registry._children.values())
    registry._children.clear()
    if children:
        logger.warning(
            "%d watched processes belong to the process that this one was forked from; here their exit status is lost",
            len(children),
        )
    for child in children:
        child.pidfd = -1
        child.result = ExitStatus(child.pid, 0, "not-child" if child.stranger else "lost")
        registry._notifier.pending.append(child)
    registry._notifier.notify_all()
    registry.gates.give_up()
