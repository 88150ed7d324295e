"""The SIGCHLD backend: for kernels and sandboxes without pidfds, and for children beyond the descriptor limit."""

from __future__ import annotations

import errno
import os
import time
from _thread import RLock
from collections.abc import Callable, Iterator

from . import _linux, _reaper
from ._backend import Backend, logger

# How often the handler is checked, and every child asked for, while children are watched by it: what a replaced handler,
# or a thief, can delay an exit by.
CHECK_INTERVAL_S = 1.0

# The handler is the process's; it is in place while any loop watches a child by it. Re-entrant for Python signal handlers.
_lock = RLock()
_reinit_lock = _lock._at_fork_reinit  # type: ignore[attr-defined] # not in typeshed
_watched = 0
_abandoned = False
_replaced: tuple[float, str] = (0.0, "")  # when our handler was found replaced while it was needed, and by what
_warned_of_ignored = False


def _count(change: int) -> None:
    """Install the handler for the first child, and at each further one if it was replaced; restore after the last."""
    global _watched  # noqa: PLW0603 - the handler is the process's
    with _lock:
        _watched += change
        if change > 0:
            _install(anew=_watched == change)
        elif _watched == 0 and not _abandoned:
            _linux.restore_sigchld()


def _install(*, anew: bool) -> None:
    """Put the handler in front. If it was there, somebody has replaced it: remember by what, for that may have reaped."""
    global _replaced  # noqa: PLW0603 - the handler is the process's
    found = _linux.describe_sigchld()
    if _linux.install_sigchld():
        _warn_if_ignored(found)
        if not anew:
            _replaced = time.monotonic(), found


def _warn_if_ignored(found: str) -> None:
    """Say once, of the handler that was found, that children are lost with it."""
    global _warned_of_ignored  # noqa: PLW0603 - the handler is the process's
    if _warned_of_ignored or not (found.startswith("SIG_IGN") or "SA_NOCLDWAIT" in found):
        return
    _warned_of_ignored = True
    logger.warning(
        "SIGCHLD is %s, so that the kernel reaps children before anybody can ask for their status; "
        "while aiopidfd watches children it handles SIGCHLD, and other children of this process must be waited for",
        "ignored" if found.startswith("SIG_IGN") else "handled with SA_NOCLDWAIT",
    )


def recent_replacement() -> str:
    """Say what our handler was replaced by within the last two checks, as `describe_sigchld` does; "" for nothing."""
    when, what = _replaced
    return what if time.monotonic() - when < 2 * CHECK_INTERVAL_S else ""


def forget_after_fork() -> None:
    """In a forked child: the handler, which `let_go` has put away, and all that it watches, are the parent's."""
    global _watched, _abandoned
    _reinit_lock()  # another thread of the parent may have held it
    if _watched or _abandoned:
        _watched, _abandoned = 0, False


def abandon(pids: list[int]) -> None:
    """Have the handler reap children whose loop is gone."""
    global _abandoned  # noqa: PLW0603 - the handler is the process's
    with _lock:
        for pid in pids:
            if _linux.abandon_to_sigchld(pid):
                _abandoned = True
            else:
                logger.warning("child process %d outlives its loop with too many others; nobody will reap it", pid)
        _linux.install_sigchld()
        settle_abandoned()  # they may have ended before the handler was in place


def settle_abandoned() -> None:
    """Reap those abandoned children that have ended; after the last one put back the handler that was there before."""
    global _abandoned  # noqa: PLW0603 - the handler is the process's
    with _lock:
        if _abandoned and _linux.reap_abandoned() == 0:
            _abandoned = False
            if _watched == 0:
                _linux.restore_sigchld()


