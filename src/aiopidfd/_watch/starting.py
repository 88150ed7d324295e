"""A program that is being started, known before it is born: an interrupt after clone(2) does not lose it.

Facts that this rests on:

* A Python signal handler runs, and may raise, between any two bytecodes; so also after a call has returned and before its
  result is stored. What C has written before it returned is there.
* A child that has run its program may be reaped by others at any time (SIGCHLD ignored, a thread in waitpid(-1)); from then
  on its number may be a stranger's, or another child's.
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
    """One program that is being started. It is the key under which its transport observes it."""

    __slots__ = ("popen", "reaper_fd", "struct")

    reaper_fd: int  # what is to hold its pidfd; -1 where children are not watched by pidfd
    struct: Any  # an ap_birth, written in C
    popen: Popen[bytes] | None  # if it is Popen that starts it

    @property
    def pid(self) -> int:
        """The program's process ID; 0 if there is none."""
        pid = self.struct.pid if self.popen is None else getattr(self.popen, "pid", None)
        return pid if isinstance(pid, int) else 0  # what stands in for Popen may have anything

    @property
    def pidfd(self) -> int:
        """Its pidfd; -1: none."""
        return int(self.struct.pidfd) if self.struct.pid else -1


def make_starting_program(reaper_fd: int) -> StartingProgram:
    """Make one. Not by an __init__, as a Child."""
    program = StartingProgram()
    program.reaper_fd = reaper_fd
    program.struct = syscalls.new_birth()
    program.popen = None
    return program


def wait_target(pid: int, pidfd: int) -> tuple[int, int]:
    """Return what waitid(2) is to wait for: the pidfd, or if that is -1 the pid."""
    return (syscalls.P_PIDFD, pidfd) if pidfd >= 0 else (syscalls.P_PID, pid)


def kill_unreaped(pid: int, pidfd: int) -> None:
    """Kill a child that was not reaped a moment ago: by pidfd, by pid where a filter forbids that or there is none."""
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
    """Kill what was started, and then interrupted twice, so that nobody watches it; return what is to be reaped."""
    left = []
    while programs:
        program = programs.pop()
        if program.pid:
            left.append(program.pid)
            with contextlib.suppress(OSError):  # ECHILD, ESRCH: it is gone; EPERM: it runs as another user
                syscalls.wait_id(*wait_target(program.pid, program.pidfd), os.WEXITED | os.WNOHANG | os.WNOWAIT)
                kill_unreaped(program.pid, program.pidfd)
            if program.pidfd >= 0:
                syscalls.close_tracked_fd(program.pidfd)
    return left
