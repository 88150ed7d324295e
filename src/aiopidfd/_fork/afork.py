"""`afork()`: fork the running server, and wait until the child is ready."""

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

# Forks a child that stands at the gate and calls what is given: `fork` or `clone`.
Fork = Callable[[Registry, StartGate, syscalls.ChildMain], None]

_T = TypeVar("_T")

# How long a child that has closed its end of the gate without a word may take to end, before it is killed.
_EXIT_TIMEOUT_S = 1.0

_COROUTINE_OR_GENERATOR = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_GENERATOR

# The parent's ends of the gates of fork servers' workers, and their like: no other child may hold a copy.
_parent_sockets: set[socket.socket] = set()


class ChildStartError(Exception):
    """A forked child has ended before it was ready. `exit_status` tells how."""

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

    The child is a real fork: closures work, nothing is pickled, memory is shared until it is written to. It starts clean:
    no running loop, no current task, no wakeup descriptor, every signal that Python or a loop handled at its default (SIGINT
    raises KeyboardInterrupt), the signal mask as it was. Handlers of C libraries stay. It may run
    a loop of its own, and afork in turn. It never comes back into the parent's code: it ends with `child_func`.

    The child's end: None or 0..255 from `child_func` is its exit code. Anything else, and an exception, is a traceback and
    exit code 1. SystemExit does what it does in the interpreter. KeyboardInterrupt ends the child by SIGINT (-2).

    Forking a process that has other threads is unsafe: a lock that one of them holds is never released in the child.
    Python 3.12+ warns of it, and so does this call, before it forks.

    Args:
        ready: "auto": ready when it is clean and signals reach it. "manual": when it calls `notify_ready()`; until then this
            call waits (put `asyncio.timeout` or `asyncio.wait_for` around it).
        start_new_session: call setsid(2) in the child.
        process_group: call setpgid(2) in the child with this group; 0 makes a new one.
        pdeathsig: the signal that the child gets when its parent dies: more exactly, when the *thread* that forked it ends.

    Raises:
        TypeError, ValueError: an argument is not what it must be; nothing was created.
        ChildStartError: the child ended before it was ready. It has been reaped.
        OSError: EAGAIN, ENOMEM: fork(2) failed. EMFILE, ENFILE: out of descriptors.

    Cancellation kills the half-made child and reaps it before it goes on.
    """
    options = Options(ready, start_new_session, process_group, pdeathsig)
    check_arguments(child_func, options)
    loop = asyncio.get_running_loop()
    warn_of_threads()
    return await start_child(loop, child_func, options, fork)


async def start_child(
    loop: asyncio.AbstractEventLoop, child_func: Callable[[], int | None], options: Options, fork_: Fork
) -> AbstractChildProcess:
    """Fork by `fork_`, and return the child's handle once it is ready. Raises, and is cancelled, as `afork`."""
    child = prepare_child(loop, options.pgid)  # fails before the fork if it must
    gates, end = child._registry.gates, child._exit
    gate = gates.make(loop)
    try:
        child = _fork(child, gate, ChildSpec(child_func, options, loop, copy_context()), fork_)
        if not await gate.ready:
            await wait_until_ready(child, gate.ready, f"child process {child.pid}")
        end.future.remove_done_callback(gate.on_exit)
        gates.close(gate)
        child._detached = False
        return child
    except BaseException:
        await _undo_fork(child._registry, end, gate)
        raise


def check_arguments(child_func: object, options: Options) -> None:
    """TypeError, ValueError: this is not what a child can be made of."""
    if not callable(child_func):
        raise TypeError(f"child_func must be callable, not {type(child_func).__name__}")
    # Nearly all are plain functions, which one look tells.
    if (
        not isinstance(child_func, FunctionType)
        or child_func.__code__.co_flags & _COROUTINE_OR_GENERATOR
        or child_func.__dict__
    ):
        if inspect.iscoroutinefunction(child_func) or inspect.isasyncgenfunction(child_func):
            raise TypeError("child_func must be a plain function; let it call asyncio.run() to run a coroutine")
        if inspect.isgeneratorfunction(child_func):
            raise TypeError("child_func must be a plain function, not a generator function")
    if options.ready not in ("auto", "manual"):
        raise ValueError(f"ready must be 'auto' or 'manual', not {options.ready!r}")
    group = options.process_group
    if group is not None:
        if not isinstance(group, int) or isinstance(group, bool):
            raise TypeError(f"process_group must be an int or None, not {type(group).__name__}")
        if group < 0:
            raise ValueError(f"process_group must not be negative, and is {group}")
        if options.start_new_session:
            raise ValueError("start_new_session makes a process group of its own; process_group cannot be given, too")
    if options.pdeathsig is not None and options.pdeathsig not in signal.valid_signals():
        raise ValueError(f"pdeathsig must be a signal number or None, not {options.pdeathsig!r}")


