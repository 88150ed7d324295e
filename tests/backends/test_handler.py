"""Our SIGCHLD handler does not disturb the code that it interrupts."""

from __future__ import annotations

import ctypes
import errno
import signal

from aiopidfd._kernel import syscalls

from ..helpers.seccomp import compile_c


def test_handler_leaves_errno_alone() -> None:
    """The calls of the handler change errno. Interrupted code that has not read its own errno yet must not see that."""
    handlers = ctypes.CDLL(str(compile_c("handlers.c", "-shared", "-fPIC")))
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        assert handlers.install_handler(2) == 0
        assert syscalls.install_sigchld()
        calls = handlers.count_calls(2)
        assert handlers.errno_after_signal(errno.EXDEV) == errno.EXDEV
        assert handlers.count_calls(2) == calls + 1
    finally:
        syscalls.restore_sigchld()
        signal.signal(signal.SIGCHLD, before)
