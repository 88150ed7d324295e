"""`afork()`: fork this process, and wait until the child is ready."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from types import FunctionType
from typing import TypeVar, cast

from .._kernel import proc, syscalls, threads
from .._kernel.at_fork import call_in_forked_children
from .._kernel.exit_status import ExitStatus
from .._watch.registry import Registry
from .._watch.start_gate import StartGate
from .child import ChildSpec, Options, Ready, close_inherited_ready_fd, init_child, run_child
from .child_exit import flush_streams, mark_inherited_finalizers
from .handle import AbstractChildProcess, ExitObserver, prepare_child, watch_prepared

# Forks a child that waits at the start gate and then calls the child main. This is fork() or clone().
Fork = Callable[[Registry, StartGate, syscalls.ChildMain], None]

_T = TypeVar("_T")

# How long a child may take to exit after it has closed the start gate without READY. After that it is killed.
_EXIT_TIMEOUT_S = 1.0

_COROUTINE_OR_GENERATOR = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_GENERATOR

# Sockets between this process and a fork server or its workers. No other child may hold a copy of them.
_parent_sockets: set[socket.socket] = set()


class ChildStartError(Exception):
    """A forked child exited before it was ready. `exit_status` is its exit status."""

    def __init__(self, message: str, exit_status: ExitStatus) -> None:
        super().__init__(message, exit_status)
        self.exit_status = exit_status

    def __str__(self) -> str:
        return str(self.args[0])


async def afork(
    child_func: Callable[[], int | None],
    *,
    ready: Ready = "auto",
    start_new_session: bool = False,
    process_group: int | None = None,
    pdeathsig: int | None = None,
) -> AbstractChildProcess:
    """Fork this process, run `child_func` in the child, and return its handle once the child is ready.

    The child is a real fork. Closures work, nothing is pickled, and memory is shared until it is written to.

    The child has no running event loop, no current task and no wakeup descriptor. Signals that Python or a loop handled have
    their default action, and SIGINT raises KeyboardInterrupt. The signal mask is the parent's. Signal handlers of C
    libraries stay. The child may run an event loop of its own, and may call afork(). It never returns into the parent's
    code: it exits when `child_func` returns.

    The exit code is the return value of `child_func` if that is an int from 0 to 255, and 0 if it is None. For any other
    value, and for an exception, the child prints a traceback and exits with code 1. SystemExit is handled as the interpreter
    handles it. KeyboardInterrupt kills the child by SIGINT (returncode -2).

    It is unsafe to fork a process that has other threads. A lock that another thread holds is never released in the child.
    Python 3.12+ warns about this after the fork. This function gives the same warning before the fork.

    Args:
        ready: "auto": the child is ready when it has reset what it inherits, and signals reach it. "manual": the child is
            ready when it calls notify_ready(). Use asyncio.timeout() or asyncio.wait_for() to limit the time.
        start_new_session: call setsid(2) in the child.
        process_group: call setpgid(2) in the child with this group. 0 makes a new group.
        pdeathsig: the signal that the child gets when the *thread* that forked it exits. See PR_SET_PDEATHSIG(2const).

    Raises:
        TypeError, ValueError: an argument is invalid. No child was made.
        ChildStartError: the child exited before it was ready. It has been reaped.
        OSError: EAGAIN, ENOMEM: fork(2) failed. EMFILE, ENFILE: too many open files.

    Cancellation kills and reaps the child if it is not ready yet.
    """
    options = Options(ready, start_new_session, process_group, pdeathsig)
    check_arguments(child_func, options)
    loop = asyncio.get_running_loop()
    warn_of_threads()
    return await start_child(loop, child_func, options, fork)


async def start_child(
    loop: asyncio.AbstractEventLoop, child_func: Callable[[], int | None], options: Options, fork_: Fork
) -> AbstractChildProcess:
    """Fork by `fork_`, and return the child's handle once the child is ready. Errors and cancellation are as in afork()."""
    child = prepare_child(loop, options.pgid)  # may raise, so it is called before the fork
    gates, observer = child._registry.gates, child._exit
    gate = gates.make(loop)
    try:
        child = _fork(child, gate, ChildSpec(child_func, options, loop, copy_context()), fork_)
        if not await gate.ready:
            await wait_until_ready(child, gate.ready, f"child process {child.pid}")
        observer.future.remove_done_callback(gate.on_exit)
        gates.close(gate)
        child._detached = False
        return child
    except BaseException:
        await _undo_fork(child._registry, observer, gate)
        raise


def check_arguments(child_func: object, options: Options) -> None:
    """Raise TypeError or ValueError if an argument of afork() is invalid."""
    if not callable(child_func):
        raise TypeError(f"child_func must be callable, not {type(child_func).__name__}")
    # The first test is cheap, and enough for nearly all functions. The others are slow.
    if (
        not isinstance(child_func, FunctionType)
        or child_func.__code__.co_flags & _COROUTINE_OR_GENERATOR
        or child_func.__dict__
    ):
        if inspect.iscoroutinefunction(child_func) or inspect.isasyncgenfunction(child_func):
            raise TypeError("child_func must not be a coroutine function (call asyncio.run() inside a plain function)")
        if inspect.isgeneratorfunction(child_func):
            raise TypeError("child_func must not be a generator function")
    if options.ready not in ("auto", "manual"):
        raise ValueError(f"ready must be 'auto' or 'manual', not {options.ready!r}")
    group = options.process_group
    if group is not None:
        if not isinstance(group, int) or isinstance(group, bool):
            raise TypeError(f"process_group must be an int or None, not {type(group).__name__}")
        if group < 0:
            raise ValueError(f"process_group must be >= 0, not {group}")
        if options.start_new_session:
            raise ValueError("process_group and start_new_session are mutually exclusive")
    if options.pdeathsig is not None and options.pdeathsig not in signal.valid_signals():
        raise ValueError(f"pdeathsig must be a valid signal number or None, not {options.pdeathsig!r}")


