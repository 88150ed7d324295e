"""The SIGCHLD backend: for kernels and sandboxes without pidfds, and for children beyond the descriptor limit.

A handler in C, chained in front of the one that was there, stores the pids that signals name and wakes the reaper of the
loop. Signals of one kind merge while one is pending. So after a signal other children may have ended, too, and this backend
scans for them. The more children there are, the longer a scan takes. So scans take at most a fiftieth of the time. To reap
the children that they find is not counted. The check once a second finds what is left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import weakref
from _thread import RLock
from collections.abc import Callable, Iterator

from .._kernel import syscalls
from .._kernel.identity import inode_of, is_started_after
from .._kernel.proc import read_state
from .._kernel.reaper import ADD_CHECK_CHILD, ADD_PEEK, BATCH_SIZE, DOUBT_ALL, DOUBT_NOW, SOURCE_LOST, Pids, Reaper, Record
from .backend import Backend, logger

# How often the handler and every child are checked while children are watched. A replaced handler, or another waitpid(),
# delays a callback by at most this.
CHECK_INTERVAL_S = 1.0

# After a scan that took t, the next one begins after this many t. An exit that is found counts for nothing.
_REST_AFTER_SCAN = 49
_EXIT_COST_S = 0.0001

# The delay of a scan after a signal of a child that is not ours. By then its owner has reaped the zombie, and the scan reads
# only the kernel's list. Many such signals cause one scan.
_SCAN_DELAY_S = 0.1

_NEVER = float("inf")

# The process has one handler. It is installed while any loop watches a child by it. Re-entrant for Python signal handlers.
_lock = RLock()
_reinit_lock = _lock._at_fork_reinit  # type: ignore[attr-defined] # not in typeshed
# No WeakSet: to ask whether one is empty takes longer, and each start of a program asks.
_backends: set[weakref.ReferenceType[SigchldBackend]] = set()
_abandoned = False
_replaced: tuple[float, str] = (0.0, "")  # when the handler was last found replaced while it was needed, and by what
_warned_of_ignored = False
_warned_of_storm = False


def _count() -> int:
    """Return how many children all loops watch. They are counted each time: an interrupt would leave a counter wrong."""
    # A copy: the garbage collector may run during the loop, and remove a backend.
    return sum(len(backend._pids) for known in _backends.copy() if (backend := known()) is not None)


def _on_added() -> None:
    """Install the handler for the first child. For each further one, install it again if it was replaced."""
    with _lock:
        is_first = _count() == 1
        _install(anew=is_first, resume=is_first)


def _on_removed() -> None:
    """After the last child, restore the handler that was there before."""
    with _lock:
        if _count() > 0:
            return
        if _abandoned:
            syscalls.install_sigchld()  # if the handler has paused, no loop resumes it
        else:
            syscalls.restore_sigchld()


def _install(*, anew: bool, resume: bool) -> None:
    """Install the handler. If it was replaced, remember by what: that may have reaped children."""
    global _replaced  # noqa: PLW0603 - the handler is the process's
    found = syscalls.describe_sigchld()
    result = syscalls.install_sigchld(resume=resume)
    if result == syscalls.INSTALL_RESUMED:
        _warn_of_storm()
    elif result == syscalls.INSTALL_DONE:
        _warn_if_ignored(found)
        if not anew:
            _replaced = time.monotonic(), found


def _warn_of_storm() -> None:
    """Log once that the handler has paused."""
    global _warned_of_storm  # noqa: PLW0603 - the handler is the process's
    if not _warned_of_storm:
        _warned_of_storm = True
        logger.warning(
            "SIGCHLD is sent to this process very often though no child has ended; until that stops, aiopidfd does not "
            "handle it, and checks its children once a second"
        )


def _warn_if_ignored(found: str) -> None:
    """Log once that with the handler that was found the kernel reaps children."""
    global _warned_of_ignored  # noqa: PLW0603 - the handler is the process's
    if _warned_of_ignored or not (found.startswith("SIG_IGN") or "SA_NOCLDWAIT" in found):
        return
    _warned_of_ignored = True
    logger.warning(
        "SIGCHLD is %s, so the kernel reaps children before anyone can read their status; "
        "while aiopidfd watches children it handles SIGCHLD, and other children of this process must be waited for",
        "ignored" if found.startswith("SIG_IGN") else "handled with SA_NOCLDWAIT",
    )


def recent_replacement() -> str:
    """Return what replaced the handler within the last two checks, as `describe_sigchld` does; "" if nothing did."""
    when, what = _replaced
    return what if time.monotonic() - when < 2 * CHECK_INTERVAL_S else ""


def forget_after_fork() -> None:
    """In a forked child: forget all children, which are the parent's. `after_fork_in_child` has removed the handler."""
    global _abandoned  # noqa: PLW0603 - the handler is the process's
    _reinit_lock()  # another thread of the parent may hold it
    if _backends:
        _backends.clear()
    if _abandoned:
        _abandoned = False


