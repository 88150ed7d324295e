"""Signal handlers in a forked child: handlers of Python code and of event loops are reset, handlers of C libraries stay.

A Python handler would run the parent's code in the child. A loop's handler would wake the parent's loop. Any other handler
belongs to a C library, such as faulthandler, a sanitizer or the runtime of another language. It works in the child, which
has a copy of the library's state.

Facts: Python has one C handler for all signals, and one Python function for each signal. A C library's handler may call the
handler that it has replaced. If that is Python's C handler, the Python function runs.
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
    """Reset each signal that Python or a loop handles to its default action, and have SIGINT raise KeyboardInterrupt.

    Ignored signals stay ignored, except SIGCHLD. Handlers of C libraries stay.
    """
    # _signal.signal() is used, not signal.signal(), whose enum members would cost about thirty copied pages (see child.py).
    set_wakeup_fd(-1)
    keep_handler(SIGINT)
    _set_handler(SIGINT, default_int_handler)
    if put_back_handler(SIGINT) == _WAS_IGNORED:
        _set_handler(SIGINT, SIG_IGN)  # or signal.getsignal() and asyncio.run() would take it for handled
    caught = caught_signals() & ~_SIGINT_BIT
    while caught:
        number = caught.bit_length()
        caught -= 1 << number - 1
        if is_handler_of_loop(number):
            _set_handler(number, SIG_DFL)
        elif callable(getsignal(number)):
            _reset_chained_handler(number)
    if is_ignored(SIGCHLD):
        _set_handler(SIGCHLD, SIG_DFL)  # or the kernel would reap this child's own children


_WAS_IGNORED = 2


def _reset_chained_handler(number: int) -> None:
    """Reset the Python handler of a signal whose C library handler may call it."""
    keep_handler(number)
    _set_handler(number, SIG_DFL if number in _IGNORED_BY_DEFAULT else _raise_by_default)
    put_back_handler(number)


def _raise_by_default(number: int, _: object) -> None:
    _set_handler(number, SIG_DFL)
    kill(getpid(), number)