def warn_of_threads(stacklevel: int = 3) -> None:
    """Warn about other threads before the fork, with the caller's line. Python 3.12+ warns after the fork.

    A filter may turn the warning into an exception. Before the fork there is no child that could be lost.
    """
    if sys.version_info >= (3, 12) and (threads.count_threads() or 1) > 1:
        warnings.warn(
            f"This process (pid={os.getpid()}) is multi-threaded, use of fork() may lead to deadlocks in the child. "
            "Call afork() before threads are started, or use a ForkServer.",
            DeprecationWarning,
            stacklevel=stacklevel,
        )


def unregister_parent_socket(sock: socket.socket) -> None:
    """Undo register_parent_socket(), before the socket is closed."""
    _parent_sockets.discard(sock)


def register_parent_socket(sock: socket.socket) -> None:
    """Have every forked child close its copy of `sock`."""
    install_fork_hook()
    _parent_sockets.add(sock)


def install_fork_hook() -> None:
    """Have each forked child close what only its parent may hold. A second call does nothing."""
    call_in_forked_children(_after_fork_in_child)


def _fork(child: AbstractChildProcess, gate: StartGate, spec: ChildSpec, fork_: Fork) -> AbstractChildProcess:
    """Fork, and release the child from its start gate once it is watched. Return its handle, detached."""
    install_fork_hook()
    child._exit.future.add_done_callback(gate.on_exit)
    mark_inherited_finalizers()
    flush_streams()  # or parent and child would both write the buffered output
    fork_(child._registry, gate, partial(run_child, partial(init_child, spec)))
    if not child._registry.release(child._child, gate):
        child = watch_prepared(child, gate.struct.pid, gate.struct.pidfd)
        gate.is_watched = True
        gate.open()
    return child


async def _undo_fork(registry: Registry, observer: ExitObserver, gate: StartGate) -> None:
    """Kill and reap a child whose caller gets an exception. Interrupts and cancellation do not stop this."""
    is_watched = _retry_until_done(partial(registry.kill_forked, gate, observer))
    _retry_until_done(partial(observer.future.remove_done_callback, gate.on_exit))
    _retry_until_done(partial(registry.gates.close, gate))
    while is_watched and not observer.future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([observer.future])


def _retry_until_done(function: Callable[[], _T]) -> _T:
    """Call `function` until it returns. Drop what signal handlers raise: the caller raises an exception already."""
    while True:
        with contextlib.suppress(BaseException):
            return function()


def kill_and_reap_unwatched(pid: int, pidfd: int) -> None:
    """Kill and reap a child that waits at its start gate and is not watched. It has not exited, so the pid is its own."""
    os.kill(pid, signal.SIGKILL)
    syscalls.wait_id(syscalls.P_PID, pid, os.WEXITED)
    if pidfd >= 0:
        os.close(pidfd)


def fork(registry: Registry, gate: StartGate, child_main: syscalls.ChildMain) -> None:
    """Fork by os.fork(), without its warning about threads."""
    if sys.version_info < (3, 12):
        registry.fork(gate, child_main, os.fork)
        return
    with warnings.catch_warnings():
        # warn_of_threads() has warned already. catch_warnings() is not thread-safe, so this filter may stay in place if
        # another thread uses it at the same time. The filter is so narrow that this does no harm.
        warnings.filterwarnings(
            "ignore", r"This process \(pid=\d+\) is multi-threaded", DeprecationWarning, syscalls.__name__
        )
        registry.fork(gate, child_main, os.fork)


def clone(registry: Registry, gate: StartGate, child_main: syscalls.ChildMain) -> None:
    """Fork by clone(2). This process must have one thread only."""
    registry.fork(gate, child_main, None)


def _after_fork_in_child() -> None:
    """In any forked child, close the parent's sockets, so that each has one owner at each end."""
    if _parent_sockets:
        for sock in _parent_sockets:
            sock.close()
        _parent_sockets.clear()
    close_inherited_ready_fd()


async def wait_until_ready(
    child: AbstractChildProcess, ready: asyncio.Future[bool], name: str, explain: Callable[[], str] = str
) -> None:
    """Wait until the child is ready.

    Raises:
        ChildStartError: the child exited first, or was killed since it cannot become ready. The message ends with the text
            that `explain` returns.
    """
    exited: asyncio.Future[ExitStatus] = child._exit.future
    await asyncio.wait({ready, cast("asyncio.Future[bool]", exited)}, return_when=asyncio.FIRST_COMPLETED)
    if ready.done() and ready.result():
        return
    why = "exited before it was ready"
    if not exited.done():  # it has closed its end of the start gate: it is about to exit, or it has called exec
        cause = "called exec" if proc.has_called_exec(child.pid) else ""
        if not cause:
            await asyncio.wait([exited], timeout=_EXIT_TIMEOUT_S)
            cause = "" if exited.done() else "called exec, or closed all descriptors,"
        if cause:
            kill(child)
            why = f"{cause} before it was ready, and was killed (call notify_ready() first, or use ready='auto')"
    status = await asyncio.shield(exited)
    raise ChildStartError(f"{name} {why}: {status!r}{explain()}", status)


def kill(child: AbstractChildProcess) -> None:
    """Kill a child if it runs. Log nothing: nobody has its handle yet."""
    if child.returncode is None:
        child._registry.send_signal(child._child, signal.SIGKILL)


async def kill_and_reap(child: AbstractChildProcess) -> None:
    """Kill a child that is not ready, and reap it. Cancellation does not stop this."""
    kill(child)
    while not child._exit.future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([child._exit.future])
