"""`PidfdWatcher`, a child watcher for any loop, and `wait()` for any process."""

from __future__ import annotations

import asyncio
import warnings
import weakref
from asyncio import _get_running_loop
from collections.abc import Callable
from types import TracebackType
from typing import Any

from .._backends.backend import Choice, check_choice, require
from .._kernel.exit_status import ExitStatus
from .._watch.registries import find_registries, registry_of
from .._watch.registry import Registry
from .plug import plug, unplug


def _watcher_base() -> type:
    """Return asyncio's AbstractChildWatcher: set_child_watcher needs an instance of it. Python 3.14 has removed it."""
    return getattr(asyncio, "AbstractChildWatcher", object)


def check_pid(pid: object) -> None:
    """Raise TypeError or ValueError unless `pid` can be the pid of a process."""
    if not isinstance(pid, int) or isinstance(pid, bool):
        raise TypeError(f"pid must be an int, not {type(pid).__name__}")
    if not 0 < pid <= 0x7FFFFFFF:
        raise ValueError(f"pid must be positive and below 2**31, not {pid}: groups and 'any child' cannot be watched")


with warnings.catch_warnings():
    # Python 3.12 and 3.13 warn of every subclass of AbstractChildWatcher. This one is not the user's.
    warnings.simplefilter("ignore", DeprecationWarning)

    class PidfdWatcher(_watcher_base()):  # type: ignore[misc] # the base depends on the Python version
        """A child watcher that works on every loop and in every thread. It starts no thread, and needs no signal.

        `asyncio.set_child_watcher(PidfdWatcher())` (Python 3.9 to 3.13) makes asyncio's subprocesses use it. On every
        Python, `add_child_handler` works in a running loop of any kind. All watchers of one loop share one registration
        and one reap of each process. A watcher may be used by many loops.
        """

        def __init__(self, *, backend: Choice = "auto") -> None:
            """Make a watcher.

            Args:
                backend: "auto" watches by pidfd where that is possible, else by SIGCHLD, unless the environment variable
                    AIOPIDFD_BACKEND names one of the two. "pidfd" and "sigchld" use that one in any case.

            Raises:
                ValueError: there is no such backend.
                OSError: ENOSYS, EPERM, EACCES, EINVAL: backend is "pidfd", and pidfds are forbidden here.
            """
            self._backend = check_choice(backend)
            require(self._backend)
            self._attached: weakref.ReferenceType[asyncio.AbstractEventLoop] | None = None
            self._closed = False
            # The one that was used last. Most watchers have one loop.
            self._registry: weakref.ReferenceType[Registry] | None = None

        @property
        def _loop(self) -> asyncio.AbstractEventLoop | None:
            # Weak: the policy keeps its watcher, and that must not keep the loop.
            return None if self._attached is None else self._attached()

        def __repr__(self) -> str:
            state = "closed" if self._closed else "active" if self.is_active() else "inactive"
            return f"<PidfdWatcher {state} loop={self._loop!r}>"

        def __enter__(self) -> PidfdWatcher:
            return self

        def __exit__(
            self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
        ) -> None:
            """Do nothing: asyncio enters and exits its watcher for each subprocess."""

        def is_active(self) -> bool:
            """Return whether `add_child_handler` would find a running loop."""
            if self._closed:
                return False
            return _get_running_loop() is not None or (self._loop is not None and self._loop.is_running())

        def attach_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
            """Plug into `loop`, of any class: from now on we start and reap its subprocesses. None undoes that.

            `add_child_handler` uses this loop where no loop is running: in other threads, and before the loop runs.
            When a loop is detached, pending handlers are dropped with a RuntimeWarning, as by asyncio's watchers.
            """
            if loop is not None and not isinstance(loop, asyncio.AbstractEventLoop):
                raise TypeError(f"attach_loop() needs an event loop or None, not {type(loop).__name__}")
            if loop is self._loop and loop is not None:
                return
            if self._loop is not None and self._drop_handlers(self._loop):
                warnings.warn(
                    "A loop is being detached from a child watcher with pending handlers", RuntimeWarning, stacklevel=2
                )
            if self._loop is not None:
                unplug(self._loop, self)
            self._attached = None if loop is None else weakref.ref(loop)
            if loop is not None:
                self._closed = False
                plug(loop, self)

        def close(self) -> None:
            """Detach the loop and drop the handlers of all loops. The processes continue, unwatched."""
            self._closed = True
            self._registry = None
            self.attach_loop(None)
            for registry in find_registries():
                registry.unobserve_all(self)

        def _drop_handlers(self, loop: asyncio.AbstractEventLoop) -> list[int]:
            return [pid for registry in find_registries() if registry.loop() is loop for pid in registry.unobserve_all(self)]

        def _get_registry(self) -> Registry:
            if self._closed:
                raise RuntimeError("the child watcher is closed")
            loop = _get_running_loop() or self._loop
            if loop is None:
                raise RuntimeError("no running event loop: call this from a coroutine or a callback, or attach_loop() first")
            registry = registry_of(loop)
            self._registry = weakref.ref(registry)
            return registry

        def add_child_handler(self, pid: int, callback: Callable[..., object], *args: Any) -> None:
            """Call `callback(pid, returncode, *args)` once, in the loop's thread, when the child has ended.

            The child may be a zombie already. A second call for the same pid replaces the first. If another waitpid() reaped
            the child, Linux 6.15 and newer still report its status; before, the returncode is 255.

            Raises:
                TypeError, ValueError: `pid` is not a positive int, or `callback` is not callable.
                RuntimeError: no loop is running, and none is attached.
                ProcessLookupError: there is no such process. If it was a child, another waitpid() reaped it.
                ChildProcessError: the process is not a child of this process. `wait()` can wait for it.
                OSError: EMFILE, ENFILE, out of descriptors; ENOSYS, EPERM, EACCES, pidfds are forbidden here.
            """
            if type(pid) is not int or not 0 < pid <= 0x7FFFFFFF:
                check_pid(pid)
            if not callable(callback):
                raise TypeError(f"callback must be callable, not {type(callback).__name__}")
            known = self._registry
            registry = None if known is None else known()
            if registry is None or registry.closed or registry.loop() is not (_get_running_loop() or self._loop):
                registry = self._get_registry()
            registry.observe(pid, self, callback, args, backend=self._backend)

        def remove_child_handler(self, pid: int) -> bool:
            """Undo `add_child_handler`. Return whether there was a handler. We do not reap the child any more."""
            return any(registry.unobserve(pid, self) for registry in find_registries())


