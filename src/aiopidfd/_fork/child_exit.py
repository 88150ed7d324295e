"""The last steps of a forked child: what the interpreter and multiprocessing do before a process exits.

A child ends by os._exit(), which does none of it. Facts of the standard library that this rests on:

* atexit, weakref.finalize and multiprocessing.util each keep one list for the process, which a fork copies. They register
  with atexit once, so to clear atexit's list loses what the child's own finalizers and mp.Process objects need.
* multiprocessing calls threading._shutdown() and util._exit_function() at the end of its children, and
  util._run_after_forkers() at their start: without that an mp.Queue that the parent has put something into sends nothing.
* threading._shutdown() calls what concurrent.futures registers, which wakes the threads of all executors, the parent's too.
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

# Numbers of finalizers that nobody has: below the first one are those of before the last fork, below the other the parent's.
_fork_index = _first_own_index = 0


def mark_inherited_finalizers() -> None:
    """In the parent, before a fork: note which finalizers are its own."""
    global _fork_index  # noqa: PLW0603 - read in the child
    _fork_index = _next_index()


def reset_exit_handlers() -> None:
    """In a newly forked child, before it runs anything: forget what the parent has registered for its own exit."""
    global _first_own_index  # noqa: PLW0603 - a process is born once
    _first_own_index = _fork_index
    _clear_atexit()
    if isinstance(threading.main_thread(), threading._DummyThread):  # forked by a thread that C has made; see _shutdown()
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
    """At the end of a child: wait for its threads and run what it has registered. What fails does not change how it ends."""
    for step in (_finish_threads, atexit._run_exitfuncs, _finish_multiprocessing, _run_finalizers):
        try:
            step()
        except BaseException:
            print_exception()
    flush_streams(BaseException)


def _finish_threads() -> None:
    """Wait for the threads that the child has started, as the interpreter does before it exits."""
    for name, attribute in ("thread", "_threads_queues"), ("process", "_threads_wakeups"):
        executors = getattr(sys.modules.get(f"concurrent.futures.{name}"), attribute, {})
        for thread in list(executors):
            if not thread.is_alive():  # it is the parent's, and so is the pipe by which it is woken
                del executors[thread]
    threading._shutdown()  # type: ignore[attr-defined] # not in typeshed; what multiprocessing's children call, too


def _finish_multiprocessing() -> None:
    """End the daemonic processes that the child has started, join the others, and send what is in its queues."""
    if "multiprocessing.util" in sys.modules:
        sys.modules["multiprocessing.util"]._exit_function()


def _run_finalizers() -> None:
    """Run the finalizers that were made in the child, the latest first."""
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
    """Print the traceback of the exception that is being handled, if it can be printed."""
    with contextlib.suppress(BaseException):  # there is nobody else to tell
        if sys.stderr is not None:  # else it would go to stdout
            traceback.print_exc()


def flush_streams(failures: type[BaseException] = Exception) -> None:
    """Write out what stdout and stderr have buffered, if they are streams and can still be written to.

    `failures` are what is kept quiet. Not all in a parent: KeyboardInterrupt is a signal handler's, and for its caller.
    """
    for name in ("stdout", "stderr"):
        with contextlib.suppress(failures):  # it is closed, None, broken, or no stream at all
            getattr(sys, name).flush()
