"""The life of a forked child: it is made clean, runs its function, and ends without a way back into its parent's code."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import sys
import threading
import traceback
from asyncio.tasks import _leave_task, current_task
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, NoReturn

from . import _linux

Ready = Literal["auto", "manual"]

_READY = b"r"

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
    old_mask: Iterable[int]
    loop: asyncio.AbstractEventLoop
    parent_pid: int


def live(birth: Birth) -> NoReturn:
    """Run a child from the fork to its end. Called with all signals blocked."""
    # _exit, come what may: a frame of the parent must never go on in here.
    code = 255
    try:
        code = _run(birth)
    except BaseException:  # a second exception while the first is being reported
        code = 1
    finally:
        os._exit(code)


def _run(birth: Birth) -> int:
    try:
        if not os.read(birth.gate, 1):
            return 1  # the parent has given us up before it could watch us
        _clean(birth)
        if birth.options.ready == "auto":
            notify_ready()
        result = contextvars.copy_context().run(birth.child_func)
        code = _exit_code(result)
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


def _clean(birth: Birth) -> None:
    """Take off everything that was the parent's."""
    _linux.detach_epolls()  # first: nothing that follows can then change what the parent's loops watch
    signal.set_wakeup_fd(-1)
    for number in _linux.caught_signals():
        signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else this child could not wait for children of its own
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    task = current_task(birth.loop)
    if task is not None:
        _leave_task(birth.loop, task)
    asyncio._set_running_loop(None)
    asyncio.set_event_loop(None)

    if birth.options.start_new_session:
        os.setsid()
    elif birth.options.process_group is not None:
        os.setpgid(0, birth.options.process_group)
    if birth.options.pdeathsig is not None:
        _linux.set_pdeathsig(birth.options.pdeathsig)
        if os.getppid() != birth.parent_pid:  # it has died already, and nobody will tell us any more
            os.kill(os.getpid(), birth.options.pdeathsig)
    global _ready_fd  # noqa: PLW0603 - a process is born once
    _ready_fd = birth.gate
    signal.pthread_sigmask(signal.SIG_SETMASK, birth.old_mask)


def notify_ready() -> None:
    """In a child forked with `ready="manual"`: let the parent's `afork` return. A second call does nothing.

    Raises:
        RuntimeError: this process was not made by `afork`.
    """
    global _ready_fd
    if _ready_fd is None:
        raise RuntimeError("notify_ready() is for a child made by afork()")
    fd, _ready_fd = _ready_fd, -1
    if fd >= 0:
        try:
            os.write(fd, _READY)
        except BrokenPipeError:  # the parent does not wait any more
            pass
        finally:
            os.close(fd)


def forget_readiness() -> None:
    """In a child of an aforked child: the readiness to tell of is not ours."""
    global _ready_fd
    fd, _ready_fd = _ready_fd, None
    if fd is not None and fd >= 0:
        os.close(fd)


def _exit_code(result: object) -> int:
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
