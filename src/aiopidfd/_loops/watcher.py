"""`PidfdWatcher`, a child watcher for any loop, and `wait()`, for any process."""

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
    """Return asyncio's AbstractChildWatcher, of which set_child_watcher wants an instance; it is gone in Python 3.14."""
    return getattr(asyncio, "AbstractChildWatcher", object)


def check_pid(pid: object) -> None:
    """Raise TypeError or ValueError unless `pid` can be a process."""
    if not isinstance(pid, int) or isinstance(pid, bool):
        raise TypeError(f"pid must be an int, not {type(pid).__name__}")
    if not 0 < pid <= 0x7FFFFFFF:
        raise ValueError(f"pid must be positive and below 2**31, not {pid}: groups and 'any child' cannot be watched")


with warnings.catch_warnings():
    # Python 3.12 and 3.13 warn of every subclass of AbstractChildWatcher; the user has made none.
    warnings.simplefilter("ignore", DeprecationWarning)

    class PidfdWatcher(_watcher_base()):  # type: ignore[misc] # the base depends on the Python version
        """A child watcher that works on every loop, in every thread, without signals and without threads.

        `asyncio.set_child_watcher(PidfdWatcher())` (Python 3.9 to 3.13) makes asyncio's subprocesses use it. On every
        Python and every loop `add_child_handler` works from the running loop. All watchers of one loop share one
        registration and one reap per process. A watcher may be used from many loops.
        """

        def __init__(self, *, backend: Choice = "auto") -> None:
            """Make a watcher.

            Args:
                backend: "auto" watches by pidfd where that is possible, else by SIGCHLD; the environment variable
                    AIOPIDFD_BACKEND may say otherwise. "pidfd" and "sigchld" insist.

            Raises:
                ValueError: there is no such backend.
                OSError: ENOSYS, EPERM, EACCES, EINVAL: backend is "pidfd", and pidfds are forbidden here.
            """
            self._backend = check_choice(backend)
            require(self._backend)
            self._attached: weakref.ReferenceType[asyncio.AbstractEventLoop] | None = None
            self._closed = False
            # The last one used: its loop is most likely the next one's, too.
            self._registry: weakref.ReferenceType[Registry] | None = None

        @property
        def _loop(self) -> asyncio.AbstractEventLoop | None:
            # Weak: a loop that is dropped is garbage, also while its watcher is the policy's.
            return None if self._attached is None else self._attached()

        def __repr__(self) -> str:
            state = "closed" if self._closed else "active" if self.is_active() else "inactive"
            return f"<PidfdWatcher {state} loop={self._loop!r}>"

        def __enter__(self) -> PidfdWatcher:
            return self

        def __exit__(
            self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
        ) -> None:
            """Do nothing: asyncio enters its watcher for each subprocess, and goes on using it."""

        def is_active(self) -> bool:
            """Return whether `add_child_handler` would find a running loop."""
            if self._closed:
                return False
            return _get_running_loop() is not None or (self._loop is not None and self._loop.is_running())

        def attach_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
            """Plug into `loop`: from now on its subprocesses go through us, whoever made the loop. None: take that back.

            `add_child_handler` uses it where no loop is running: in other threads, and before it runs.
            Handlers that are pending when a loop is detached are dropped, with a RuntimeWarning, as by asyncio's watchers.
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
            """Detach the loop and drop the handlers of every loop. The processes go on, no longer watched by us."""
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
            """Have `callback(pid, returncode, *args)` called in the loop's thread, once, when the child ends.

            Also if it has ended already and is a zombie. A second call for the same pid replaces the first. A status that
            somebody else has taken is reported as 255 if the kernel cannot tell it (before Linux 6.15).

            Raises:
                TypeError, ValueError: `pid` is not a positive int, or `callback` cannot be called.
                RuntimeError: there is no running loop, and none attached.
                ProcessLookupError: there is no such process; if it was a child, somebody has reaped it.
                ChildProcessError: it is not a child of this process; `wait()` can wait for it.
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
            registry.observe_child(pid, self, callback, args, self._backend)

        def remove_child_handler(self, pid: int) -> bool:
            """Take back `add_child_handler`; return whether there was a handler. The child is no longer reaped by us."""
            return any(registry.unobserve(pid, self) for registry in find_registries())


async def wait(pid: int, *, reap: bool = True) -> ExitStatus:
    """Wait until the process has ended, and return how.

    Any process can be waited for: a child (also one that subprocess, multiprocessing or a C library has started) or a
    stranger. A stranger's status is known since Linux 6.15, if its parent reaps it; otherwise its returncode is None
    and its source "not-child". Without pidfds a stranger is looked at in /proc once a second; where /proc does not show it
    its end is noticed when its parent has reaped it, and not if its number is another process's by then.

    Cancellation leaves the process alone, and unwatched if nobody else waits.

    Args:
        pid: the process.
        reap: False leaves the zombie to its owner, as `multiprocessing.Process` and `subprocess.Popen` expect.

    Raises:
        TypeError, ValueError: `pid` is not a positive int.
        RuntimeError: there is no running loop.
        ProcessLookupError: there is no such process, or it has ended and was reaped already; or `pid` is a thread's ID.
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
