"""The life of a forked child: it is made clean, runs its function, and ends without a way back into its parent's code."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # not in typeshed
import asyncio
import contextvars
import os
import signal
import sys
import threading
import traceback
from asyncio.tasks import _leave_task, current_task
from collections.abc import Callable
from typing import Literal, NamedTuple, NoReturn

from . import _linux

Ready = Literal["auto", "manual"]

READY = b"r"

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


class Birth(NamedTuple):
    """What a child needs to know of itself before it runs."""

    child_func: Callable[[], int | None]
    options: Options
    gate: int
    old_mask: int
    loop: asyncio.AbstractEventLoop
    parent_pid: int


def live(birth: Birth) -> NoReturn:
    """Run a child from the fork to its end. Called with all signals blocked."""
    run_to_end(lambda: _start(birth))


def run_to_end(start: Callable[[], Callable[[], object]]) -> NoReturn:
    """Start, run what `start` returns, and end the process as that ends."""
    # _exit, come what may: a frame of the parent must never go on in here.
    code = 255
    try:
        code = _run(start)
    except BaseException:  # a second exception while the first is being reported
        code = 1
    finally:
        os._exit(code)


def _run(start: Callable[[], Callable[[], object]]) -> int:
    try:
        code = exit_code(contextvars.copy_context().run(start()))
    except SystemExit as exc:
        code = _system_exit_code(exc)
    except KeyboardInterrupt:
        flush_streams()
        _die_by_sigint()
        code = 128 + signal.SIGINT  # SIGINT is blocked or ignored by the child's own doing
    except BaseException:
        traceback.print_exc()
        code = 1
    _finish_threads()
    flush_streams()
    return code


def _start(birth: Birth) -> Callable[[], object]:
    try:
        _clean(birth.loop)  # while the parent sees to it that we are watched
    finally:
        # Not before it is: we could be reaped by somebody else.
        if not os.read(birth.gate, 1):
            raise SystemExit(1)  # the parent has given us up
    settle(birth.options, birth.parent_pid, birth.gate, birth.old_mask)
    if birth.options.ready == "auto":
        notify_ready()
    return birth.child_func


def _clean(loop: asyncio.AbstractEventLoop) -> None:
    """Take off everything that was the parent's."""
    _linux.detach_epolls()  # first: nothing that follows can then change what the parent's loops watch
    reset_signals()
    task = current_task(loop)
    if task is not None:
        _leave_task(loop, task)
    asyncio._set_running_loop(None)
    asyncio.set_event_loop(None)


def reset_signals() -> None:
    """Set every signal that is handled to its default, SIGINT to KeyboardInterrupt; those that are ignored stay it."""
    # By what signal.signal calls: its enum members would cost a new process some thirty copied pages.
    signal.set_wakeup_fd(-1)
    for number in _linux.caught_signals():
        if number != signal.SIGINT:
            _signal.signal(number, _signal.SIG_DFL)
    if _linux.is_ignored(signal.SIGCHLD):
        _signal.signal(signal.SIGCHLD, _signal.SIG_DFL)  # else this child could not wait for children of its own
    if not _linux.is_ignored(signal.SIGINT):
        _signal.signal(signal.SIGINT, signal.default_int_handler)


def settle(options: Options, parent_pid: int, gate: int, mask: int) -> None:
    """Give a clean child what was asked for, its descriptor to say on that it is ready, and its signals."""
    if options.start_new_session:
        os.setsid()
    elif options.process_group is not None:
        os.setpgid(0, options.process_group)
    if options.pdeathsig is not None:
        _linux.set_pdeathsig(options.pdeathsig)
        if os.getppid() != parent_pid:  # it has died already, and nobody will tell us any more
            os.kill(os.getpid(), options.pdeathsig)
    global _ready_fd  # noqa: PLW0603 - a process is born once
    _ready_fd = gate
    _linux.set_signal_mask(mask)


def notify_ready() -> None:
    """In a child forked with `ready="manual"`: let the parent's `afork` return. A second call does nothing.

    Raises:
        RuntimeError: this process was not made by `afork`.
    """
    if _ready_fd is None:
        raise RuntimeError("notify_ready() is for a child made by afork()")
    fd = take_ready_fd()
    if fd >= 0:
        try:
            os.write(fd, READY)
        except BrokenPipeError:  # the parent does not wait any more
            pass
        finally:
            os.close(fd)


def take_ready_fd() -> int:
    """Return the descriptor on which the parent is still to be told that we are ready, to be closed; -1 if it is not."""
    global _ready_fd
    fd, _ready_fd = _ready_fd, -1
    return -1 if fd is None else fd


def forget_readiness() -> None:
    """In a child of an aforked child: the readiness to tell of is not ours."""
    global _ready_fd
    fd, _ready_fd = _ready_fd, None
    if fd is not None and fd >= 0:
        os.close(fd)


def exit_code(result: object) -> int:
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
    print(exc.code, file=sys.stderr)
    return 1


def _finish_threads() -> None:
    """Wait for the threads that the child has started, as the interpreter does before it exits."""
    threading._shutdown()  # type: ignore[attr-defined] # not in typeshed; what multiprocessing's children call, too


def flush_streams() -> None:
    """Write out what stdout and stderr have buffered, if they can still be written to."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):  # OSError: nobody reads it any more; ValueError: closed
            pass


def _die_by_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
