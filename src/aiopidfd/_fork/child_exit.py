"""The exit handlers of a forked child: what the interpreter and multiprocessing do before a process exits.

A child exits by os._exit(), which runs no exit handlers. Facts about the standard library:

* atexit, weakref.finalize and multiprocessing.util each keep one list for the process. A fork copies these lists.
* weakref.finalize and multiprocessing.util register with atexit once. After atexit's list is cleared, it does not call them.
* multiprocessing calls util._run_after_forkers() when its children start. Without this call, an mp.Queue that the parent has
  used sends nothing.
* multiprocessing calls threading._shutdown() and util._exit_function() before its children exit.
* threading._shutdown() calls the handlers of concurrent.futures. They wake the threads of all executors, also the parent's.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any
from weakref import finalize

_clear_atexit: Callable[[], None] = atexit._clear
_finalizers: dict[finalize[Any, Any], Any] = finalize._registry  # type: ignore[attr-defined] # not in typeshed, as the next
_next_index: Callable[[], int] = finalize._index_iter.__next__  # type: ignore[attr-defined]

# Indices of finalizers. Those below _fork_index were made before the last fork. Those below _first_own_index are the
# parent's.
_fork_index = _first_own_index = 0


def mark_inherited_finalizers() -> None:
    """In the parent, before a fork, note which finalizers exist."""
    global _fork_index  # noqa: PLW0603 - read in the child
    _fork_index = _next_index()


def reset_exit_handlers() -> None:
    """In a newly forked child, drop the parent's exit handlers."""
    global _first_own_index  # noqa: PLW0603 - a process starts once
    _first_own_index = _fork_index
    _clear_atexit()
    if isinstance(threading.main_thread(), threading._DummyThread):  # forked by a thread of a C library; see _shutdown()
        threading._main_thread = threading._MainThread()  # type: ignore[attr-defined] # not in typeshed
    if "multiprocessing.util" in sys.modules:
        try:
            _reset_multiprocessing(sys.modules["multiprocessing.util"], sys.modules["multiprocessing.process"])
        except Exception:
            print_exception()


def _reset_multiprocessing(util: Any, process: Any) -> None:
    """Do what multiprocessing does at the start of its children."""
    util._exiting = False
    if util._finalizer_registry:
        util._finalizer_registry.clear()
    if process._children:
        process._children = set()
    if util._afterfork_registry:
        util._run_after_forkers()


def run_exit_handlers() -> None:
    """Before a child exits, wait for its threads and run its exit handlers. Errors do not change its exit status."""
    for step in (_finish_threads, atexit._run_exitfuncs, _finish_multiprocessing, _run_finalizers):
        try:
            step()
        except BaseException:
            print_exception()
    flush_streams(BaseException)


def _finish_threads() -> None:
    """Wait for the child's threads, as the interpreter does before it exits."""
    for name, attribute in ("thread", "_threads_queues"), ("process", "_threads_wakeups"):
        executors = getattr(sys.modules.get(f"concurrent.futures.{name}"), attribute, {})
        for thread in list(executors):
            if not thread.is_alive():  # the parent's thread: a write to its wakeup pipe would reach the parent
                del executors[thread]
    threading._shutdown()  # type: ignore[attr-defined] # not in typeshed; what multiprocessing's children call, too


def _finish_multiprocessing() -> None:
    """Terminate the child's daemonic processes, join the others, and flush its queues."""
    if "multiprocessing.util" in sys.modules:
        sys.modules["multiprocessing.util"]._exit_function()


def _run_finalizers() -> None:
    """Run the finalizers that were made in the child, the newest first."""
    while finalizer := _find_finalizer():
        try:
            finalizer()
        except Exception:
            print_exception()


def _find_finalizer() -> finalize[Any, Any] | None:
    for finalizer in reversed(_finalizers):
        info = _finalizers[finalizer]
        if info.index < _first_own_index:
            break
        if info.atexit:
            return finalizer
    return None


def print_exception() -> None:
    """Print the traceback of the current exception, if stderr works."""
    with contextlib.suppress(BaseException):  # stderr is broken, so there is no place to report that
        if sys.stderr is not None:  # print_exc() would fail
            traceback.print_exc()


def flush_streams(failures: type[BaseException] = Exception) -> None:
    """Flush stdout and stderr, and ignore `failures`.

    In a parent, not all exceptions are ignored: a signal handler may raise KeyboardInterrupt, which is for the caller.
    """
    for name in ("stdout", "stderr"):
        with contextlib.suppress(failures):  # it is closed, None, broken, or not a stream
            getattr(sys, name).flush()
