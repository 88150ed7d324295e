"""What becomes of programs that were started: they are observed, or, where their caller gets an error instead, ended."""

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
    """Return what is to become a program, which `watch_program` observes then."""
    program = make_starting_program(registry._reaper.fd if choose("auto") == "pidfd" else -1)
    registry.starting.add(program)
    return program


def watch_program(registry: Registry, program: StartingProgram, observer: Observer) -> Child:
    """Observe a program that was started; once more, to have another observer. Raises as Registry.observe."""
    pid, popen = program.pid, program.popen
    # What stands in for Popen may make numbers up.
    is_new = popen is None or type(popen).__module__ == "subprocess"
    if is_new and program in registry.starting:
        registry.claim_pid(pid)
    with registry._lock:
        registry.starting.discard(program)
        child = registry._children.get(pid)
        if child is not None and child.remove_observer(program):
            child.add_observer(program, observer, None, None)
        elif program.struct.held:
            child = registry.observe_spawned(pid, program.struct.pidfd, program, observer)
        else:
            child = registry.observe(pid, program, observer, pidfd=program.pidfd, new=is_new)
    if popen is not None:
        popen._child_created = False  # type: ignore[attr-defined] # as in spawn._Process
    return child


def cancel_program(registry: Registry, program: StartingProgram) -> None:
    """Kill a program whose caller gets an error instead. The registry reaps it, if it can watch it; else we do, now."""
    # A Popen that has a returncode has reaped a child that it cannot hand over.
    if not program.pid or getattr(program.popen, "returncode", None) is not None:
        registry.starting.discard(program)
        return
    try:
        child = watch_program(registry, program, _ignore)
    except (ProcessLookupError, ChildProcessError):  # somebody else has reaped it
        return
    except OSError:
        _kill_and_reap(program)
        return
    kill(registry, child)


def kill(registry: Registry, child: Child) -> None:
    """Kill a watched child and return once it is dead, which takes no time; it is reaped with what else has ended."""
    with registry._lock:  # so that nobody closes the pidfd meanwhile
        try:
            if registry.send_signal(child, signal.SIGKILL) is None:
                syscalls.wait_id(*wait_target(child.pid, child.pidfd), os.WEXITED | os.WNOWAIT)
        except PermissionError:  # it runs as another user now, and stays watched
            logger.warning("cannot kill process %d: it runs as another user", child.pid)
        except ChildProcessError:  # somebody else has reaped it
            pass


def _ignore(status: ExitStatus) -> None:
    """Observe a program that nobody waits for."""


def _kill_and_reap(program: StartingProgram) -> None:
    """Kill and reap a program that cannot be watched."""
    popen = program.popen
    if popen is not None and getattr(type(popen).kill, "__module__", None) != "subprocess":
        _kill_by_popen(popen)  # whatever stands in for it knows what there is to kill
        return
    pid, pidfd = program.pid, program.pidfd
    if pidfd < 0:
        with contextlib.suppress(OSError):  # EMFILE, ENFILE; or pidfds are forbidden; or (ESRCH) it is gone, as we shall see
            pidfd = syscalls.open_pidfd(pid)
    try:
        syscalls.wait_id(*wait_target(pid, pidfd), os.WEXITED | os.WNOHANG | os.WNOWAIT)  # is it still there, and ours?
        kill_unreaped(pid, pidfd)
        ended = syscalls.wait_id(*wait_target(pid, pidfd), os.WEXITED)
        status = ExitStatus(pid, ended.status if ended else 0, "reaped")
    except ChildProcessError:
        status = ExitStatus(pid, 0, "lost")
    except PermissionError:
        logger.warning("cannot kill process %d: it runs as another user", pid)
        return  # Popen itself reaps it, when it starts another one
    finally:
        if pidfd >= 0:
            os.close(pidfd)
    if popen is not None:
        popen.returncode = status.returncode


def _kill_by_popen(popen: Popen[bytes]) -> None:
    try:
        popen.kill()
    except PermissionError:  # `subprocess` itself reaps it, when it starts another one
        logger.warning("cannot kill process %d: it runs as another user", popen.pid)
    else:
        popen.wait()
