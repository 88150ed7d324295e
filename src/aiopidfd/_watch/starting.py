"""A program that is being started. It is registered before it exists, so an interrupt after clone(2) does not lose it.

Facts that this module rests on:

* A Python signal handler runs, and may raise, between any two bytecodes. So it may raise after a call has returned and
  before its result is stored. What C wrote before it returned is not lost.
* Other code may reap a child at any time after exec (SIGCHLD is ignored, a thread calls waitpid(-1)). From then on the
  pid may belong to another process.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

from .._kernel import syscalls

if TYPE_CHECKING:
    from subprocess import Popen


class StartingProgram:
    """One program that is being started. It is also the key of its observer in the registry."""

    __slots__ = ("popen", "reaper_fd", "struct")

    reaper_fd: int  # the reaper that will hold the pidfd; -1 where children are not watched by pidfd
    struct: Any  # an ap_program, written in C
    popen: Popen[bytes] | None  # if Popen starts the program

    @property
    def pid(self) -> int:
        """The process ID; 0 if there is no process yet."""
        pid = self.struct.pid if self.popen is None else getattr(self.popen, "pid", None)
        return pid if isinstance(pid, int) else 0  # a replacement of Popen may have a pid of any type

    @property
    def pidfd(self) -> int:
        """The pidfd; -1 if there is none."""
        return int(self.struct.pidfd) if self.struct.pid else -1


def make_starting_program(reaper_fd: int) -> StartingProgram:
    """Return a StartingProgram without a process. As in child.py, an `__init__` would be slower."""
    program = StartingProgram()
    program.reaper_fd = reaper_fd
    program.struct = syscalls.new_program()
    program.popen = None
    return program


def wait_target(pid: int, pidfd: int) -> tuple[int, int]:
    """Return the first two arguments of waitid(2): for the pidfd, or for the pid if `pidfd` is -1."""
    return (syscalls.P_PIDFD, pidfd) if pidfd >= 0 else (syscalls.P_PID, pid)


def kill_unreaped(pid: int, pidfd: int) -> None:
    """Kill a child that was not reaped a moment ago: by pidfd; by pid if there is no pidfd or a filter forbids the call."""
    if pidfd >= 0:
        try:
            syscalls.send_signal(pidfd, signal.SIGKILL)
        except OSError as exc:
            if exc.errno not in syscalls.FORBIDDEN:
                raise
        else:
            return
    os.kill(pid, signal.SIGKILL)


def kill_unwatched(programs: set[StartingProgram]) -> list[int]:
    """Kill the programs whose start was interrupted twice, so nobody watches them. Return the pids to be reaped."""
    left = []
    while programs:
        program = programs.pop()
        if program.pid:
            left.append(program.pid)
            with contextlib.suppress(OSError):  # ECHILD, ESRCH: it is gone. EPERM: it runs as another user
                syscalls.wait_id(*wait_target(program.pid, program.pidfd), os.WEXITED | os.WNOHANG | os.WNOWAIT)
                kill_unreaped(program.pid, program.pidfd)
            if program.pidfd >= 0:
                syscalls.close_tracked_fd(program.pidfd)
    return left
