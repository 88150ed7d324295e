"""Signal handlers in a forked child: those of Python code and of loops are reset, those of C libraries stay.

A handler of Python code would run the parent's code in the child, and one of a loop would wake the parent's loop. Any other
belongs to a C library, and the child has a copy of its state: faulthandler, a sanitizer, the runtime of another language.

Facts: Python has one C handler for all signals that it handles, and a Python function for each. A C library's handler may
call the handler that it has replaced. If that is Python's, the Python function runs.
"""

from __future__ import annotations

import signal
from _signal import (  # type: ignore[import-not-found] # not in typeshed
    SIG_DFL,
    SIG_IGN,
    SIGCHLD,
    SIGINT,
    default_int_handler,
    getsignal,
    set_wakeup_fd,
)
from _signal import signal as _set_handler
from os import getpid, kill

from .._kernel.syscalls import caught_signals, is_handler_of_loop, is_ignored, keep_handler, put_back_handler

_SIGINT_BIT = 1 << signal.SIGINT - 1
_IGNORED_BY_DEFAULT = frozenset({signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGCONT})


def reset_signals() -> None:
    """Set each signal that Python or a loop handles to its default, SIGINT to KeyboardInterrupt.

    Those that are ignored stay it, but for SIGCHLD. So do those that a C library handles.
    """
    # By what signal.signal calls: its enum members would cost a new process some thirty copied pages.
    set_wakeup_fd(-1)
    keep_handler(SIGINT)
    _set_handler(SIGINT, default_int_handler)
    if put_back_handler(SIGINT) == _WAS_IGNORED:
        _set_handler(SIGINT, SIG_IGN)  # else Python would say, and asyncio.run believe, that it is not
    caught = caught_signals() & ~_SIGINT_BIT
    while caught:
        number = caught.bit_length()
        caught -= 1 << number - 1
        if is_handler_of_loop(number):
            _set_handler(number, SIG_DFL)
        elif callable(getsignal(number)):
            _reset_chained_handler(number)
    if is_ignored(SIGCHLD):
        _set_handler(SIGCHLD, SIG_DFL)  # else this child could not wait for children of its own


_WAS_IGNORED = 2


def _reset_chained_handler(number: int) -> None:
    """Reset a Python handler that a C library's is in front of, and may call."""
    keep_handler(number)
    _set_handler(number, SIG_DFL if number in _IGNORED_BY_DEFAULT else _raise_by_default)
    put_back_handler(number)


def _raise_by_default(number: int, _: object) -> None:
    _set_handler(number, SIG_DFL)
    kill(getpid(), number)