def is_used() -> bool:
    """Return whether any child of this process is watched by pid alone. Then `claim` has to be called for each new child."""
    return _abandoned or (bool(_backends) and _count() > 0)


def claim(pid: int) -> None:
    """Make sure that the handler does not reap a new child that has the pid of an abandoned one, which is gone."""
    if _abandoned:
        with _lock:
            syscalls.claim_abandoned(pid)


def abandon(pids: list[int]) -> None:
    """Have the handler reap children whose loop is closed."""
    global _abandoned  # noqa: PLW0603 - the handler is the process's
    with _lock:
        for pid in pids:
            if syscalls.abandon_to_sigchld(pid):
                _abandoned = True
            else:
                logger.warning(
                    "child process %d: too many children outlive their loops; it stays a zombie when it exits", pid
                )
        syscalls.install_sigchld()
        settle_abandoned()  # they may have ended before the handler was installed


@contextlib.contextmanager
def kept_from_handler(pid: int) -> Iterator[None]:
    """Make sure that the handler does not reap an abandoned child in the meantime, so its pid stays its own."""
    with _lock:
        claimed = syscalls.claim_abandoned(pid)
        try:
            yield
        finally:
            if claimed:
                abandon([pid])


def settle_abandoned() -> None:
    """Reap abandoned children that have ended. After the last one restore the handler that was there before."""
    global _abandoned  # noqa: PLW0603 - the handler is the process's
    with _lock:
        if _abandoned and syscalls.reap_abandoned() == 0:
            _abandoned = False
            if _count() == 0:
                syscalls.restore_sigchld()