def warn_of_threads(stacklevel: int = 3) -> None:
    """Warn of other threads before the fork, as Python 3.12+ does after it, and in the name of the caller's line.

    Before, since a warning that a filter turns into an exception must not lose a child that exists already.
    """
    if sys.version_info >= (3, 12) and (threads.count_threads() or 1) > 1:
        warnings.warn(
            f"This process (pid={os.getpid()}) is multi-threaded, use of fork() may lead to deadlocks in the child. "
            "Fork before threads are started.",
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
    """Have each forked child close what only its parent may hold."""
    call_in_forked_children(_after_fork_in_child)


def _fork(child: AbstractChildProcess, gate: StartGate, spec: ChildSpec, fork_: Fork) -> AbstractChildProcess:
    """Fork, and let the child out of its gate once it is watched. Return its handle, detached."""
    install_fork_hook()
    child._exit.future.add_done_callback(gate.on_exit)
    mark_inherited_finalizers()
    flush_streams()  # else both of us would write what is buffered
    fork_(child._registry, gate, partial(run_child, partial(init_child, spec)))
    if not child._registry.release(child._child, gate):
        child = watch_prepared(child, gate.struct.pid, gate.struct.pidfd)
        gate.is_watched = True
        gate.open()
    return child


async def _undo_fork(registry: Registry, end: ExitObserver, gate: StartGate) -> None:
    """Kill and reap a child whose caller gets an error instead, however often we are interrupted or cancelled meanwhile."""
    is_watched = _retry_until_done(partial(registry.kill_forked, gate, end))
    _retry_until_done(partial(end.future.remove_done_callback, gate.on_exit))
    _retry_until_done(partial(registry.gates.close, gate))
    while is_watched and not end.future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([end.future])


def _retry_until_done(function: Callable[[], _T]) -> _T:
    """Call a function until it has returned; what a signal handler raises meanwhile gives way to what is being raised."""
    while True:
        with contextlib.suppress(BaseException):
            return function()


def kill_and_reap_unwatched(pid: int, pidfd: int) -> None:
    """Kill and reap a child that stands at its gate, so that nobody can have reaped it: the pid is still its own."""
    os.kill(pid, signal.SIGKILL)
    syscalls.wait_id(syscalls.P_PID, pid, os.WEXITED)
    if pidfd >= 0:
        os.close(pidfd)


def fork(registry: Registry, gate: StartGate, child_main: syscalls.ChildMain) -> None:
    """Fork as os.fork does, without its warning of threads."""
    if sys.version_info < (3, 12):
        registry.fork(gate, child_main, os.fork)
        return
    with warnings.catch_warnings():
        # warn_of_threads has said it. So narrow that it does no harm if another thread's catch_warnings makes it stay.
        warnings.filterwarnings(
            "ignore", r"This process \(pid=\d+\) is multi-threaded", DeprecationWarning, syscalls.__name__
        )
        registry.fork(gate, child_main, os.fork)


def clone(registry: Registry, gate: StartGate, child_main: syscalls.ChildMain) -> None:
    """Fork by clone(2), in the one thread of a process that has no other."""
    registry.fork(gate, child_main, None)


def _after_fork_in_child() -> None:
    """In any forked child: let go of the gates, so that each has one holder on either side."""
    if _parent_sockets:
        for sock in _parent_sockets:
            sock.close()
        _parent_sockets.clear()
    close_inherited_ready_fd()


async def wait_until_ready(
    child: AbstractChildProcess, ready: asyncio.Future[bool], name: str, explain: Callable[[], str] = str
) -> None:
    """Wait until the child is ready. ChildStartError, which ends with what `explain` returns: it never will be."""
    end: asyncio.Future[ExitStatus] = child._exit.future
    await asyncio.wait({ready, cast("asyncio.Future[bool]", end)}, return_when=asyncio.FIRST_COMPLETED)
    if ready.done() and ready.result():
        return
    why = "ended before it was ready"
    if not end.done():  # it has closed its end of the gate: in dying, we trust, unless it has called exec
        cause = "called exec" if proc.has_called_exec(child.pid) else ""
        if not cause:
            await asyncio.wait([end], timeout=_EXIT_TIMEOUT_S)
            cause = "" if end.done() else "called exec, or closed all descriptors,"
        if cause:
            kill(child)
            why = f"{cause} before it was ready, and was killed; call notify_ready() before that, or use ready='auto'"
    status = await asyncio.shield(end)
    raise ChildStartError(f"{name} {why}: {status!r}{explain()}", status)


def kill(child: AbstractChildProcess) -> None:
    """Kill a child that runs, without a word in the log: it is half-made, and its handle was never given out."""
    if child.returncode is None:
        child._registry.send_signal(child._child, signal.SIGKILL)


async def kill_and_reap(child: AbstractChildProcess) -> None:
    """Kill a child that is not ready, and reap it, however often we are cancelled meanwhile."""
    kill(child)
    while not child._exit.future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([child._exit.future])