class SigchldBackend(Backend):
    """Watch children by pid. A chained SIGCHLD handler in C wakes the loop's reaper; then we look at what is dead."""

    __slots__ = ("_pids", "_reaper", "_strangers")

    name = "sigchld"

    def __init__(self, reaper: _reaper.Reaper) -> None:
        """EMFILE, ENFILE: out of descriptors."""
        self._reaper = reaper
        reaper.add_wake(_linux.open_sigchld())
        self._pids = _reaper.Pids()
        self._strangers: dict[int, bytes] = {}  # processes that send us no SIGCHLD: pid -> start time

    def add(self, pid: int, flags: int) -> int:
        """Watch a child, or, without ADD_CHECK_CHILD, a stranger."""
        self._pids.add(pid, bool(flags & _reaper.ADD_PEEK))
        _count(1)  # the handler is in place before we look, so that an end after the look is signalled
        try:
            ended = _linux.wait_id(_linux.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except OSError as exc:
            self.remove(pid, -1)
            started = _start_time(pid)
            if started is None:  # ended and reaped, or never there
                raise _linux.error(errno.ESRCH, f"cannot watch pid {pid}") from exc
            if flags & _reaper.ADD_CHECK_CHILD:
                raise _linux.error(errno.ECHILD, f"cannot watch pid {pid}") from exc
            self._strangers[pid] = started
        else:
            if ended is not None:
                _linux.wake_sigchld()
        return -1

    def adopt(self, pid: int, pidfd: int, flags: int) -> int:
        """Watch a child; its pidfd is of no use here."""
        self.add(pid, flags)
        os.close(pidfd)
        return -1

    def modify(self, pid: int, pidfd: int, flags: int) -> None:
        """Change whether a child is only peeked at."""
        if pid not in self._strangers:
            self._pids.add(pid, bool(flags & _reaper.ADD_PEEK))
            _linux.wake_sigchld()

    def remove(self, pid: int, pidfd: int) -> None:
        """Watch no longer."""
        if self._strangers.pop(pid, None) is None and self._pids.remove(pid):
            _count(-1)

    def reap(self, scan: bool) -> Iterator[_reaper.Record]:
        """Reap all children that have ended; `scan`: ask for each, whatever was signalled."""
        while True:
            count, records = self._pids.reap(scan)
            yield from records
            if count:
                self._pids.release()
                _count(-count)
            if self._pids.deferred:
                # Let those that were found be told first. To modify what is readable wakes this loop, and no other.
                self._reaper.modify(0, _linux.open_sigchld(), 0)
                return
            if count < _reaper.BATCH_SIZE:
                return

    def check(self) -> Iterator[_reaper.Record]:
        """Put the handler back in front if somebody has replaced it, and ask for every child and stranger."""
        if len(self._pids):
            with _lock:
                _install(anew=False)
        for pid, started in tuple(self._strangers.items()):
            try:
                is_there = _start_time(pid) == started
            except OSError as exc:
                if exc.errno not in _linux.OUT_OF_DESCRIPTORS:
                    raise
                break  # the next check may know; ours need no descriptor
            if not is_there:
                del self._strangers[pid]
                yield pid, -1, 0, _reaper.SOURCE_LOST, b""
        yield from self.reap(scan=True)

    def is_idle(self) -> bool:
        """Return whether nothing is watched, so that nothing need be checked."""
        return not (len(self._pids) or self._strangers)

    def close(self) -> None:
        """Forget all: the loop is closed."""
        self._strangers.clear()
        count, self._pids = len(self._pids), _reaper.Pids()
        if count:
            _count(-count)

    def send_signal(self, pid: int, pidfd: int, signal: int) -> None:
        """Signal by pid, which cannot be another's: nobody but us reaps, and the registry's lock keeps us from it."""
        _signal_unreaped(pid, os.kill, pid, signal)

    def signal_group(self, pid: int, pidfd: int, pgid: int, signal: int) -> None:
        """Signal the group, whose number the child keeps, alive or a zombie."""
        _signal_unreaped(pid, os.killpg, pgid, signal)


def _signal_unreaped(pid: int, kill: Callable[[int, int], None], target: int, signal: int) -> None:
    """Call `kill`, unless somebody else has reaped the child: ESRCH."""
    try:
        _linux.wait_id(_linux.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError as exc:
        raise _linux.error(errno.ESRCH, f"{kill.__name__}({target}, signal {signal})") from exc
    try:
        kill(target, signal)
    except OSError as exc:
        raise _linux.error(exc.errno or errno.EINVAL, f"{kill.__name__}({target}, signal {signal})") from exc


def _start_time(pid: int) -> bytes | None:
    """Return when the process was started, which tells it from a later one of the same pid; None if it has ended.

    OSError: EMFILE, ENFILE: out of descriptors.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19]
