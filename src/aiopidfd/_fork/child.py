"""The life of a forked child: it is made clean, runs its function, and ends without a way back into its parent's code.

What it does until it is ready costs by the number of pages that it writes to, for each of them is copied first. A function
of Python's has some, and so has the first look at an attribute of a module: hence many names that are this module's own.
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

# In a forked child, where to say that it is ready: the gate's descriptor; -1 once said. None: this process was not aforked.
_ready_fd: int | None = None


class Options(NamedTuple):
    """What the caller of `afork` has asked for."""

    ready: Ready = "auto"
    start_new_session: bool = False
    process_group: int | None = None
    pdeathsig: int | None = None

    @property
    def pgid(self) -> int | None:
        """The process group that the child will be in, 0 for one of its own; None: the parent's."""
        return 0 if self.start_new_session else self.process_group


class ChildSpec(NamedTuple):
    """What a child needs to know of itself before it runs."""

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
        os._exit(code)  # not C's, since tracers of coverage and their like replace it


def init_child(spec: ChildSpec, gate: int, mask: int) -> Callable[[], object]:
    """Make a newly forked child clean, all signals blocked until then, tell that it is ready; return what it is to run."""
    child_func, options, loop, context = spec
    try:
        # While the parent sees to it that we are watched.
        _reset_inherited_state(loop, gate)
    finally:
        # Not before we are: we could be reaped by somebody else.
        if not os.read(gate, 1):
            _reveal_pid(gate)
            raise SystemExit(1)  # the parent has given us up
    apply_options(options, gate, mask)
    if options[0] == "auto":
        notify_ready()
    reset_exit_handlers()
    return partial(context.run, child_func)


def _reveal_pid(gate: int) -> None:
    """Have a parent that does not know our pid learn it from the kernel. See `find_lost_child` in fork.c."""
    with contextlib.suppress(OSError):  # it does not listen
        os.write(gate, READY)


def _reset_inherited_state(loop: asyncio.AbstractEventLoop, gate: int) -> None:
    """Take off everything that was the parent's."""
    detach_epolls(gate)  # first: nothing that follows can then change what the parent's loops watch
    reset_signals()
    task = current_task(loop)
    if task is not None:
        _leave_task(loop, task)
    _set_running_loop(None)
    policy = getattr(events, "_event_loop_policy", _UNKNOWN)
    if policy is not None:  # else there is no loop set, nor a policy made
        try:
            unset_event_loop(policy)
        except Exception:  # a policy of somebody's
            print_exception()


def apply_options(options: Options, gate: int, mask: int) -> None:
    """Give a clean child what was asked for, its descriptor to say on that it is ready, and its signals."""
    _, start_new_session, process_group, pdeathsig = options
    if start_new_session:
        os.setsid()
    elif process_group is not None:
        os.setpgid(0, process_group)
    if pdeathsig is not None and not set_pdeathsig(pdeathsig, gate):
        os.kill(os.getpid(), pdeathsig)  # the parent has died already, and nobody will tell us any more
    global _ready_fd  # noqa: PLW0603 - a process is born once
    _ready_fd = gate
    note_ready_fd(gate)
    set_signal_mask(mask)


def notify_ready() -> None:
    """In a child forked with `ready="manual"`: let the parent's `afork` return. A second call does nothing.

    Raises:
        RuntimeError: this process was not made by `afork`; or it has closed the descriptor to say so on, as one of all.
    """
    global _ready_fd
    if _ready_fd is None:
        raise RuntimeError("notify_ready() is for a child made by afork()")
    fd, _ready_fd = _ready_fd, -1
    if fd >= 0:
        if not is_ready_fd(fd):  # closed, or a stranger's by now
            raise RuntimeError("notify_ready() was called after its descriptor was closed; call it before you close all")
        try:
            os.write(fd, READY)
            os.sched_yield()  # to the parent: on the same CPU it would have to wait for the end of our time slice
        except BrokenPipeError:  # the parent does not wait any more
            pass
        finally:
            os.close(fd)


def pop_ready_fd() -> int:
    """Return the descriptor on which the parent is still to be told that we are ready, to be closed; -1 if it is not."""
    global _ready_fd
    fd, _ready_fd = _ready_fd, -1
    return -1 if fd is None or not is_ready_fd(fd) else fd


def close_inherited_ready_fd() -> None:
    """In a child of an aforked child: the readiness to tell of is not ours."""
    global _ready_fd
    if _ready_fd is None:
        return
    fd, _ready_fd = _ready_fd, None
    if fd >= 0 and is_ready_fd(fd):
        os.close(fd)


def to_exit_code(result: object) -> int:
    """Return the exit code for what child_func has returned. TypeError: there is none."""
    if result is None:
        return 0
    if isinstance(result, int) and 0 <= result <= 255:
        return int(result)
    raise TypeError(f"child_func must return None or an int from 0 to 255, not {result!r}")


def _system_exit_code(exc: SystemExit) -> int:
    """Do what the interpreter does with SystemExit."""
    if exc.code is None:
        return 0
    if isinstance(exc.code, int):
        return exc.code & 0xFF
    with contextlib.suppress(BaseException):  # there is nobody else to tell
        if sys.stderr is not None:
            print(exc.code, file=sys.stderr)
    return 1
