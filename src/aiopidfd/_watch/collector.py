"""Collects the exits of one loop's children: they are reaped, and their observers notified.

The reaper fails when other code closes its descriptor: os.closerange() in a library that makes the process a daemon, or a
second close of a number that was used again. The pidfds may be closed, too, and all these numbers may belong to other files
by now. The reaper also fails when a new seccomp filter forbids epoll_wait. Then another reaper is opened. If that fails, the
children are watched by SIGCHLD.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import Context

from .._backends.pidfd_backend import PidfdBackend
from .._backends.sigchld_backend import CHECK_INTERVAL_S, SigchldBackend
from .._kernel import syscalls
from .._kernel.exit_status import ExitStatus
from .._kernel.identity import is_pidfd_of
from .._kernel.reaper import (
    ADD_CHECK_CHILD,
    ADD_PEEK,
    BATCH_SIZE,
    SOURCE_GATE_READY,
    SOURCE_LOST,
    SOURCE_PENDING,
    SOURCE_RECOVERED,
    Reaper,
    Record,
)
from .child import Child
from .loop_link import LoopLink
from .notify import Notifier
from .start_gate import StartGates
from .starting import StartingProgram

# How many batches one call of the loop reaps and reports at most, before other callbacks run.
_BATCHES = 4

# How long a stranger may stay a zombie before its exit is reported without a status.
STRANGER_GRACE_S = 1.0

# A reaper that fails sooner than this is not replaced.
TRIAL_S = 1.0


# The collectors that may watch children by pid alone, by id(). `valuerefs` copies: other threads may add some.
sigchld_collectors: weakref.WeakValueDictionary[int, Collector] = weakref.WeakValueDictionary()


class Collector:
    """The watched processes of one loop, and the exits among them.

    The lock makes a reap and the closing of the pidfds one step for other threads. So no thread uses a descriptor number
    that was closed and given to another file. The lock is re-entrant: a Python signal handler may run between any two
    bytecodes and call this registry. No other user code runs while the lock is held.
    """

    inherited = False  # True in a forked child, where the registry is the parent's and the loop may go on

    def __init__(self, loop: asyncio.AbstractEventLoop, on_loop_closed: Callable[[], object]) -> None:
        """Open the backend and register it with `loop`. `on_loop_closed` is called when the loop is closed or garbage.

        OSError EMFILE, ENFILE: out of descriptors.
        """
        # Weak: the loop owns the registry, through its reader. So both can be garbage collected.
        self.loop = weakref.ref(loop)
        self.closed = False  # also set in a forked child, where a thread that does not exist may hold the lock
        self.contexts: dict[int, Context] = {}  # of transports, by their id(): they live as long as the loop
        self._lock = threading.RLock()
        self._children: dict[int, Child] = {}
        self.starting: set[StartingProgram] = set()
        syscalls.open_sigchld()  # now: later there may be no descriptor left
        self._reaper = Reaper()
        self.gates = StartGates()
        self._pidfd = PidfdBackend(self._reaper)
        self._sigchld: SigchldBackend | None = None
        self._checking = False
        self._failures: set[tuple[type, int | None]] = set()
        self.replaced_at = float("-inf")  # the reaper, by another one
        self.link = LoopLink(self.loop, self._reaper.fd, self.collect, on_loop_closed)
        self._notifier = Notifier(self.loop, self.link)

    def collect(self) -> None:
        """Reap children that have ended and call their observers, up to `_BATCHES` batches in one round of the loop."""
        try:
            for _ in range(_BATCHES):
                try:
                    with self._lock:
                        is_full = self._reap()
                except Exception as exc:
                    is_full = False
                    self._handle_failure(exc)
                self._notifier.notify_all()
                if not is_full:
                    break
        except BaseException:
            # KeyboardInterrupt from a signal handler, or SystemExit from an observer: the next round reports the rest.
            self.link.call_soon(self.collect)
            raise

    def _reap(self) -> bool:
        """Reap one batch. Return whether it was full, so there may be more."""
        if self.closed:
            return False
        reaper = self._reaper
        count = 0
        if reaper.fd >= 0:  # else the reaper has failed, and could not be replaced
            count, records = reaper.reap()
            self._take_records(records)
            reaper.release()
        sigchld = self._sigchld
        if sigchld is not None and (reaper.woken or sigchld.is_scan_due):
            self._take_records(sigchld.reap())
            reaper.clear_woken()  # not earlier: an interrupt must not lose the wake-up
        return count == BATCH_SIZE

    def _take_records(self, records: Iterator[Record]) -> None:
        """Move children that were reaped from the watched ones to the pending ones."""
        children, pending = self._children, self._notifier.pending
        not_yet = SOURCE_PENDING
        for record in records:
            pid, _, _, source, _ = record
            child = children.get(pid)
            if child is None:
                if source >= SOURCE_GATE_READY:
                    gate = self.gates.find(-pid)
                    if gate is not None:
                        gate.on_message(source == SOURCE_GATE_READY)
                        pending.append(gate)
                elif self.starting:
                    self.starting -= {program for program in self.starting if program.pid == pid}
                continue  # else a signal handler has unobserved it, or its record was taken before an interrupt
            if source == not_yet:
                if child.stranger:
                    self.link.call_later(STRANGER_GRACE_S, self._give_up_stranger, child)
            else:
                child.result = record
                pending.append(child)
                child.pidfd = -1
                del children[pid]

    def _recover(self, exc: OSError) -> bool:
        """Replace the reaper if it is the cause of `exc`. Return whether it was."""
        if exc.errno not in (errno.EBADF, errno.EINVAL) or self._reaper.fd < 0:
            return False
        with self._lock:
            try:
                self._reap()
            except OSError as failure:
                self._handle_failure(failure)
                return True
        return False

    def _handle_failure(self, exc: Exception) -> None:
        """Report once why reaping fails, and watch the children another way."""
        failure = type(exc), getattr(exc, "errno", None)
        with self._lock:
            if self.closed:
                return
            is_new = failure not in self._failures
            self._failures.add(failure)
            if isinstance(exc, OSError) and self._reaper.fd >= 0:
                self._replace_reaper(exc)
        if is_new:
            self.link.call_soon(
                self._notifier.report,
                exc,
                "aiopidfd cannot reap children with its epoll descriptor, and watches them another way",
            )

    def _replace_reaper(self, exc: OSError) -> None:
        """Open another reaper that holds the children, or watch them by SIGCHLD. Under the lock."""
        reaper, now = self._reaper, time.monotonic()
        if exc.errno in (errno.EBADF, errno.EINVAL):  # closed, or not an epoll
            reaper.mark_closed()
        else:
            reaper.close()
        self.gates.fail_all()
        if now - self.replaced_at > TRIAL_S:
            try:
                reaper.reopen()
                if self._sigchld is not None:
                    reaper.add_wake(syscalls.open_sigchld())
            except OSError:  # out of descriptors; or the descriptor that the SIGCHLD handler writes to is closed, too
                reaper.close()
        self.replaced_at = now
        self.link.move(reaper.fd)
        for child in tuple(self._children.values()):
            if child.backend is self._pidfd:
                self._watch_again(child)
        if self._sigchld is not None:
            self._start_checking()

    def _watch_again(self, child: Child) -> None:
        pid, flags = child.pid, ADD_PEEK if child.peek else 0
        pidfd, child.pidfd = child.pidfd, -1
        if not is_pidfd_of(pidfd, pid):
            syscalls.untrack_fd(pidfd)
            pidfd = -1
            if not child.stranger:
                flags |= ADD_CHECK_CHILD
        try:
            if self._reaper.fd < 0:
                child.backend = self._get_sigchld()
                child.backend.add(pid, flags)
            elif pidfd < 0:
                child.pidfd = self._reaper.add(pid, flags)
            else:
                self._reaper.adopt(pid, pidfd, flags)
                child.pidfd, pidfd = pidfd, -1
        except OSError:  # another waitpid() reaped it first; or out of descriptors
            child.backend = self._pidfd
            child.pidfd, pidfd = pidfd, -1
            self._report_lost(child)
        finally:
            if pidfd >= 0:
                syscalls.close_tracked_fd(pidfd)

    def _plan_scan(self, delay_s: float, number: float) -> None:
        self.link.call_later(delay_s, self._scan, number)

    def _scan(self, number: float) -> None:
        if self._sigchld is not None and self._sigchld.begin_scan(number):
            self.collect()

    def _start_checking(self) -> None:
        """Check once a second from now on, as long as a child is watched by SIGCHLD."""
        if not self._checking:
            self._checking = True
            self.link.call_later(CHECK_INTERVAL_S, self._check)

    def _check(self) -> None:
        """Find exits that no signal has reported. Called once a second while children are watched by SIGCHLD."""
        with self._lock:
            if self.closed or self._sigchld is None:
                return
            self._checking = not self._sigchld.is_idle()
            if not self._checking:
                return
            # First: an interrupt of this check must not prevent the next one.
            self.link.call_later(CHECK_INTERVAL_S, self._check)
            try:
                self._take_records(self._sigchld.check())
            except Exception as exc:
                self._handle_failure(exc)
        self.collect()

    def report_previous_owner(self, pid: int) -> None:
        """Report the exit of a process that is watched by pid alone: a new child has its pid now."""
        if not self.closed:
            with self._lock:
                child = self._children.get(pid)
                if child is not None and child.backend is self._sigchld:
                    self._report_lost(child)

    def _report_lost(self, child: Child) -> None:
        """Report the exit of a process that another waitpid() reaped first. Its pid may be another process's by now."""
        pid, record = child.pid, (child.pid, -1, 0, SOURCE_LOST, b"")
        if child.backend is self._pidfd:
            with contextlib.suppress(OSError):  # the reaper has failed, or this kernel does not keep the status
                for _ in range(2 + len(self._children)):  # its pidfd is ready, and at most so many batches away
                    if child.result is not None:
                        break
                    self._reap()
                else:
                    status = syscalls.get_exit(child.pidfd)
                    if status is not None:
                        record = pid, -1, status, SOURCE_RECOVERED, b""
        if child.result is None:
            del self._children[pid]
            self._reaper.keep_open(child.pidfd)
            child.backend.remove(pid, child.pidfd)
            child.result, child.pidfd = record, -1
            self._notifier.pending.append(child)
        self.link.call_soon(self.collect)

    def _get_sigchld(self) -> SigchldBackend:
        if self._sigchld is None:
            self._sigchld = SigchldBackend(self._reaper, self._plan_scan)
            sigchld_collectors[id(self)] = self
        return self._sigchld

    def _give_up_stranger(self, child: Child) -> None:
        """Report the exit of a stranger whose parent does not reap it, so its status is not known."""
        with self._lock:
            if child.result is not None or self._children.get(child.pid) is not child:
                return
            del self._children[child.pid]
            child.backend.remove(child.pid, child.pidfd)
            child.result, child.pidfd = ExitStatus(child.pid, 0, "not-child"), -1
            self._notifier.pending.append(child)
        self.collect()
