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

# Signals that ask a process to exit. A process that gets one and must then be killed was hanging.
_TERMINATING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})


class ExitObserver:
    """What the registry calls with the exit status of one child. It holds no handle, so a dropped handle is collected."""

    __slots__ = ("future", "status")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.future: asyncio.Future[ExitStatus] = loop.create_future()
        self.status: ExitStatus | None = None

    def __call__(self, status: ExitStatus) -> None:
        self.status = status
        if not self.future.done():
            self.future.set_result(status)


class AbstractChildProcess(ABC):
    """A handle for one child process. The loop that is running when the handle is made watches the child.

    Signals go to this child and to no other process. They may be sent from any thread. `wait()` and `stop()` must be called
    in the loop. A handle that is dropped while its child runs gives a ResourceWarning. The child is not killed then, and is
    reaped when it exits. `async with` stops the child at the end of the block.
    """

    _was_asked_to_exit = False  # by a signal
    _detached = True  # until the child is watched, so that a constructor that fails gives no ResourceWarning

    def _adopt(self, pid: int, pidfd: int, backend: Choice) -> None:
        loop = asyncio.get_running_loop()
        registry, observer = registry_of(loop), ExitObserver(loop)
        self._bind(registry, registry.observe(pid, observer, observer, pidfd=pidfd, backend=backend), observer)
        self._attach(None)

    def _bind(self, registry: Registry, child: Child, observer: ExitObserver) -> None:
        self._registry = registry
        self._child = child
        self._exit = observer

    def _attach(self, pgid: int | None) -> None:
        """Warn from now on if the handle is dropped while the child runs."""
        self._pgid = pgid
        self._detached = False

    def __repr__(self) -> str:
        state = "running" if self.returncode is None else f"returncode={self.returncode}"
        return f"<{type(self).__name__} pid={self.pid} {state}>"

    def __del__(self) -> None:
        if not self._detached and self._exit.status is None:
            warnings.warn(
                f"{self!r} was dropped (call wait(), stop() or detach() first)", ResourceWarning, source=self, stacklevel=2
            )

    async def __aenter__(self) -> AbstractChildProcess:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            await self.stop()
        except asyncio.CancelledError:
            self.detach()
            if self.returncode is None:  # there is no time to wait after SIGTERM; the registry reaps the child
                self._registry.send_signal(self._child, signal.SIGKILL)
            raise

    @property
    def pid(self) -> int:
        """The process ID. After the child is reaped, another process may have the same ID."""
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or -signum; None while the child runs."""
        return None if self._exit.status is None else self._exit.status.returncode

    @property
    def exit_status(self) -> ExitStatus | None:
        """The exit status; None while the child runs."""
        return self._exit.status

    @abstractmethod
    def fileno(self) -> int:
        """Return the pidfd, or -1 if there is none or the child has exited. The caller must not close it."""

    def send_signal(self, sig: int) -> None:
        """Send the signal to the child, and to no other process. If the child has exited, log a warning and return.

        Raises:
            OSError: EINVAL: the signal number is invalid. EPERM: the child runs as another user. See pidfd_send_signal(2).
        """
        obstacle = self._registry.send_signal(self._child, sig)
        if obstacle is not None:
            self._warn_not_sent(sig, obstacle)
        elif sig in _TERMINATING:
            self._was_asked_to_exit = True
        elif sig == signal.SIGKILL and self._was_asked_to_exit:
            self._was_asked_to_exit = False  # so that it is logged once
            logger.warning("Force-killed hanging child: %d", self.pid)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def signal_group(self, sig: int) -> None:
        """Send the signal to the child's process group, and never to another group with the same ID.

        While the child is not reaped, no other group can have the ID. After that, log a warning and return.

        Raises:
            RuntimeError: the child was forked without `start_new_session` and `process_group`.
            OSError: as for send_signal().
        """
        if self._pgid is None:
            raise RuntimeError("signal_group() requires a child forked with start_new_session or process_group")
        obstacle = self._registry.send_signal(self._child, sig, self._pgid or self.pid)
        if obstacle is not None:
            self._warn_not_sent(sig, obstacle)

    def _warn_not_sent(self, sig: int, obstacle: str) -> None:
        logger.warning("signal %d not sent: child process %d %s", sig, self.pid, obstacle)

    async def wait(self) -> int:
        """Wait until the child exits, and return its returncode. Many tasks may wait. Cancellation leaves the child alone.

        Raises:
            RuntimeError: the running loop is not the loop of the handle.
        """
        self._check_loop()
        returncode = (await asyncio.shield(self._exit.future)).returncode
        assert returncode is not None  # it is unknown only for a process that is not a child, and has no handle
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
        """Let the handle be dropped while the child runs, without a ResourceWarning. The child is reaped when it exits."""
        self._detached = True

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._registry.loop():
            raise RuntimeError(f"{self!r} belongs to another event loop")


class PidfdChildProcess(AbstractChildProcess):
    """A child process that is watched and signalled by a pidfd."""

    def __init__(self, pid: int, pidfd: int) -> None:
        """Make a handle for an existing child of this process. It owns `pidfd`, and closes it when the child exits.

        Raises:
            TypeError, ValueError: `pid` is not a positive int, or `pidfd` is not a pidfd of this process.
            RuntimeError: no loop is running.
            ChildProcessError: `pid` is not a child of this process.
            OSError: EBADF: `pidfd` is not open.
        """
        check_pid(pid)
        if not isinstance(pidfd, int):
            raise TypeError(f"pidfd must be an int, not {type(pidfd).__name__}")
        _check_pidfd(pid, pidfd)
        self._adopt(pid, pidfd, "pidfd")

    def fileno(self) -> int:
        """Return the pidfd, or -1 if the child has exited. The caller must not close it."""
        return -1 if self._registry.closed else self._child.pidfd


class PosixChildProcess(AbstractChildProcess):
    """A child process that is watched and signalled by its pid, where pidfds cannot be used.

    A pid is safe as long as no other code reaps the child.
    """

    def __init__(self, pid: int) -> None:
        """Make a handle for an existing child of this process.

        Raises:
            TypeError, ValueError: `pid` is not a positive int.
            RuntimeError: no loop is running.
            ProcessLookupError: there is no process `pid`.
            ChildProcessError: `pid` is not a child of this process.
        """
        check_pid(pid)
        self._adopt(pid, -1, "sigchld")

    def fileno(self) -> int:
        """Return -1, since there is no pidfd."""
        return -1


def watch_forked(
    pid: int,
    *,
    pgid: int | None,
    pidfd: int = -1,
    loop: asyncio.AbstractEventLoop | None = None,
    check: bool = False,
) -> AbstractChildProcess:
    """Watch a child that has just been forked, and return its handle.

    `pgid` is the process group of `Options`. The handle owns `pidfd` if this succeeds. `check`: raise ProcessLookupError or
    ChildProcessError if `pid` is not a child of this process.
    """
    loop = loop or asyncio.get_running_loop()
    registry, observer = registry_of(loop), ExitObserver(loop)
    handle = _make_handle(
        registry, registry.observe(pid, observer, observer, check=check, pidfd=pidfd, is_new=True), observer
    )
    handle._attach(pgid)
    return handle


def prepare_child(loop: asyncio.AbstractEventLoop, pgid: int | None) -> AbstractChildProcess:
    """Return the detached handle of a child that is about to be forked.

    Objects are made before the fork where possible. After the fork, each page that is written to must be copied first.
    """
    registry, observer = registry_of(loop), ExitObserver(loop)
    child = registry.prepare(observer, observer)
    handle = _make_handle(registry, child, observer)
    handle._pgid = pgid
    return handle


def watch_prepared(handle: AbstractChildProcess, pid: int, pidfd: int) -> AbstractChildProcess:
    """Watch a prepared child that has been forked, where Registry.release() cannot. Return its handle, detached.

    `pidfd` may be -1. The handle owns it if this succeeds.
    """
    registry, observer = handle._registry, handle._exit
    watched = _make_handle(
        registry, registry.observe(pid, observer, observer, check=False, pidfd=pidfd, is_new=True), observer
    )
    watched._pgid = handle._pgid
    return watched


def _make_handle(registry: Registry, child: Child, observer: ExitObserver) -> AbstractChildProcess:
    """Return a detached handle."""
    made = PidfdChildProcess if child.backend.name == "pidfd" else PosixChildProcess
    handle: AbstractChildProcess = made.__new__(made)
    handle._bind(registry, child, observer)
    return handle


def _check_pidfd(pid: int, pidfd: int) -> None:
    """Raise ValueError if `pidfd` is not a pidfd of the process `pid`, and OSError EBADF if it is not open."""
    os.fstat(pidfd)
    found = _find_pid(pidfd)
    if found is not None and found != pid:
        raise ValueError(f"descriptor {pidfd} is not a pidfd of process {pid}")


def _find_pid(pidfd: int) -> int | None:
    """Return the pid of `pidfd`: 0 if it is not a pidfd or the process is reaped, None if the kernel does not tell."""
    found = syscalls.get_pid(pidfd)
    if found is not None:
        return found
    try:
        ended = syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # a pidfd of a process that is not a child: the registry raises for it
        return None
    except OSError as exc:
        return 0 if exc.errno == errno.EBADF else None  # EBADF: not a pidfd. ENOSYS, EPERM, EACCES, EINVAL: unavailable
    return None if ended is None else ended.pid
