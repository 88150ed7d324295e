"""The SIGCHLD backend: for kernels and sandboxes without pidfds, and for children beyond the descriptor limit."""

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

# How often the handler is checked, and every child asked for, while children are watched by it: what a replaced handler,
# or another waitpid(), can delay an exit by.
CHECK_INTERVAL_S = 1.0

# Signals merge, so that after each there is doubt whether others have ended, too. To look for them costs the more the more
# children there are; so that is done in a fiftieth of the time at most, not counting what a child that is found would have
# cost anyway. What must wait longer, the check finds.
_REST_AFTER_SCAN = 49
_EXIT_COST_S = 0.0001

# After a signal that was for others: until then they have reaped their zombie, and nothing need be asked but the kernel's
# list. Many such signals cost one look.
_SCAN_DELAY_S = 0.1

_NEVER = float("inf")

# The handler is the process's; it is in place while any loop watches a child by it. Re-entrant for Python signal handlers.
_lock = RLock()
_reinit_lock = _lock._at_fork_reinit  # type: ignore[attr-defined] # not in typeshed
_backends: set[weakref.ReferenceType[SigchldBackend]] = (
    set()
)  # no WeakSet: each start of a program looks whether it is empty
_abandoned = False
_replaced: tuple[float, str] = (0.0, "")  # when our handler was found replaced while it was needed, and by what
_warned_of_ignored = False
_warned_of_storm = False


def _count() -> int:
    """Return how many children are watched, by all loops. Asked for anew: an interrupt would leave a running total wrong."""
    # A copy: while a tuple is made, the garbage collector may run, and take a backend out.
    return sum(len(backend._pids) for known in _backends.copy() if (backend := known()) is not None)


def _on_added() -> None:
    """Install the handler for the first child, and at each further one if it was replaced."""
    with _lock:
        is_first = _count() == 1
        _install(anew=is_first, resume=is_first)


def _on_removed() -> None:
    """Restore what was there before, after the last child."""
    with _lock:
        if _count() > 0:
            return
        if _abandoned:
            syscalls.install_sigchld()  # if it has paused: no loop will have it resume
        else:
            syscalls.restore_sigchld()


def _install(*, anew: bool, resume: bool) -> None:
    """Put the handler in front. If it was there, somebody has replaced it: remember by what, for that may have reaped."""
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
    """Say once that the handler had to pause."""
    global _warned_of_storm  # noqa: PLW0603 - the handler is the process's
    if not _warned_of_storm:
        _warned_of_storm = True
        logger.warning(
            "SIGCHLD is sent to this process very often though no child has ended; while that goes on, aiopidfd does not "
            "handle it, and finds children that have ended once a second"
        )


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
    """In a forked child: the handler, which `after_fork_in_child` has removed, and all that it watches, are the parent's."""
    global _abandoned  # noqa: PLW0603 - the handler is the process's
    _reinit_lock()  # another thread of the parent may have held it
    if _backends:
        _backends.clear()
    if _abandoned:
        _abandoned = False


def is_used() -> bool:
    """Return whether any child of this process is known by pid alone, so that a new one of that number must be told of."""
    return _abandoned or (bool(_backends) and _count() > 0)


def claim(pid: int) -> None:
    """Have the handler not reap a new child that has the number of an abandoned one, which is gone."""
    if _abandoned:
        with _lock:
            syscalls.claim_abandoned(pid)


def abandon(pids: list[int]) -> None:
    """Have the handler reap children whose loop is gone."""
    global _abandoned  # noqa: PLW0603 - the handler is the process's
    with _lock:
        for pid in pids:
            if syscalls.abandon_to_sigchld(pid):
                _abandoned = True
            else:
                logger.warning("child process %d outlives its loop with too many others; nobody will reap it", pid)
        syscalls.install_sigchld()
        settle_abandoned()  # they may have ended before the handler was in place


@contextlib.contextmanager
def kept_from_handler(pid: int) -> Iterator[None]:
    """Have the handler leave an abandoned child alone meanwhile, so that its number stays its own."""
    with _lock:
        claimed = syscalls.claim_abandoned(pid)
        try:
            yield
        finally:
            if claimed:
                abandon([pid])


def settle_abandoned() -> None:
    """Reap those abandoned children that have ended; after the last one put back the handler that was there before."""
    global _abandoned  # noqa: PLW0603 - the handler is the process's
    with _lock:
        if _abandoned and syscalls.reap_abandoned() == 0:
            _abandoned = False
            if _count() == 0:
                syscalls.restore_sigchld()


