"""Who has probably reaped a child before us: looked up when a status is lost, for the warning that says so.

Facts that this rests on:

* SIGCHLD ignored, or handled with SA_NOCLDWAIT: the kernel reaps a child as it ends. See sigaction(2).
* libuv's handler (uvloop's) asks for its own children only, each by pid (uv__wait_children, libuv 1.x): it is harmless.
"""

from __future__ import annotations

import os
import signal
import sys

from .._kernel import syscalls
from .._kernel.exit_status import LOST_RETURNCODE
from . import sigchld_backend
from .backend import logger

_UNKNOWN_CAUSE = "another thread or library of this process that calls wait(), or a second watcher"


def warn_lost(pid: int) -> None:
    """Log that the status of a child was taken by somebody else, and by whom."""
    logger.warning(
        "child process pid %d: somebody else has reaped it, its exit status is lost; will report returncode %d. Likely: %s",
        pid,
        LOST_RETURNCODE,
        find_likely_cause(),
    )


def find_likely_cause() -> str:
    """Say who is likely to have reaped a child of ours: what SIGCHLD is set to, or was a moment ago, or else some thread."""
    present, _, behind = syscalls.describe_sigchld().partition(syscalls.BEHIND)
    recent = sigchld_backend.recent_replacement().partition(syscalls.BEHIND)[0]
    # First whatever has the kernel reap: a handler that is there, too, may be harmless, and this is not.
    if why := _why_kernel_reaps(present):
        return f"SIGCHLD is {why}, so that the kernel reaps children itself"
    if why := _why_kernel_reaps(recent):
        return f"SIGCHLD is {why}, or was a moment ago, so that the kernel reaps children itself"
    handler = next(filter(None, map(_name_handler, (present, behind, recent))), _UNKNOWN_CAUSE)
    if why := _why_kernel_reaps(behind):
        return f"SIGCHLD was {why} before aiopidfd handled it, so that the kernel reaped children itself; or else {handler}"
    return handler


def _why_kernel_reaps(action: str) -> str | None:
    """Say what of an action has the kernel reap children; None if nothing does."""
    if action.startswith("SIG_IGN"):
        return "ignored"
    return "set with SA_NOCLDWAIT" if syscalls.NOCLDWAIT in action else None


def _name_handler(action: str) -> str | None:
    """Name the handler of an action; None if it has none, or one that is known to be harmless."""
    _, is_handled, library = action.partition(syscalls.NOCLDWAIT)[0].partition("a handler ")
    if not is_handled or "/uvloop/" in library:
        return None
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and _is_python(library):
        return f"the SIGCHLD handler {handler!r}"
    return f"the SIGCHLD handler {library}"


def _is_python(library: str) -> bool:
    """Return whether `library` ("in PATH") is the interpreter, whose one C handler stands for all those set from Python."""
    name = os.path.basename(library)
    return name.startswith(("python", "libpython")) or name == os.path.basename(sys.executable)