async def wait(pid: int, *, reap: bool = True) -> ExitStatus:
    """Wait until the process has ended, and return how it ended.

    Any process can be waited for. It may be a child, started by any code: subprocess, multiprocessing or a C library. It may
    be a stranger, that is, another process's child. The kernel reports a stranger's status since Linux 6.15, when its
    parent has reaped it. Otherwise the returncode is None and the source is "not-child".

    Without pidfds, a stranger is looked up in /proc once a second. Where /proc does not show it, the exit is noticed when
    the parent has reaped it; it is not noticed if another process has the same pid by then.

    Cancellation does not affect the process. If nobody else waits for it, it is not watched any more.

    Args:
        pid: the process.
        reap: False leaves the zombie to its owner, as `multiprocessing.Process` and `subprocess.Popen` expect.

    Raises:
        TypeError, ValueError: `pid` is not a positive int.
        RuntimeError: no loop is running.
        ProcessLookupError: there is no such process, or it was reaped already, or `pid` is the ID of a thread.
        OSError: EMFILE, ENFILE, out of descriptors; ENOSYS, EPERM, EACCES, pidfds are forbidden here.
    """
    check_pid(pid)
    loop = asyncio.get_running_loop()
    registry = registry_of(loop)
    ended: asyncio.Future[ExitStatus] = loop.create_future()

    def set_result(status: ExitStatus) -> None:
        if not ended.done():
            ended.set_result(status)

    registry.observe(pid, ended, set_result, reap=reap, stranger=True)
    try:
        return await ended
    finally:
        registry.unobserve(pid, ended)