class SigchldBackend(Backend):
    """Watch children by pid. A chained SIGCHLD handler in C wakes the loop's reaper; then we look at what is dead."""

    __slots__ = ("__weakref__", "_identities", "_pids", "_plan", "_planned_for", "_scan_after", "_strangers", "is_scan_due")

    name = "sigchld"

    def __init__(self, reaper: Reaper, plan: Callable[[float, float], object]) -> None:
        """EMFILE, ENFILE: out of descriptors.

        `plan(delay_s, number)` is to call `begin_scan(number)` in so many seconds, in the loop's thread.
        """
        reaper.add_wake(syscalls.open_sigchld())
        self._pids = Pids()
        # What tells a child from a later one of its number: its inode, or (a float) when it was there, since the boot.
        self._identities: dict[int, int | float] = {}
        # Processes that send us no SIGCHLD, by pid, with the time of their start, as far as it can be seen.
        self._strangers: dict[int, bytes | None] = {}
        self._plan = plan
        self._planned_for = _NEVER
        self._scan_after = 0.0
        self.is_scan_due = False  # to be looked for those that no signal has named, by `reap`
        _backends.add(weakref.ref(self, _backends.discard))

    def add(self, pid: int, flags: int) -> int:
        """Watch a child, or, without ADD_CHECK_CHILD, a stranger."""
        self._pids.add(pid, bool(flags & ADD_PEEK))
        _on_added()  # the handler is in place before we look, so that an end after the look is signalled
        try:
            ended = syscalls.wait_id(syscalls.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except OSError as exc:
            self.remove(pid, -1)
            state = read_state(pid)
            if state is None:  # ended and reaped, or never there
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
        """Watch a child; its pidfd is of no use here."""
        self.add(pid, flags)
        os.close(pidfd)
        return -1

    def modify(self, pid: int, pidfd: int, flags: int) -> None:
        """Change whether a child is only peeked at."""
        if pid not in self._strangers:
            self._pids.add(pid, bool(flags & ADD_PEEK))
            syscalls.simulate_sigchld(pid)

    def remove(self, pid: int, pidfd: int) -> None:
        """Watch no longer."""
        self._identities.pop(pid, None)
        if pid in self._strangers:
            del self._strangers[pid]
        elif self._pids.remove(pid):
            _on_removed()

    def is_recycled(self, pid: int, pidfd: int) -> bool:
        """Ask who has the number now."""
        started = self._strangers.get(pid)
        if started is not None:
            state = read_state(pid)
            return state is not None and state.start_time not in (None, started)
        known = self._identities.get(pid)
        if isinstance(known, float):
            return is_started_after(pid, known)
        return known is not None and inode_of(pid) not in (None, known)

    def reap(self) -> Iterator[Record]:
        """Reap those that signals have named, and look for others, if that is due; where there is doubt, plan to."""
        yield from self._take(self._pids.reap_named)
        if self.is_scan_due:
            yield from self._scan()
            self.is_scan_due = False  # not before: an interrupt must not lose it
        doubt = self._pids.doubt
        if doubt and len(self._pids):
            # Not at once: let those that were found be told first.
            self._plan_scan(0.0 if doubt & DOUBT_NOW else _SCAN_DELAY_S)

    def _plan_scan(self, delay_s: float) -> None:
        now = time.monotonic()
        at = max(now + delay_s, self._scan_after)
        if at < self._planned_for:
            self._planned_for = at
            self._plan(at - now, at)

    def begin_scan(self, number: float) -> bool:
        """Return whether `reap` is to be called now: what was planned under this number was not overtaken."""
        if number != self._planned_for:
            return False
        self._planned_for, self.is_scan_due = _NEVER, True
        return True

    def _scan(self) -> Iterator[Record]:
        """Reap all that have ended: by one walk over the kernel's list, where that can find them."""
        began, before = time.thread_time(), len(self._pids)
        doubt = self._pids.take_doubt()
        yield from self._take(self._pids.reap_first)
        if (doubt | self._pids.take_doubt()) & DOUBT_ALL:
            yield from self._take(self._pids.reap_all)
        in_vain_s = time.thread_time() - began - (before - len(self._pids)) * _EXIT_COST_S
        self._scan_after = time.monotonic() + max(in_vain_s, 0.0) * _REST_AFTER_SCAN

    def _take(self, reap: Callable[[], tuple[int, Iterator[Record]]]) -> Iterator[Record]:
        """Reap in one of the ways of `Pids` until there is no more."""
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
        """Put the handler back in front if somebody has replaced it, and ask for every child and stranger."""
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
        """Return whether nothing is watched, so that nothing need be checked."""
        return not (len(self._pids) or self._strangers)

    def close(self) -> None:
        """Forget all: the loop is closed."""
        self._strangers.clear()
        self._identities.clear()
        count, self._pids = len(self._pids), Pids()
        if count:
            _on_removed()

    def send_signal(self, pid: int, pidfd: int, signal: int) -> None:
        """Signal by pid, which is the child's until it is reaped: not by us meanwhile, for the registry's lock is held."""
        self._check_is_there(pid)
        _signal_unreaped(pid, os.kill, pid, signal)

    def signal_group(self, pid: int, pidfd: int, pgid: int, signal: int) -> None:
        """Signal the group, whose number the child keeps, alive or a zombie."""
        self._check_is_there(pid)
        _signal_unreaped(pid, os.killpg, pgid, signal)

    def _check_is_there(self, pid: int) -> None:
        if self.is_recycled(pid, -1):
            raise syscalls.error(errno.ESRCH, f"signal for process {pid}")


def _signal_unreaped(pid: int, kill: Callable[[int, int], None], target: int, signal: int) -> None:
    """Call `kill`, unless somebody else has reaped the child: ESRCH."""
    try:
        syscalls.wait_id(syscalls.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError as exc:
        raise syscalls.error(errno.ESRCH, f"{kill.__name__}({target}, signal {signal})") from exc
    try:
        kill(target, signal)
    except OSError as exc:
        raise syscalls.signal_error(exc.errno or errno.EINVAL, f"{kill.__name__}({target}, signal {signal})") from exc
