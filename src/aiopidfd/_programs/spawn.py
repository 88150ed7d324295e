"""Start a program as subprocess.Popen does: in C if the options allow it, else by Popen itself."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from .._backends.backend import logger
from .._kernel import syscalls
from .._watch.starting import StartingProgram
from .popen import PythonsPopen, is_popen_unmodified, popen
from .streams import INHERITED, NeedsPopen, Streams, check_descriptor

# Options that the C code supports. The others need subprocess.Popen: preexec_fn, user and groups cannot work in a child that
# shares its parent's memory (the libc calls take locks), and the rest is rare. A value of an unexpected type needs Popen,
# too: Popen accepts it, or raises the right error.
_SUPPORTED = frozenset(
    {"shell", "cwd", "env", "executable", "close_fds", "pass_fds", "restore_signals", "start_new_session", "umask"}
) | ({"process_group"} if sys.version_info >= (3, 11) else set())

# The last result of clone(CLONE_PIDFD): 0 for success, else the errno. None: it has not been called yet.
_clone_errno: int | None = None

_CLONE_UNAVAILABLE = syscalls.FORBIDDEN | {errno.EINVAL}


def start(
    program: StartingProgram, args: Any, stdin: Any, stdout: Any, stderr: Any, **kwargs: Any
) -> subprocess.Popen[bytes]:
    """Start a program as `subprocess.Popen(args, ...)` does, with the same exceptions. Set the pid in `program`."""
    if program.reaper_fd >= 0 and kwargs.keys() <= _SUPPORTED and _clone_errno in (None, 0) and is_popen_unmodified():
        try:
            process = _spawn(program, args, stdin, stdout, stderr, **kwargs)
        except NeedsPopen:
            pass
        else:
            if process is not None:
                return process
    return popen(program, args, stdin, stdout, stderr, **kwargs)


def _spawn(
    program: StartingProgram,
    args: Any,
    stdin: Any,
    stdout: Any,
    stderr: Any,
    *,
    shell: bool = False,
    cwd: Any = None,
    env: Any = None,
    executable: Any = None,
    close_fds: bool = True,
    pass_fds: Sequence[int] = (),
    restore_signals: bool = True,
    start_new_session: bool = False,
    umask: int = -1,
    process_group: int | None = None,
) -> subprocess.Popen[bytes] | None:
    """Start a program in C. Return None if clone(CLONE_PIDFD) is not available."""
    argv = [args] if isinstance(args, (str, bytes)) else list(args)
    if shell:
        argv = ["/bin/sh", "-c", *argv]
        if executable:
            argv[0] = executable
    if executable is None:
        executable = argv[0]
    if pass_fds and not close_fds:
        raise NeedsPopen  # it warns about this combination
    sys.audit("subprocess.Popen", executable, argv, cwd, env)
    encoded_argv = [_encode(arg) for arg in argv]
    path = encoded_argv[0] if executable is argv[0] else _encode(executable)
    paths = (path,) if b"/" in path else _search_path(path, env)
    encoded_env = None if env is None else _encode_env(env)
    encoded_cwd = None if cwd is None else _encode(cwd)
    keep = sorted({check_descriptor(fd) for fd in pass_fds}) if pass_fds else ()
    umask = _check_int(umask)
    pgid = -1 if process_group is None else _check_int(process_group)
    flags = (
        (syscalls.SPAWN_CLOSE_FDS if close_fds else 0)
        | (syscalls.SPAWN_RESTORE_SIGNALS if restore_signals else 0)
        | (syscalls.SPAWN_SETSID if start_new_session else 0)
    )
    streams = INHERITED if stdin is stdout is stderr is None else Streams(stdin, stdout, stderr)
    try:
        code, step = syscalls.spawn(
            program.struct,
            program.reaper_fd,
            paths,
            encoded_argv,
            env=encoded_env,
            cwd=encoded_cwd,
            pass_fds=keep,
            stdio=streams.child_fds,
            umask=umask,
            pgid=pgid,
            flags=flags,
        )
    except BaseException:
        streams.close_parent_ends()
        raise
    finally:
        streams.close_child_ends()
    if code == 0:
        _remember_clone(0)
        return _Process(args, program.struct.pid, streams)
    streams.close_parent_ends()
    if step == syscalls.STEP_PARENT:
        if code in _CLONE_UNAVAILABLE:
            _remember_clone(code)
            return None
        raise OSError(code, os.strerror(code))
    if step == syscalls.STEP_CHDIR:
        raise OSError(code, os.strerror(code), cwd)
    if step == syscalls.STEP_SETUP:
        raise OSError(code, os.strerror(code))
    raise OSError(code, os.strerror(code), executable)


def _remember_clone(code: int) -> None:
    global _clone_errno  # noqa: PLW0603 - the answer is the same in the whole process
    if _clone_errno != code:
        _clone_errno = code
        if code:
            logger.info("starting programs by subprocess.Popen: clone(CLONE_PIDFD): %s", os.strerror(code))


def _encode(text: Any) -> bytes:
    try:
        encoded = os.fsencode(text)
    except (TypeError, UnicodeError):
        raise NeedsPopen from None
    if b"\0" in encoded:
        raise NeedsPopen
    return encoded


def _encode_env(env: Any) -> list[bytes]:
    if not isinstance(env, Mapping):
        raise NeedsPopen
    encoded = []
    for name, value in env.items():
        key = _encode(name)
        if b"=" in key:
            raise NeedsPopen
        encoded.append(key + b"=" + _encode(value))
    return encoded


def _search_path(program: bytes, env: Any) -> list[bytes]:
    # For our own environment this does what os.get_exec_path does, without its changes to the warning filters.
    directories = os.environ.get("PATH", os.defpath).split(os.pathsep) if env is None else os.get_exec_path(env)
    return [os.path.join(_encode(directory), program) for directory in directories]


def _check_int(value: Any) -> int:
    if not isinstance(value, int) or not -1 <= value <= 0x7FFFFFFF:
        raise NeedsPopen
    return value


class _Process(PythonsPopen):
    """The Popen object of a program that was started in C. It has Popen's methods and attributes."""

    # What Popen.__init__ sets on Python 3.9 to 3.15: attributes with the same value for every program.
    encoding = errors = pipesize = process_group = _input = None
    text_mode = _communication_started = False
    _closed_child_pipe_fds = True
    _child_created = False  # or __del__ would call waitpid(); the registry reaps the child, by pidfd
    _sigint_wait_secs = 0.25

    def __init__(self, args: Any, pid: int, streams: Streams) -> None:
        self.args = args
        self.pid = pid
        self.returncode = None
        self.stdin, self.stdout, self.stderr = streams.parent_ends
        self._waitpid_lock = threading.Lock()
