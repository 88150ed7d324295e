"""One loop's registry of watched processes and their observers.

`observe` is the one way in, for handlers, handles, transports and `wait()`. `release` does the same for a forked child that
waits at its start gate.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable
from contextvars import copy_context
from signal import SIGKILL

from .._backends.backend import Backend, Choice, choose, decision, is_forbidden, logger
from .._backends.orphans import ENDED, NOT_OURS, UNKNOWN, Orphan
from .._backends.sigchld_backend import abandon, claim, is_used
from .._kernel import syscalls
from .._kernel.reaper import ADD_CHECK_CHILD, ADD_PEEK, try_add
from .child import Args, Child, Observer, make_child
from .collector import Collector, sigchld_collectors
from .start_gate import StartGate
from .starting import kill_unwatched

_CLOSED = "the event loop is closed, or its process is this one's parent"


def claim_pid(pid: int) -> None:
    """Report the previous owner of a new child's pid, in all loops that watch by pid alone. Not under a registry's lock."""
    if is_used():
        claim(pid)
        for known in sigchld_collectors.valuerefs():
            registry = known()
            if registry is not None:
                registry.report_previous_owner(pid)


class Registry(Collector):
    """The watched processes of one loop, and their observers.

    Any thread may call the methods. Observers are called in the loop's thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, forget: Callable[[Registry], object]) -> None:
        """Open the backend and register it with `loop`. `close` calls `forget`.

        OSError EMFILE, ENFILE: out of descriptors.
        """
        self._forget = forget
        self._owner = os.getpid()
        self._warned_of_limit = False
        super().__init__(loop, self.close)

    def __repr__(self) -> str:
        return f"<Registry {'closed' if self.closed else 'open'} children={len(self._children)} of {self.loop()!r}>"

    def observe(
        self,
        pid: int,
        key: object,
        observer: Observer,
        args: Args = None,
        *,
        backend: Choice = "auto",
        reap: bool = True,
        check: bool = True,
        stranger: bool = False,
        pidfd: int = -1,
        is_held: bool = False,
        is_new: bool = False,
    ) -> Child:
        """Have `observer` called once, in the loop's thread, when the process `pid` has ended.

        It is called with an ExitStatus or, if there are `args`, with pid, returncode, *args.

        Args:
            key: the identity of the observer. A second call with the same key replaces the observer.
            args: the further arguments of the observer.
            backend: how to watch the process, if it is not watched yet.
            reap: False leaves the zombie to its owner, if all observers of the process say so.
            check: make sure that the process is a child of this one, which takes one system call.
            stranger: watch the process even if it is not a child of this one.
            pidfd: an open pidfd of the process. The registry owns it if this call succeeds.
            is_held: the reaper holds `pidfd` already.
            is_new: the process has just been created, so a previous owner of its pid is gone. Not under the lock.

        Raises:
            RuntimeError: the loop is closed.
            OSError: as Backend.add.
        """
        if is_new:
            claim_pid(pid)
        with self._lock:
            if self.closed:
                raise RuntimeError(_CLOSED)
            child = self._children.get(pid)
            if child is not None and (is_new or child.backend.is_recycled(pid, child.pidfd)):
                self._report_lost(child)
                child = None
            context = None if args is None else copy_context()
            if child is None:
                used: Backend = self._pidfd
                is_stranger = False
                if not is_held:
                    flags = (0 if reap else ADD_PEEK) | (ADD_CHECK_CHILD if check else 0)
                    # The usual case first, one call of C: through `_watch` a child handler costs 5 % more.
                    is_usual = pidfd < 0 and backend != "sigchld" and decision.name == "pidfd"
                    opened = try_add(self._reaper.fd, pid, flags) if is_usual else -1
                    if opened >= 0:
                        pidfd = opened
                    else:
                        used, pidfd, is_stranger = self._watch(pid, pidfd, backend, flags, stranger=stranger)
                child = make_child(pid, pidfd, used, key, observer, args, context)
                child.stranger = is_stranger
                if not reap:
                    child.peek, child.peekers = True, frozenset((key,))
                self._children[pid] = child  # with its observer, so that an interrupt leaves none without
                return child
            if pidfd >= 0:
                os.close(pidfd)
            child.add_observer(key, observer, args, context)
            if child.peekers or not reap:
                child.peekers = child.peekers - {key} if reap else child.peekers | {key}
                self._agree_on_peek(child)
            return child

    def _watch(self, pid: int, pidfd: int, choice: Choice, flags: int, *, stranger: bool) -> tuple[Backend, int, bool]:
        """Have a backend watch a process. Return the backend, the pidfd, and whether the process is a stranger."""
        backend: Backend = self._pidfd if choose(choice) == "pidfd" and self._reaper.fd >= 0 else self._get_sigchld()
        try:
            return self._watch_by(backend, pid, pidfd, flags, stranger=stranger)
        except OSError as exc:
            if self._recover(exc):
                return self._watch(pid, pidfd, choice, flags, stranger=stranger)
            if choice != "auto" or backend is self._sigchld:
                raise
            if exc.errno in syscalls.OUT_OF_DESCRIPTORS:  # this child only
                if not self._warned_of_limit:
                    logger.warning("watching children by SIGCHLD: %s", exc.strerror)
                self._warned_of_limit = True
            elif not is_forbidden(exc):
                if exc.errno == errno.EINVAL:  # the ID of a thread, before Linux 6.9
                    raise syscalls.error(errno.ESRCH, f"cannot watch pid {pid}") from exc
                raise
            return self._watch_by(self._get_sigchld(), pid, pidfd, flags, stranger=stranger)

    def _watch_by(self, backend: Backend, pid: int, pidfd: int, flags: int, *, stranger: bool) -> tuple[Backend, int, bool]:
        is_stranger = False
        if pidfd >= 0:
            pidfd = backend.adopt(pid, pidfd, flags)
        else:
            try:
                pidfd = backend.add(pid, flags)
            except ChildProcessError:
                if not stranger:
                    raise
                pidfd, is_stranger = backend.add(pid, flags & ~ADD_CHECK_CHILD), True
        if backend is self._sigchld:
            self._start_checking()
        return backend, pidfd, is_stranger

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError(_CLOSED)

    def prepare(self, key: object, observer: Observer) -> Child:
        """Return the Child of a process that is not forked yet. `release` observes it once it is."""
        self._check_open()
        return make_child(0, -1, self._pidfd if choose("auto") == "pidfd" else self._get_sigchld(), key, observer)

    def fork(self, gate: StartGate, child_main: syscalls.ChildMain, fork: Callable[[], int] | None) -> None:
        """Fork a child that waits at `gate` and then calls `child_main`. Raises what syscalls.fork_child raises."""
        self.gates.add(gate)
        try:
            syscalls.fork_child(gate.struct, self._reaper.fd, gate.number, child_main, fork)
        except OSError as exc:
            if gate.struct.pid > 0:
                raise
            self.gates.close(gate)  # before `_recover`, which completes the futures of open gates
            if not self._recover(exc):
                raise
            self.gates.add(gate)
            syscalls.fork_child(gate.struct, self._reaper.fd, gate.number, child_main, fork)

    def release(self, child: Child, gate: StartGate) -> bool:
        """Watch a prepared child that waits at `gate`, and release it. Return False if `observe` has to watch the child.

        One call of C opens the pidfd, has the reaper hold it, and writes to the gate. Nothing is made after the fork, when
        each page of memory that is written to is copied. With `observe` instead an `afork` takes 10 % more CPU time.
        """
        struct = gate.struct
        if child.backend is not self._pidfd or struct.pidfd >= 0:
            return False
        claim_pid(struct.pid)
        with self._lock:
            self._check_open()
            previous = self._children.get(struct.pid)
            if previous is not None:
                self._report_lost(previous)
            if syscalls.try_release(struct, self._reaper.fd) < 0:
                return False
            child.pid, child.pidfd = struct.pid, struct.pidfd
            self._children[child.pid] = child
            gate.is_watched = True
            return True

    def kill_forked(self, gate: StartGate, observer: Observer) -> bool:
        """Kill a forked child. Return whether `observer` will be called. If not, the child was unwatched, and is reaped."""
        with self._lock:
            child = self._children.get(gate.struct.pid)
            if child is not None and child.is_observed_by(observer):
                self.send_signal(child, SIGKILL)
            elif not gate.is_watched:
                if self._sigchld is not None:
                    self._sigchld.remove(gate.struct.pid, -1)
                syscalls.undo_child(gate.struct, self._reaper.fd)
                return False
            return True

    def watch_by_sigchld(self, child: Child) -> bool:
        """Watch a child by SIGCHLD from now on, and close its pidfd. Return whether that was done."""
        with self._lock:
            if child.pidfd < 0 or self._children.get(child.pid) is not child:
                return False
            sigchld = self._get_sigchld()
            try:
                sigchld.add(child.pid, ADD_CHECK_CHILD)
            except OSError:  # ESRCH, ECHILD: it was reaped; its pidfd still reports how it exited
                return False
            child.backend.remove(child.pid, child.pidfd)
            child.backend, child.pidfd = sigchld, -1
            self._start_checking()
            return True

    def unobserve(self, pid: int, key: object) -> bool:
        """Remove an observer. Return whether there was one. A process without observers is not watched any more."""
        if self.closed:
            return False
        with self._lock:
            child = self._children.get(pid)
            if child is None or not child.remove_observer(key):
                return False
            if child.peekers:
                child.peekers -= {key}
            if child.count_observers():
                self._agree_on_peek(child)
            else:
                del self._children[pid]
                self._reaper.keep_open(child.pidfd)  # it may be in a batch: it is closed here, and only here
                child.backend.remove(pid, child.pidfd)
                child.pidfd = -1
            return True

    def unobserve_all(self, key: object) -> list[int]:
        """Remove all observers with this key. Return the pids."""
        if self.closed:
            return []
        with self._lock:
            return [pid for pid in tuple(self._children) if self.unobserve(pid, key)]

    def _agree_on_peek(self, child: Child) -> None:
        """Reap the process if one observer wants that. Only peek at its status if all leave the zombie to its owner."""
        peek = len(child.peekers) == child.count_observers()
        if peek is not child.peek:
            child.backend.modify(child.pid, child.pidfd, ADD_PEEK if peek else 0)
            child.peek = peek

    def send_signal(self, child: Child, signal: int, pgid: int = 0) -> str | None:
        """Signal `child`, or the process group `pgid`. Until the child is reaped, the number of its group is not used again.

        Return None, or why no signal was sent, as a predicate of the process ("has ended").
        """
        if self.closed:
            return self._signal_orphan(child, signal, pgid)
        with self._lock:
            if self.closed:
                return self._signal_orphan(child, signal, pgid)
            if child.result is not None or self._children.get(child.pid) is not child:
                return ENDED
            try:
                if pgid:
                    child.backend.signal_group(child.pid, child.pidfd, pgid, signal)
                else:
                    child.backend.send_signal(child.pid, child.pidfd, signal)
            except ProcessLookupError:  # another waitpid() reaped it first; its exit will be reported
                if child.backend is self._sigchld and child.backend.is_recycled(child.pid, child.pidfd):
                    self._report_lost(child)  # else the exit of the new owner of the pid would be reported as its own
                return ENDED
            return None

    def _signal_orphan(self, child: Child, signal: int, pgid: int) -> str | None:
        if os.getpid() != self._owner:
            return NOT_OURS
        if child.result is not None:
            return ENDED
        orphan: Orphan | None = getattr(child, "orphan", None)
        return UNKNOWN if orphan is None else orphan.signal(child.pid, pgid, signal)

    def close(self) -> None:
        """Stop watching and close all descriptors: the loop is closed. The SIGCHLD handler reaps children that still run."""
        if self.closed:
            if self.inherited:
                self._reaper.close()
            return
        with self._lock:
            if self.closed:
                return
            with contextlib.suppress(OSError):  # other code has closed the reaper
                self._reap()  # closes the pidfds of a batch that was interrupted
            self.closed = True
            for child in self._children.values():
                if not child.stranger:
                    child.orphan = Orphan(child.pid, child.pidfd)
            children = list(self._children.values())
            left = [child.pid for child in children if not (child.peek or child.stranger)]
            left += kill_unwatched(self.starting)
            self._reaper.close()
            if self._sigchld is not None:
                self._sigchld.close()
            for child in children:
                child.drop_observers()
                if child.pidfd >= 0:
                    syscalls.close_tracked_fd(child.pidfd)
                    child.pidfd = -1
            self._children.clear()
            self.contexts.clear()
            for ended in self._notifier.pending:
                if isinstance(ended, Child):
                    ended.drop_observers()
            self._notifier.pending.clear()
        self._forget(self)
        if left:
            abandon(left)
