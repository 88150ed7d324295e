"""Who has probably reaped a child before us: looked up when a status is lost, for the warning that says so.

Facts that this rests on:

* SIGCHLD ignored, or handled with SA_NOCLDWAIT: the kernel reaps a child as it ends. See sigaction(2).
* libuv's handler (uvloop's) asks for its own children only, each by pid (uv__wait_children, libuv 1.x): it is no thief.
"""

from __future__ import annotations

import os
import signal
import sys

from . import _linux, _sigchld
from ._backend import logger
from ._exit import LOST_RETURNCODE

_NOBODY_KNOWN = "another thread or library of this process that calls wait(), or a second watcher"


def warn_lost(pid: int) -> None:
    """Log that the status of a child was taken by somebody else, and by whom."""
    logger.warning(
        "child process pid %d: somebody else has reaped it, its exit status is lost; will report returncode %d. Likely: %s",
        pid,
        LOST_RETURNCODE,
        find_thief(),
    )


def find_thief() -> str:
    """Say who is likely to have reaped a child of ours: what SIGCHLD is set to, or was a moment ago, or else some thread."""
    for action in (_linux.describe_sigchld(), _sigchld.recent_replacement()):
        if "SA_NOCLDWAIT" in action:
            return "SIGCHLD is set with SA_NOCLDWAIT, so that the kernel reaps children itself"
        if action.startswith("SIG_IGN"):
            return "SIGCHLD is ignored, so that the kernel reaps children itself"
        _, is_handled, library = action.partition("a handler ")
        if is_handled and "/uvloop/" not in library:
            handler = signal.getsignal(signal.SIGCHLD)
            if callable(handler) and _is_python(library):
                return f"the SIGCHLD handler {handler!r}"
            return f"the SIGCHLD handler {library}"
    return _NOBODY_KNOWN


def _is_python(library: str) -> bool:
    """Return whether `library` ("in PATH") is the interpreter, whose one C handler stands for all those set from Python."""
    name = os.path.basename(library)
    return name.startswith(("python", "libpython")) or name == os.path.basename(sys.executable)
