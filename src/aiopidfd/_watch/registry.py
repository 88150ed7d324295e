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
from .._kernel import syscalls
from .._kernel.reaper import ADD_CHECK_CHILD, ADD_PEEK, try_add
from .child import Args, Child, Observer, make_child
from .collector import Collector, sigchld_collectors
from .start_gate import StartGate
from .starting import kill_unwatched

_CLOSED = "the event loop is closed, or its process is this one's parent"


def claim_pid(pid: int) -> None:
    """Report a previous owner of a new child's pid, in every loop that watches by pid alone. Not under a registry's lock."""
    if is_used():
        claim(pid)
        for known in sigchld_collectors.valuerefs():
            registry = known()
            if registry is not None:
                registry.report_previous_owner(pid)


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
            if child is not None:
                if pidfd >= 0:
                    os.close(pidfd)
            elif is_held:
                child = make_child(pid, pidfd, self._pidfd)
            else:
                child = self._watch(pid, pidfd, backend, check, stranger, not reap)
            child.add_observer(key, observer, args, None if args is None else copy_context())
            if child.peekers or not reap:
                child.peekers = child.peekers - {key} if reap else child.peekers | {key}
                self._agree_on_peek(child)
            self._children[pid] = child  # last: whoever is in the registry has an observer, after an interrupt, too
            return child

    def _watch(  # noqa: PLR0917 - by position, which is faster
        self, pid: int, pidfd: int, choice: Choice, check: bool, stranger: bool, peek: bool
    ) -> Child:
        """Have a backend watch a process. Return its Child, which has no observer yet.

        The usual case comes first, one call of C. By way of the backend `add_child_handler` takes 5 % longer.
        """
        if pidfd < 0 and choice != "sigchld" and decision.name == "pidfd":
            opened = try_add(self._reaper.fd, pid, (ADD_PEEK if peek else 0) | (ADD_CHECK_CHILD if check else 0))
            if opened >= 0:
                child = make_child(pid, opened, self._pidfd)
                child.peek = peek
                return child
        backend: Backend = self._pidfd if choose(choice) == "pidfd" and self._reaper.fd >= 0 else self._get_sigchld()
        try:
            return self._watch_by(backend, pid, pidfd, check=check, stranger=stranger, peek=peek)
        except OSError as exc:
            if self._recover(exc):
                return self._watch(pid, pidfd, choice, check, stranger, peek)
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
            return self._watch_by(self._get_sigchld(), pid, pidfd, check=check, stranger=stranger, peek=peek)

    def _watch_by(self, backend: Backend, pid: int, pidfd: int, *, check: bool, stranger: bool, peek: bool) -> Child:
        flags = ADD_PEEK if peek else 0
        checked = flags | ADD_CHECK_CHILD if check else flags
        is_stranger = False
        if pidfd >= 0:
            pidfd = backend.adopt(pid, pidfd, checked)
        else:
            try:
                pidfd = backend.add(pid, checked)
            except ChildProcessError:
                if not stranger:
                    raise
                pidfd, is_stranger = backend.add(pid, flags), True
        if backend is self._sigchld:
            self._start_checking()
        child = make_child(pid, pidfd, backend)
        child.peek, child.stranger = peek, is_stranger
        return child

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError(_CLOSED)

    def prepare(self, key: object, observer: Observer) -> Child:
        """Return the Child of a process that is not forked yet. `release` has it observed."""
        self._check_open()
        child = make_child(0, -1, self._pidfd if choose("auto") == "pidfd" else self._get_sigchld())
        child.add_observer(key, observer, None, None)
        return child

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

    def release(self, child: Child, gate: StartGate) -> bool:
        """Watch a prepared child that stands at `gate`, and release it. Return False if `observe` has to watch it.

        This does what `observe` does, in one call of C: open the pidfd, have the reaper hold it, and write to the gate. The
        forking process copies each page that it writes to, so an `afork` takes 10 % less than by `observe`.
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
        """Kill a forked child that `observer` waits for; return False if it was not watched yet, and is reaped now."""
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
        """Close the pidfd of a watched child, and watch it on by SIGCHLD; return whether there was one to close."""
        with self._lock:
            if child.pidfd < 0 or self._children.get(child.pid) is not child:
                return False
            sigchld = self._get_sigchld()
            try:
                sigchld.add(child.pid, ADD_CHECK_CHILD)
            except OSError:  # ESRCH, ECHILD: somebody else has reaped it, or we have just now: its pidfd tells how it ended
                return False
            child.backend.remove(child.pid, child.pidfd)
            child.backend, child.pidfd = sigchld, -1
            self._start_checking()
            return True

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
            child.backend.modify(child.pid, child.pidfd, ADD_PEEK if peek else 0)
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
