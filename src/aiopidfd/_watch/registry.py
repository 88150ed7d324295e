"""One loop's registry of watched processes: who is watched, by which backend, who is told."""

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
from .._kernel import reaper, syscalls
from .child import Args, Child, Observer, make_child
from .collector import Collector, sigchld_collectors
from .start_gate import StartGate
from .starting import kill_unwatched

_try_add = reaper.try_add
_CHECK_CHILD = reaper.ADD_CHECK_CHILD


class Registry(Collector):
    """The watched processes of one loop, and who observes them.

    Methods may be called from any thread; observers are called in the loop's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, forget: Callable[[Registry], object]) -> None:
        """Open the backend and register it with `loop`. `forget` is called on the way out.

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
        *,
        args: Args = None,
        reap: bool = True,
        check: bool = True,
        stranger: bool = False,
        pidfd: int = -1,
        backend: Choice = "auto",
        new: bool = False,
    ) -> Child:
        """Have `observer` called with the ExitStatus of `pid`, or with pid, returncode, *args, once, in the loop's thread.

        Args:
            key: whose observer this is; the same key again replaces it.
            reap: false leaves the zombie for its owner, if all observers of the process say so.
            check: make sure that it is a child of ours (one system call); false for those that we made ourselves.
            stranger: watch it even if it is not a child of ours.
            pidfd: an open pidfd of the process, ours from now on if this call succeeds.
            backend: how to watch it, if it is not watched yet.
            new: it has just been made, so that whoever had its number is gone; `claim_pid` was called.

        Raises:
            OSError: as Backend.add.
        """
        self._check_open()
        with self._lock:
            self._check_open()
            child = self._children.get(pid)
            if child is not None and (new or child.backend.is_recycled(pid, child.pidfd)):
                self._report_lost(child)
                child = None
            if child is None:
                child = self._add(pid, pidfd, backend, check=check, stranger=stranger, peek=not reap)
            elif pidfd >= 0:
                os.close(pidfd)
            child.add_observer(key, observer, args, None if args is None else copy_context())
            if child.peekers or not reap:
                child.peekers = child.peekers - {key} if reap else child.peekers | {key}
                self._agree_on_peek(child)
            return child

    def observe_child(
        self, pid: int, key: object, observer: Callable[..., object], args: tuple[object, ...], choice: Choice
    ) -> None:
        """Do what `observe` does for a child that it is told of by pid, in fewer steps where nothing is out of the way."""
        children = self._children
        with self._lock:
            if pid not in children and not self.closed and choice != "sigchld" and decision.name == "pidfd":
                pidfd = _try_add(self._reaper.fd, pid, _CHECK_CHILD)
                if pidfd >= 0:
                    children[pid] = make_child(pid, pidfd, self._pidfd, key, observer, args, copy_context())
                    return
            self.observe(pid, key, observer, args=args, backend=choice)

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the event loop is closed, or its process is this one's parent")

    def expect(self, key: object, observer: Observer) -> Child:
        """Return a child that is to be forked, and will be observed then, by `let_out`."""
        self._check_open()
        return make_child(0, -1, self._pidfd if choose("auto") == "pidfd" else self._get_sigchld(), key, observer)

    def fork(self, gate: StartGate, child_main: syscalls.ChildMain, fork: Callable[[], int] | None) -> None:
        """Fork a child that stands at `gate` and calls `child_main`. Raises as syscalls.fork_child."""
        self.gates.add(gate)
        try:
            syscalls.fork_child(gate.struct, self._reaper.fd, gate.number, child_main, fork)
        except OSError as exc:
            if gate.struct.pid > 0:
                raise
            self.gates.close(gate)  # not one of those that have failed
            if not self._recover(exc):
                raise
            self.gates.add(gate)
            syscalls.fork_child(gate.struct, self._reaper.fd, gate.number, child_main, fork)

    def let_out(self, child: Child, gate: StartGate) -> bool:
        """Observe a child that was expected and let it out of its gate; return False if something is out of the ordinary."""
        struct = gate.struct
        pid = struct.pid
        with self._lock:
            if pid in self._children or self.closed or child.backend is not self._pidfd or struct.pidfd >= 0 or is_used():
                return False
            if syscalls.try_release(struct, self._reaper.fd) < 0:
                return False
            child.pid, child.pidfd = pid, struct.pidfd
            self._children[pid] = child
            gate.is_watched = True
            return True

    def kill_forked(self, gate: StartGate, observer: Observer) -> bool:
        """Kill a forked child that `observer` waits for; return False if it was not watched yet, and is reaped now."""
        with self._lock:
            child = self._children.get(gate.struct.pid)
            if child is not None and child.count_observers() == 0:  # `observe` was interrupted
                child.add_observer(observer, observer, None, None)
            if child is not None and child.is_observed_by(observer):
                self.send_signal(child, SIGKILL)
            elif not gate.is_watched:
                if self._sigchld is not None:
                    self._sigchld.remove(gate.struct.pid, -1)
                syscalls.undo_child(gate.struct, self._reaper.fd)
                return False
            return True

    def _add(self, pid: int, pidfd: int, choice: Choice, *, check: bool, stranger: bool, peek: bool) -> Child:
        backend: Backend = self._pidfd if choose(choice) == "pidfd" and self._reaper.fd >= 0 else self._get_sigchld()
        try:
            child = self._try(backend, pid, pidfd, check=check, stranger=stranger, peek=peek)
        except OSError as exc:
            if self._recover(exc):
                return self._add(pid, pidfd, choice, check=check, stranger=stranger, peek=peek)
            if choice != "auto" or backend is self._sigchld:
                raise
            if exc.errno in syscalls.OUT_OF_DESCRIPTORS:  # this child only
                if not self._warned_of_limit:
                    logger.warning("watching children by SIGCHLD for want of descriptors: %s", exc.strerror)
                self._warned_of_limit = True
            elif not is_forbidden(exc):
                if exc.errno == errno.EINVAL:  # the ID of a thread, before Linux 6.9
                    raise syscalls.error(errno.ESRCH, f"cannot watch pid {pid}") from exc
                raise
            child = self._try(self._get_sigchld(), pid, pidfd, check=check, stranger=stranger, peek=peek)
        self._children[pid] = child
        if child.backend is self._sigchld:
            self._start_checking()
        return child

    def _try(self, backend: Backend, pid: int, pidfd: int, *, check: bool, stranger: bool, peek: bool) -> Child:
        flags = reaper.ADD_PEEK if peek else 0
        checked = flags | reaper.ADD_CHECK_CHILD if check else flags
        foreign = False
        if pidfd >= 0:
            pidfd = backend.adopt(pid, pidfd, checked)
        else:
            try:
                pidfd = backend.add(pid, checked)
            except ChildProcessError:
                if not stranger:
                    raise
                pidfd, foreign = backend.add(pid, flags), True
        child = make_child(pid, pidfd, backend, None, None)
        child.peek, child.stranger = peek, foreign
        return child

    def observe_spawned(self, pid: int, pidfd: int, key: object, observer: Observer) -> Child:
        """Observe a program whose pidfd the reaper holds since its birth. Under the lock; `claim_pid` was called."""
        last = self._children.get(pid)
        if last is not None:
            self._report_lost(last)
        child = self._children[pid] = make_child(pid, pidfd, self._pidfd, key, observer)
        return child

    def watch_by_sigchld(self, child: Child) -> bool:
        """Close the pidfd of a watched child, and watch it on by SIGCHLD; return whether there was one to close."""
        with self._lock:
            if child.pidfd < 0 or self._children.get(child.pid) is not child:
                return False
            sigchld = self._get_sigchld()
            try:
                sigchld.add(child.pid, _CHECK_CHILD)
            except OSError:  # ESRCH, ECHILD: somebody else has reaped it, or we have just now: its pidfd tells how it ended
                return False
            child.backend.remove(child.pid, child.pidfd)
            child.backend, child.pidfd = sigchld, -1
            self._start_checking()
            return True

    def claim_pid(self, pid: int) -> None:
        """Have every loop that watches by pid alone, and the handler, know of a new child. Not under the lock."""
        if is_used():
            claim(pid)
            for known in sigchld_collectors.valuerefs():
                registry = known()
                if registry is not None:
                    registry.report_previous_owner(pid)

    def unobserve(self, pid: int, key: object) -> bool:
        """Take back `observe`; return whether there was anything to take back. The last one ends the watching."""
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
                self._reaper.keep_open(child.pidfd)  # if it is in a batch already, we close it all the same, and once
                child.backend.remove(pid, child.pidfd)
                child.pidfd = -1
            return True

    def unobserve_all(self, key: object) -> list[int]:
        """Take back every `observe` of `key`; return the pids."""
        if self.closed:
            return []
        with self._lock:
            return [pid for pid in tuple(self._children) if self.unobserve(pid, key)]

    def _agree_on_peek(self, child: Child) -> None:
        """Reap if one observer wants the process reaped, peek if all of them leave it."""
        peek = len(child.peekers) == child.count_observers()
        if peek is not child.peek:
            child.backend.modify(child.pid, child.pidfd, reaper.ADD_PEEK if peek else 0)
            child.peek = peek

    def send_signal(self, child: Child, signal: int, pgid: int = 0) -> str | None:
        """Signal `child`, or the process group `pgid`, whose number the child keeps from being recycled.

        Return None, or why there was nobody to signal: what is to be said of the process.
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
            except ProcessLookupError:  # reaped by somebody else; we shall hear of it in a moment
                if child.backend is self._sigchld and child.backend.is_recycled(child.pid, child.pidfd):
                    self._report_lost(child)  # or the next end of that number would pass for its own
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
        """Stop watching, and close every descriptor: the loop is closed. Children that live on are reaped later."""
        if self.closed:
            if self.inherited:
                self._reaper.close()
            return
        with self._lock:
            if self.closed:
                return
            with contextlib.suppress(OSError):  # the reaper is closed already, by somebody else
                self._reap()  # a batch that was interrupted: what it has reaped has ended, and its pidfds are still open
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
