"""subprocess.Popen: whether it is unmodified, and how it starts a program.

Mocks, tracers, sandboxes and gevent replace or wrap Popen or its methods, or replace the code of those methods. They expect
to see every program that is started, as they do on asyncio's loops. So a modified Popen starts all programs.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any, Final

from .._watch.starting import StartingProgram
from .streams import NeedsPopen, Streams


def _find_popen() -> type[Any]:
    """Return Python's own Popen, even if subprocess.Popen is something else by now."""
    for cls in (*getattr(subprocess.Popen, "__mro__", ()), *object.__subclasses__()):
        if (cls.__module__, cls.__qualname__) == ("subprocess", "Popen"):
            return cls  # type: ignore[no-any-return] # object.__subclasses__() is a list of types
    return object


if TYPE_CHECKING:
    PythonsPopen = subprocess.Popen[bytes]
else:
    PythonsPopen = _find_popen()

# The methods that decide how a program is started.
_METHODS: Final = ("__init__", "_execute_child", "_get_handles")
_GLOBALS: Final = vars(subprocess)
_FILE: Final = subprocess.list2cmdline.__code__.co_filename
_get_fork: Final = attrgetter("_fork_exec" if sys.version_info >= (3, 11) else "_posixsubprocess.fork_exec")

# What the last full check has found unmodified: the methods, their code, and the function that forks. As long as they are
# the same objects, no full check is needed.
_unmodified: tuple[Any, ...] = (object(),) * 7


def is_popen_unmodified() -> bool:
    """Return whether subprocess.Popen is Python's own, with no method replaced or wrapped."""
    global _unmodified  # noqa: PLW0603 - a process has one Popen
    methods: Any = PythonsPopen.__dict__
    if subprocess.Popen is not PythonsPopen or "__new__" in methods:
        return False
    init, init_code, execute, execute_code, handles, handles_code, fork = _unmodified
    if (
        methods.get("__init__") is init
        and init.__code__ is init_code
        and methods.get("_execute_child") is execute
        and execute.__code__ is execute_code
        and methods.get("_get_handles") is handles
        and handles.__code__ is handles_code
        and _get_fork(subprocess) is fork
    ):
        return True
    seen: list[Any] = []
    for name in _METHODS:
        function = methods.get(name)
        if (
            type(function) is not FunctionType  # a proxy has the attributes of what it wraps
            or function.__globals__ is not _GLOBALS
            or function.__code__.co_filename != _FILE
            or function.__dict__  # tools that replace the code keep the original here
        ):
            return False
        seen += function, function.__code__
    fork = _get_fork(subprocess)
    if not type(fork) is type(os.posix_spawn) is BuiltinFunctionType:
        return False
    _unmodified = (*seen, fork)
    return True


def popen(
    program: StartingProgram, args: Any, stdin: Any, stdout: Any, stderr: Any, **kwargs: Any
) -> subprocess.Popen[bytes]:
    """Start a program by subprocess.Popen, or by its replacement, with the arguments that asyncio gives it."""
    keywords = {"shell": False, "universal_newlines": False, "bufsize": 0, **kwargs}
    if not is_popen_unmodified():
        process: subprocess.Popen[bytes] = subprocess.Popen(args, stdin=stdin, stdout=stdout, stderr=stderr, **keywords)
        program.popen = process
        return process
    # Before Python 3.11.4, Popen leaks its first pipe if it cannot make the second. So it gets pipes that exist already.
    # https://github.com/python/cpython/issues/87474
    streams = None
    if sys.version_info < (3, 11, 4) and "pipesize" not in kwargs:
        with contextlib.suppress(NeedsPopen):  # Popen raises the right error
            streams = Streams(stdin, stdout, stderr)
    if streams is not None:
        stdin, stdout, stderr = (None if fd < 0 else fd for fd in streams.child_fds)
    # `program` has the object before there is a child: a KeyboardInterrupt at the end of __init__ does not lose the child.
    process = program.popen = subprocess.Popen.__new__(subprocess.Popen)
    try:
        process.__init__(args, stdin=stdin, stdout=stdout, stderr=stderr, **keywords)  # type: ignore[misc]
        if streams is not None:
            process.stdin, process.stdout, process.stderr = streams.parent_ends
    except BaseException:
        if streams is not None:
            streams.close_parent_ends()
        raise
    finally:
        if streams is not None:
            streams.close_child_ends()
    return process