class SigchldBackend(Backend):
    """Watches children by pid. The SIGCHLD handler wakes the reaper of the loop."""

    __slots__ = ("__weakref__", "_identities", "_pids", "_plan", "_planned_for", "_scan_after", "_strangers", "is_scan_due")

    name = "sigchld"

    def __init__(self, reaper: Reaper, plan: Callable[[float, float], object]) -> None:
        """Raises OSError: EMFILE, ENFILE, out of descriptors.

        `plan(delay_s, number)` has to call `begin_scan(number)` after `delay_s`, in the loop's thread.
        """
        reaper.add_wake(syscalls.open_sigchld())
        self._pids = Pids()
        # The inode of a child, or (a float) a time since the boot when it existed: whether its pid is still its own.
        self._identities: dict[int, int | float] = {}
        # Processes that send no SIGCHLD to this one, by pid, with their start time; None if /proc does not show it.
        self._strangers: dict[int, bytes | None] = {}
        self._plan = plan
        self._planned_for = _NEVER
        self._scan_after = 0.0
        self.is_scan_due = False  # `reap` scans for children that no signal has named
        _backends.add(weakref.ref(self, _backends.discard))

    def add(self, pid: int, flags: int) -> int:
        """Watch a child; without ADD_CHECK_CHILD, also a stranger."""
        self._pids.add(pid, bool(flags & ADD_PEEK))
        _on_added()  # before the wait_id below: an exit after that is signalled
        try:
            ended = syscalls.wait_id(syscalls.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except OSError as exc:
            self.remove(pid, -1)
            state = read_state(pid)
            if state is None:  # it was reaped, or there never was such a process
                raise syscalls.error(errno.ESRCH, f"cannot watch pid {pid}") from exc
            if flags & ADD_CHECK_CHILD:
                raise syscalls.error(errno.ECHILD, f"cannot watch pid {pid}") from exc
            self._strangers[pid] = state.start_time
        else:
            self._identities[pid] = inode_of(pid) or time.clock_gettime(time.CLOCK_BOOTTIME)
            if ended is not None:
                syscalls.simulate_sigchld(pid)
        return -1

    def adopt(self, pid: int, pidfd: int, flags: int) -> int:
        """Watch a child, and close its pidfd, which is not used."""
        self.add(pid, flags)
        os.close(pidfd)
        return -1

    def modify(self, pid: int, pidfd: int, flags: int) -> None:
        """Change whether a child is reaped, or left to its owner."""
        if pid not in self._strangers:
            self._pids.add(pid, bool(flags & ADD_PEEK))
            syscalls.simulate_sigchld(pid)

    def remove(self, pid: int, pidfd: int) -> None:
        """Stop watching."""
        self._identities.pop(pid, None)
        if pid in self._strangers:
            del self._strangers[pid]
        elif self._pids.remove(pid):
            _on_removed()

    def is_recycled(self, pid: int, pidfd: int) -> bool:
        """Return whether another process has the pid, by inode or start time."""
        started = self._strangers.get(pid)
        if started is not None:
            state = read_state(pid)
            return state is not None and state.start_time not in (None, started)
        known = self._identities.get(pid)
        if isinstance(known, float):
            return is_started_after(pid, known)
        return known is not None and inode_of(pid) not in (None, known)

    def reap(self) -> Iterator[Record]:
        """Reap the children that signals have named, and scan for others if a scan is due. Plan the next scan if needed."""
        yield from self._take(self._pids.reap_named)
        if self.is_scan_due:
            yield from self._scan()
            self.is_scan_due = False  # not earlier: an interrupt must not lose it
        doubt = self._pids.doubt
        if doubt and len(self._pids):
            # Not at once: the observers of children that were found are called first.
            self._plan_scan(0.0 if doubt & DOUBT_NOW else _SCAN_DELAY_S)

    def _plan_scan(self, delay_s: float) -> None:
        now = time.monotonic()
        at = max(now + delay_s, self._scan_after)
        if at < self._planned_for:
            self._planned_for = at
            self._plan(at - now, at)

    def begin_scan(self, number: float) -> bool:
        """Return whether `reap` has to be called now. False if an earlier scan was planned after this one."""
        if number != self._planned_for:
            return False
        self._planned_for, self.is_scan_due = _NEVER, True
        return True

    def _scan(self) -> Iterator[Record]:
        """Reap all children that have ended: by the kernel's list of zombies where that is enough, else one by one."""
        began, before = time.thread_time(), len(self._pids)
        doubt = self._pids.take_doubt()
        yield from self._take(self._pids.reap_first)
        if (doubt | self._pids.take_doubt()) & DOUBT_ALL:
            yield from self._take(self._pids.reap_all)
        in_vain_s = time.thread_time() - began - (before - len(self._pids)) * _EXIT_COST_S
        self._scan_after = time.monotonic() + max(in_vain_s, 0.0) * _REST_AFTER_SCAN

    def _take(self, reap: Callable[[], tuple[int, Iterator[Record]]]) -> Iterator[Record]:
        """Call one of the reaping methods of `Pids` until it finds no more."""
        while True:
            count, records = reap()
            for record in records:
                self._identities.pop(record[0], None)
                yield record
            if count:
                self._pids.release()
                _on_removed()
            if count < BATCH_SIZE:
                return

    def check(self) -> Iterator[Record]:
        """Install the handler again if it was replaced, and check every child and stranger."""
        if len(self._pids):
            with _lock:
                _install(anew=False, resume=True)
        for pid, started in tuple(self._strangers.items()):
            state = read_state(pid)
            if state is None or state.has_ended or (started and state.start_time and state.start_time != started):
                del self._strangers[pid]
                yield pid, -1, 0, SOURCE_LOST, b""
            elif started is None:
                self._strangers[pid] = state.start_time
        yield from self._take(self._pids.reap_all)

    def is_idle(self) -> bool:
        """Return whether nothing is watched."""
        return not (len(self._pids) or self._strangers)

    def close(self) -> None:
        """Stop watching all: the loop is closed."""
        self._strangers.clear()
        self._identities.clear()
        count, self._pids = len(self._pids), Pids()
        if count:
            _on_removed()

    def send_signal(self, pid: int, pidfd: int, signal: int) -> None:
        """Signal by pid. Under the lock of the registry the child is not reaped here, so the pid stays its own."""
        self._check_is_there(pid)
        _signal_unreaped(pid, os.kill, pid, signal)

    def signal_group(self, pid: int, pidfd: int, pgid: int, signal: int) -> None:
        """Signal the group. While the child is alive or a zombie, no other group has this number."""
        self._check_is_there(pid)
        _signal_unreaped(pid, os.killpg, pgid, signal)

    def _check_is_there(self, pid: int) -> None:
        if self.is_recycled(pid, -1):
            raise syscalls.error(errno.ESRCH, f"signal for process {pid}")


def _signal_unreaped(pid: int, kill: Callable[[int, int], None], target: int, signal: int) -> None:
    """Call `kill`. Raise ESRCH if another waitpid() reaped the child first."""
    try:
        syscalls.wait_id(syscalls.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError as exc:
        raise syscalls.error(errno.ESRCH, f"{kill.__name__}({target}, signal {signal})") from exc
    try:
        kill(target, signal)
    except OSError as exc:
        raise syscalls.signal_error(exc.errno or errno.EINVAL, f"{kill.__name__}({target}, signal {signal})") from exc
