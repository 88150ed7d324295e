"""Lost status: another waitpid() reaped the child first. The warning about it names the likely cause.

Facts that this module rests on:

* SIGCHLD ignored, or handled with SA_NOCLDWAIT: the kernel reaps a child as it ends. See sigaction(2).
* The SIGCHLD handler of libuv (uvloop) waits for its own children only, each by pid (uv__wait_children, libuv 1.x).
"""

from __future__ import annotations

import os
import signal
import sys

from .._kernel import syscalls
from .._kernel.exit_status import LOST_RETURNCODE
from . import sigchld_backend
from .backend import logger

_UNKNOWN_CAUSE = "another thread or library of this process calls wait(), or there is a second child watcher"


def warn_lost(pid: int) -> None:
    """Log that the status of a child is lost, and the likely cause."""
    logger.warning(
        "child process pid %d: another waitpid() reaped it first, its exit status is lost; will report returncode %d. "
        "Likely cause: %s",
        pid,
        LOST_RETURNCODE,
        find_likely_cause(),
    )


def find_likely_cause() -> str:
    """Return the likely cause of a lost status: what SIGCHLD is set to, or was a moment ago; if nothing, another thread."""
    present, _, behind = syscalls.describe_sigchld().partition(syscalls.BEHIND)
    recent = sigchld_backend.recent_replacement().partition(syscalls.BEHIND)[0]
    # First what makes the kernel reap children. A handler may be harmless; this never is.
    if why := _why_kernel_reaps(present):
        return f"SIGCHLD is {why}, so that the kernel reaps children itself"
    if why := _why_kernel_reaps(recent):
        return f"SIGCHLD is {why}, or was a moment ago, so that the kernel reaps children itself"
    handler = next(filter(None, map(_name_handler, (present, behind, recent))), _UNKNOWN_CAUSE)
    if why := _why_kernel_reaps(behind):
        return f"SIGCHLD was {why} before aiopidfd handled it, so that the kernel reaped children itself; or else {handler}"
    return handler


def _why_kernel_reaps(action: str) -> str | None:
    """Return what makes the kernel reap children in this action of SIGCHLD; None if nothing does."""
    if action.startswith("SIG_IGN"):
        return "ignored"
    return "set with SA_NOCLDWAIT" if syscalls.NOCLDWAIT in action else None


def _name_handler(action: str) -> str | None:
    """Return the name of the handler in this action; None if there is none, or it is known to be harmless."""
    _, is_handled, library = action.partition(syscalls.NOCLDWAIT)[0].partition("a handler ")
    if not is_handled or "/uvloop/" in library:
        return None
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and _is_python(library):
        return f"the SIGCHLD handler {handler!r}"
    return f"the SIGCHLD handler {library}"


def _is_python(library: str) -> bool:
    """Return whether `library` ("in PATH") is the interpreter, whose C handler calls all handlers set by Python code."""
    name = os.path.basename(library)
    return name.startswith(("python", "libpython")) or name == os.path.basename(sys.executable)
