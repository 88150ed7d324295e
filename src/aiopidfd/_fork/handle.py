"""The handle of one forked child: `AbstractChildProcess` and its two forms."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import warnings
from abc import ABC, abstractmethod
from types import TracebackType

from .._backends.backend import Choice, logger
from .._kernel import syscalls
from .._kernel.exit_status import ExitStatus
from .._loops.watcher import check_pid
from .._watch.child import Child
from .._watch.registries import registry_of
from .._watch.registry import Registry

# What asks a process to end. One that does not, and is then killed, was hanging.
_TERMINATING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})


class ExitObserver:
    """The end of one child, kept apart from the handle so that the registry does not keep a dropped handle alive."""

    __slots__ = ("future", "status")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.future: asyncio.Future[ExitStatus] = loop.create_future()
        self.status: ExitStatus | None = None

    def __call__(self, status: ExitStatus) -> None:
        self.status = status
        if not self.future.done():
            self.future.set_result(status)


class AbstractChildProcess(ABC):
    """One child process of ours, watched by the loop that was running when the handle was made.

    Signals go to this child and to nobody else, from any thread. `wait()` and `stop()` belong to the loop. A handle that is
    dropped while its child runs gives a ResourceWarning; the child is reaped all the same, and never killed for it.
    `async with` stops the child on the way out.
    """

    _was_asked_to_exit = False  # by a signal, and has not ended since
    _detached = True  # until the child is ours: a constructor that fails has nothing to warn of

    def _adopt(self, pid: int, pidfd: int, backend: Choice) -> None:
        loop = asyncio.get_running_loop()
        registry, end = registry_of(loop), ExitObserver(loop)
        self._bind(registry, registry.observe(pid, end, end, pidfd=pidfd, backend=backend), end)
        self._attach(None)

    def _bind(self, registry: Registry, child: Child, end: ExitObserver) -> None:
        self._registry = registry
        self._child = child
        self._exit = end

    def _attach(self, pgid: int | None) -> None:
        """Be somebody's handle, and no longer detached."""
        self._pgid = pgid
        self._detached = False

    def __repr__(self) -> str:
        state = "running" if self.returncode is None else f"returncode={self.returncode}"
        return f"<{type(self).__name__} pid={self.pid} {state}>"

    def __del__(self) -> None:
        if not self._detached and self._exit.status is None:
            warnings.warn(f"{self!r} was dropped; wait(), stop() or detach() it", ResourceWarning, source=self, stacklevel=2)

    async def __aenter__(self) -> AbstractChildProcess:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            await self.stop()
        except asyncio.CancelledError:
            self.detach()
            if self.returncode is None:  # no time to be polite; the registry reaps it
                self._registry.send_signal(self._child, signal.SIGKILL)
            raise

    @property
    def pid(self) -> int:
        """The process ID, also after the child has ended (when it may name another process)."""
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or -signum; None while the child runs."""
        return None if self._exit.status is None else self._exit.status.returncode

    @property
    def exit_status(self) -> ExitStatus | None:
        """How the child has ended; None while it runs."""
        return self._exit.status

    @abstractmethod
    def fileno(self) -> int:
        """Return the pidfd, to poll or to pass on (not to close); -1 once the child has ended, or if there is none."""

    def send_signal(self, sig: int) -> None:
        """Send the signal to the child, and to no other process. If it has ended, log a warning and return.

        Raises:
            OSError: EINVAL, no such signal; EPERM, the child runs as another user now. See pidfd_send_signal(2).
        """
        obstacle = self._registry.send_signal(self._child, sig)
        if obstacle is not None:
            self._warn_not_sent(sig, obstacle)
        elif sig in _TERMINATING:
            self._was_asked_to_exit = True
        elif sig == signal.SIGKILL and self._was_asked_to_exit:
            self._was_asked_to_exit = False  # it is said once
            logger.warning("Force-killed hanging child: %d", self.pid)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def signal_group(self, sig: int) -> None:
        """Send the signal to the child's process group, if one was asked for; never to a recycled group.

        While the child is not reaped its group cannot be another one. After that a warning is logged, and nothing sent.

        Raises:
            RuntimeError: the child was not forked with `start_new_session` or `process_group`.
            OSError: as `send_signal`.
        """
        if self._pgid is None:
            raise RuntimeError("signal_group() needs a child forked with start_new_session=True or process_group=")
        obstacle = self._registry.send_signal(self._child, sig, self._pgid or self.pid)
        if obstacle is not None:
            self._warn_not_sent(sig, obstacle)

    def _warn_not_sent(self, sig: int, obstacle: str) -> None:
        logger.warning("signal %d not sent: child process %d %s", sig, self.pid, obstacle)

    async def wait(self) -> int:
        """Wait until the child has ended and return its returncode. Many tasks may wait; cancellation harms nobody.

        Raises:
            RuntimeError: called from another loop than the one that the handle belongs to.
        """
        self._check_loop()
        returncode = (await asyncio.shield(self._exit.future)).returncode
        assert returncode is not None  # only of a stranger is it not known, and no handle is made for one
        return returncode

    async def stop(self, grace: float = 5.0) -> int:
        """ExitObserver the child and return its returncode: SIGTERM, then SIGKILL after `grace` seconds.

        Cancellation leaves it with the signals that were sent until then.
        """
        self._check_loop()
        if self.returncode is None:
            self.terminate()
            await asyncio.wait([self._exit.future], timeout=grace)
            if self.returncode is None:
                self.kill()
        return await self.wait()

    def detach(self) -> None:
        """Say that nobody will wait for the child: it is reaped when it ends, and dropping the handle warns of nothing."""
        self._detached = True

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._registry.loop():
            raise RuntimeError(f"{self!r} belongs to another event loop")


class PidfdChildProcess(AbstractChildProcess):
    """A child that is watched and signalled by pidfd."""

    def __init__(self, pid: int, pidfd: int) -> None:
        """Adopt an existing child of this process; `pidfd` is ours from now on, and closed when the child has ended.

        Raises:
            TypeError, ValueError: `pid` is not a positive int, or `pidfd` does not belong to it.
            RuntimeError: there is no running loop.
            ChildProcessError: it is not a child of this process.
            OSError: EBADF, `pidfd` is not open.
        """
        check_pid(pid)
        if not isinstance(pidfd, int):
            raise TypeError(f"pidfd must be an int, not {type(pidfd).__name__}")
        _check_pidfd(pid, pidfd)
        self._adopt(pid, pidfd, "pidfd")

    def fileno(self) -> int:
        """Return the pidfd, to poll or to pass on, not to close; -1 once the child has ended."""
        return -1 if self._registry.closed else self._child.pidfd


class PosixChildProcess(AbstractChildProcess):
    """A child that is watched and signalled by pid, where pidfds are forbidden: safe, since only we reap it."""

    def __init__(self, pid: int) -> None:
        """Adopt an existing child of this process.

        Raises:
            TypeError, ValueError: `pid` is not a positive int.
            RuntimeError: there is no running loop.
            ProcessLookupError, ChildProcessError: it is gone, or not a child of this process.
        """
        check_pid(pid)
        self._adopt(pid, -1, "sigchld")

    def fileno(self) -> int:
        """Return -1: there is no pidfd."""
        return -1


def watch_forked(
    pid: int,
    *,
    pgid: int | None,
    pidfd: int = -1,
    loop: asyncio.AbstractEventLoop | None = None,
    check: bool = False,
) -> AbstractChildProcess:
    """Return the handle of a child that has just been forked and cannot end unseen.

    `pgid` is the process group that was asked for, 0 for the child's own. `pidfd` is ours from now on if this succeeds.
    `check`: make sure that it is a child of ours, and raise ProcessLookupError or ChildProcessError if not.
    """
    loop = loop or asyncio.get_running_loop()
    registry, end = registry_of(loop), ExitObserver(loop)
    handle = _make_handle(registry, registry.observe(pid, end, end, check=check, pidfd=pidfd, is_new=True), end)
    handle._attach(pgid)
    return handle


def prepare_child(loop: asyncio.AbstractEventLoop, pgid: int | None) -> AbstractChildProcess:
    """Return the handle, detached, of a child that is about to be forked.

    What can be made before a fork is: after it, every page that is written to is copied first.
    """
    registry, end = registry_of(loop), ExitObserver(loop)
    child = registry.prepare(end, end)
    handle = _make_handle(registry, child, end)
    handle._pgid = pgid
    return handle


def watch_prepared(handle: AbstractChildProcess, pid: int, pidfd: int) -> AbstractChildProcess:
    """Do what `release` of the registry cannot: watch a prepared child, whatever it takes; return its handle, detached.

    It has just been forked, and cannot end unseen. `pidfd`, or -1, is ours from now on if this succeeds.
    """
    registry, end = handle._registry, handle._exit
    watched = _make_handle(registry, registry.observe(pid, end, end, check=False, pidfd=pidfd, is_new=True), end)
    watched._pgid = handle._pgid
    return watched


def _make_handle(registry: Registry, child: Child, end: ExitObserver) -> AbstractChildProcess:
    """Return a handle, detached."""
    made = PidfdChildProcess if child.backend.name == "pidfd" else PosixChildProcess
    handle: AbstractChildProcess = made.__new__(made)
    handle._bind(registry, child, end)
    return handle


def _check_pidfd(pid: int, pidfd: int) -> None:
    """Raise ValueError unless `pidfd` is a pidfd of the process `pid`; OSError EBADF if it is not open."""
    os.fstat(pidfd)
    found = _find_pid(pidfd)
    if found is not None and found != pid:
        raise ValueError(f"descriptor {pidfd} is not a pidfd of process {pid}")


def _find_pid(pidfd: int) -> int | None:
    """Return the pid of the process behind `pidfd`, 0 if it is none or gone; None if that cannot be known here."""
    found = syscalls.get_pid(pidfd)
    if found is not None:
        return found
    try:
        ended = syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # a pidfd, though not of a child: that is for the registry to say
        return None
    except OSError as exc:
        return 0 if exc.errno == errno.EBADF else None  # EBADF: no pidfd. ENOSYS, EPERM, EACCES, EINVAL: they cannot be used
    return None if ended is None else ended.pid
