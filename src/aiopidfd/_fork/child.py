"""What a forked child runs: reset what it inherits, call child_func, run exit handlers, exit.

The child never returns into the parent's code. After a fork, the kernel copies each page of memory when it is first written
to. These copies are most of the time that a child needs to become ready. A call of a Python function writes to some pages,
and so does the first lookup of a module attribute. So this code calls few functions, and imports names instead of modules.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio import _set_running_loop, events
from asyncio.tasks import _leave_task, current_task
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Literal, NamedTuple

from .._kernel.syscalls import detach_epolls, is_ready_fd, note_ready_fd, set_exit_code, set_pdeathsig, set_signal_mask
from .._watch.start_gate import READY
from .child_exit import flush_streams, print_exception, reset_exit_handlers, run_exit_handlers
from .child_loop import unset_event_loop
from .child_signals import reset_signals

Ready = Literal["auto", "manual"]

_UNKNOWN = object()

# The descriptor of the start gate, where this child sends READY; -1 when it is sent. None: afork() has not made this
# process.
_ready_fd: int | None = None


class Options(NamedTuple):
    """The options of `afork()`."""

    ready: Ready = "auto"
    start_new_session: bool = False
    process_group: int | None = None
    pdeathsig: int | None = None

    @property
    def pgid(self) -> int | None:
        """The child's process group: 0 for a new one, None for the parent's."""
        return 0 if self.start_new_session else self.process_group


class ChildSpec(NamedTuple):
    """What a forked child needs to start."""

    child_func: Callable[[], int | None]
    options: Options
    loop: asyncio.AbstractEventLoop
    context: Context  # a copy of the parent's


def run_child(init: Callable[[int, int], Callable[[], object]], gate: int, mask: int) -> None:
    """Call `init`, run what it returns, and exit accordingly. If this raises or returns, C ends the process."""
    started, code = False, 1
    try:
        main = init(gate, mask)
        started = True
        code = to_exit_code(main())
    except SystemExit as exc:
        code = _system_exit_code(exc)
    except KeyboardInterrupt:
        code = -signal.SIGINT
    except BaseException:
        print_exception()
    set_exit_code(code)
    if started:
        run_exit_handlers()
    else:
        flush_streams(BaseException)
    if code >= 0:
        os._exit(code)  # not C's _exit(): coverage tools replace os._exit


def init_child(spec: ChildSpec, gate: int, mask: int) -> Callable[[], object]:
    """Reset what a newly forked child inherits, report that it is ready, and return what it runs.

    Signals are blocked until the child has its own handlers.
    """
    child_func, options, loop, context = spec
    try:
        # This runs while the parent registers the child.
        _reset_inherited_state(loop, gate)
    finally:
        # Wait for RELEASE even after an error: a child that exits before it is watched could be reaped by other code.
        if not os.read(gate, 1):
            _reveal_pid(gate)
            raise SystemExit(1)  # the parent has cancelled the start
    apply_options(options, gate, mask)
    if options[0] == "auto":
        notify_ready()
    reset_exit_handlers()
    return partial(context.run, child_func)


def _reveal_pid(gate: int) -> None:
    """Send a byte. The kernel adds this process's pid, which the parent may not know. See `find_lost_child` in fork.c."""
    with contextlib.suppress(OSError):  # EPIPE, ECONNRESET: the parent has closed the start gate
        os.write(gate, READY)


def _reset_inherited_state(loop: asyncio.AbstractEventLoop, gate: int) -> None:
    """Reset the event loop, the current task and the signal handlers that belong to the parent."""
    detach_epolls(gate)  # first, so that nothing below can change the parent's epolls
    reset_signals()
    task = current_task(loop)
    if task is not None:
        _leave_task(loop, task)
    _set_running_loop(None)
    policy = getattr(events, "_event_loop_policy", _UNKNOWN)
    if policy is not None:  # without a policy no loop is set
        try:
            unset_event_loop(policy)
        except Exception:  # an application's policy may raise anything
            print_exception()


def apply_options(options: Options, gate: int, mask: int) -> None:
    """Apply the caller's options, note the descriptor for READY, and restore the signal mask."""
    _, start_new_session, process_group, pdeathsig = options
    if start_new_session:
        os.setsid()
    elif process_group is not None:
        os.setpgid(0, process_group)
    if pdeathsig is not None and not set_pdeathsig(pdeathsig, gate):
        os.kill(os.getpid(), pdeathsig)  # the parent has exited already, so the kernel sends no signal
    global _ready_fd  # noqa: PLW0603 - a process starts once
    _ready_fd = gate
    note_ready_fd(gate)
    set_signal_mask(mask)


def notify_ready() -> None:
    """Report that this child is ready. The parent's `afork(..., ready="manual")` returns then.

    A second call does nothing.

    Raises:
        RuntimeError: this process was not made by afork(), or it has closed the descriptor for this report.
    """
    global _ready_fd
    if _ready_fd is None:
        raise RuntimeError("notify_ready() can only be called in a child made by afork()")
    fd, _ready_fd = _ready_fd, -1
    if fd >= 0:
        if not is_ready_fd(fd):  # it is closed, and the number may belong to another file now
            raise RuntimeError(
                "the descriptor of notify_ready() is closed (call notify_ready() before closing all descriptors)"
            )
        try:
            os.write(fd, READY)
            os.sched_yield()  # on the same CPU the parent would have to wait for the end of this time slice
        except BrokenPipeError:  # the parent no longer waits
            pass
        finally:
            os.close(fd)


def pop_ready_fd() -> int:
    """Return the descriptor for READY, which the caller closes; -1 if READY is sent or the descriptor is closed."""
    global _ready_fd
    fd, _ready_fd = _ready_fd, -1
    return -1 if fd is None or not is_ready_fd(fd) else fd


def close_inherited_ready_fd() -> None:
    """In a child of a child made by afork(), close the descriptor for READY. It belongs to the parent."""
    global _ready_fd
    if _ready_fd is None:
        return
    fd, _ready_fd = _ready_fd, None
    if fd >= 0 and is_ready_fd(fd):
        os.close(fd)


def to_exit_code(result: object) -> int:
    """Return the exit code for the return value of child_func. Raise TypeError if there is none."""
    if result is None:
        return 0
    if isinstance(result, int) and 0 <= result <= 255:
        return int(result)
    raise TypeError(f"child_func must return None or an int in range(256), not {result!r}")


def _system_exit_code(exc: SystemExit) -> int:
    """Return the exit code of SystemExit, and print its message, as the interpreter does."""
    if exc.code is None:
        return 0
    if isinstance(exc.code, int):
        return exc.code & 0xFF
    with contextlib.suppress(BaseException):  # stderr is broken, so there is no place to report that
        if sys.stderr is not None:
            print(exc.code, file=sys.stderr)
    return 1
