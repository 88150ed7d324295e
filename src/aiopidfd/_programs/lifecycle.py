"""The life of a program: it is prepared, started, and then watched, or killed if its caller gets an error instead."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

from .._backends.backend import choose, logger
from .._kernel import syscalls
from .._kernel.exit_status import ExitStatus
from .._watch.child import Child, Observer
from .._watch.registry import Registry
from .._watch.starting import StartingProgram, kill_unreaped, make_starting_program, wait_target

if TYPE_CHECKING:
    from subprocess import Popen


def prepare_program(registry: Registry) -> StartingProgram:
    """Return the state of a program that is not started yet. `watch_program` observes the program once it is."""
    program = make_starting_program(registry._reaper.fd if choose("auto") == "pidfd" else -1)
    registry.starting.add(program)
    return program


def watch_program(registry: Registry, program: StartingProgram, observer: Observer) -> Child:
    """Observe a program that was started. A second call replaces the observer. Raises what Registry.observe raises."""
    pid, popen = program.pid, program.popen
    with registry._lock:
        child = registry._children.get(pid)
        is_watched = child is not None and child.is_observed_by(program)
    # A replacement of Popen may invent pids.
    is_new = not is_watched and (popen is None or type(popen).__module__ == "subprocess")
    pidfd = -1 if is_watched else program.pidfd
    try:
        child = registry.observe(pid, program, observer, pidfd=pidfd, is_held=bool(program.struct.held), is_new=is_new)
    except OSError:  # it cannot be watched, or is gone; the caller deals with it
        registry.starting.discard(program)
        raise
    registry.starting.discard(program)  # after an interrupt, `close` of the registry kills what is left in this set
    if popen is not None:
        popen._child_created = False  # type: ignore[attr-defined] # as in spawn._Process
    return child


def cancel_program(registry: Registry, program: StartingProgram) -> None:
    """Kill a program whose caller gets an error instead. The registry reaps it; if it cannot watch it, reap it here."""
    # A Popen that has a returncode has reaped its child already.
    if not program.pid or getattr(program.popen, "returncode", None) is not None:
        registry.starting.discard(program)
        return
    try:
        child = watch_program(registry, program, _ignore)
    except (ProcessLookupError, ChildProcessError):  # another waitpid() reaped it
        return
    except OSError:
        _kill_and_reap(program)
        return
    kill(registry, child)


def kill(registry: Registry, child: Child) -> None:
    """Kill a watched child and return once it is a zombie. The registry reaps it later."""
    with registry._lock:  # or another thread could close the pidfd
        try:
            if registry.send_signal(child, signal.SIGKILL) is None:
                syscalls.wait_id(*wait_target(child.pid, child.pidfd), os.WEXITED | os.WNOWAIT)
        except PermissionError:  # it runs as another user now, and stays watched
            logger.warning("cannot kill process %d: it runs as another user", child.pid)
        except ChildProcessError:  # another waitpid() reaped it
            pass


def _ignore(status: ExitStatus) -> None:
    """Do nothing: nobody waits for this program."""


def _kill_and_reap(program: StartingProgram) -> None:
    """Kill and reap a program that cannot be watched."""
    popen = program.popen
    if popen is not None and getattr(type(popen).kill, "__module__", None) != "subprocess":
        _kill_by_popen(popen)  # a replacement of Popen knows what to kill
        return
    pid, pidfd = program.pid, program.pidfd
    if pidfd < 0:
        # EMFILE, ENFILE: out of descriptors. ENOSYS, EPERM, EACCES: pidfds are forbidden. ESRCH: waitid() fails below.
        with contextlib.suppress(OSError):
            pidfd = syscalls.open_pidfd(pid)
    try:
        # ECHILD: another waitpid() reaped it, and the pid may be another process's.
        syscalls.wait_id(*wait_target(pid, pidfd), os.WEXITED | os.WNOHANG | os.WNOWAIT)
        kill_unreaped(pid, pidfd)
        ended = syscalls.wait_id(*wait_target(pid, pidfd), os.WEXITED)
        status = ExitStatus(pid, ended.status if ended else 0, "reaped")
    except ChildProcessError:
        status = ExitStatus(pid, 0, "lost")
    except PermissionError:
        logger.warning("cannot kill process %d: it runs as another user", pid)
        return  # subprocess reaps it when it starts another program
    finally:
        if pidfd >= 0:
            os.close(pidfd)
    if popen is not None:
        popen.returncode = status.returncode


def _kill_by_popen(popen: Popen[bytes]) -> None:
    try:
        popen.kill()
    except PermissionError:  # subprocess reaps it when it starts another program
        logger.warning("cannot kill process %d: it runs as another user", popen.pid)
    else:
        popen.wait()
