"""Start a program: in C where that can do it, by subprocess.Popen where not. Popen is the measure of what it means."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from io import FileIO
from typing import Any, NamedTuple

from . import _linux, _reaper
from ._backend import logger

# The rest is Popen's: what a child in its parent's memory cannot do (preexec_fn; user and groups, whose libc calls take
# locks), and what is rare. So is anything in a call that is not plainly right: Popen does it, or refuses it in its words.
_PLAIN = frozenset(
    {"shell", "cwd", "env", "executable", "close_fds", "pass_fds", "restore_signals", "start_new_session", "umask"}
) | ({"process_group"} if sys.version_info >= (3, 11) else set())

# clone with CLONE_PIDFD, tried: None until then, and after that what it answered, 0 for success.
_clone_errno: int | None = None

_NOT_TO_BE_HAD = _linux.FORBIDDEN | {errno.EINVAL}


class Spawned(NamedTuple):
    """A program that was started: its process, and its pidfd if the reaper holds one already (else -1)."""

    process: subprocess.Popen[bytes]
    pidfd: int


class _Unplain(Exception):
    """The call is one for Popen."""


def start(reaper: _reaper.Reaper | None, args: Any, stdin: Any, stdout: Any, stderr: Any, **kwargs: Any) -> Spawned:
    """Start a program as `subprocess.Popen(args, ...)` does, which raises what goes wrong.

    Args:
        reaper: what is to hold its pidfd; None where children are not watched by pidfd.
    """
    if reaper is not None and kwargs.keys() <= _PLAIN and _clone_errno in (None, 0):
        try:
            spawned = _spawn(reaper, args, stdin, stdout, stderr, **kwargs)
        except _Unplain:
            pass
        else:
            if spawned is not None:
                return spawned
    return Spawned(_popen(args, stdin, stdout, stderr, **kwargs), -1)


def _spawn(
    reaper: _reaper.Reaper,
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
) -> Spawned | None:
    """Start a program in C; return None if clone with CLONE_PIDFD is not to be had here."""
    argv = [args] if isinstance(args, (str, bytes)) else list(args)
    if shell:
        argv = ["/bin/sh", "-c", *argv]
        if executable:
            argv[0] = executable
    if executable is None:
        executable = argv[0]
    if pass_fds and not close_fds:
        raise _Unplain  # Popen warns of that
    sys.audit("subprocess.Popen", executable, argv, cwd, env)
    path = _encode(executable)
    paths = (path,) if b"/" in path else _search_path(path, env)
    encoded_argv = [_encode(arg) for arg in argv]
    encoded_env = None if env is None else _encode_env(env)
    encoded_cwd = None if cwd is None else _encode(cwd)
    keep = sorted({_descriptor(fd) for fd in pass_fds}) if pass_fds else ()
    umask = _number(umask)
    pgid = -1 if process_group is None else _number(process_group)
    flags = (
        (_linux.SPAWN_CLOSE_FDS if close_fds else 0)
        | (_linux.SPAWN_RESTORE_SIGNALS if restore_signals else 0)
        | (_linux.SPAWN_SETSID if start_new_session else 0)
    )
    streams = _Streams(stdin, stdout, stderr)
    try:
        pid, pidfd, step = _linux.spawn(
            reaper.fd,
            paths,
            encoded_argv,
            env=encoded_env,
            cwd=encoded_cwd,
            pass_fds=keep,
            stdio=streams.child,
            umask=umask,
            pgid=pgid,
            flags=flags,
        )
    except BaseException:
        streams.close_ours()
        raise
    finally:
        streams.close_childs()
    if pid > 0:
        _note_clone(0)
        return Spawned(_Process(args, pid, streams), pidfd)
    streams.close_ours()
    code = -pid
    if step == _linux.STEP_PARENT:
        if code in _NOT_TO_BE_HAD:
            _note_clone(code)
            return None
        raise OSError(code, os.strerror(code))
    if step == _linux.STEP_CHDIR:
        raise OSError(code, os.strerror(code), cwd)
    if step == _linux.STEP_SETUP:
        raise OSError(code, os.strerror(code))
    raise OSError(code, os.strerror(code), executable)


def _note_clone(code: int) -> None:
    global _clone_errno  # noqa: PLW0603 - what the kernel allows is the process's
    if _clone_errno != code:
        _clone_errno = code
        if code:
            logger.info("starting programs by subprocess.Popen: clone(CLONE_PIDFD): %s", os.strerror(code))


def _encode(text: Any) -> bytes:
    try:
        encoded = os.fsencode(text)
    except (TypeError, UnicodeError):
        raise _Unplain from None
    if b"\0" in encoded:
        raise _Unplain
    return encoded


def _encode_env(env: Any) -> list[bytes]:
    if not isinstance(env, Mapping):
        raise _Unplain
    encoded = []
    for name, value in env.items():
        key = _encode(name)
        if b"=" in key:
            raise _Unplain
        encoded.append(key + b"=" + _encode(value))
    return encoded


def _search_path(program: bytes, env: Any) -> list[bytes]:
    # What get_exec_path finds in our own environment, without the warning filters that it sets and restores.
    directories = os.environ.get("PATH", os.defpath).split(os.pathsep) if env is None else os.get_exec_path(env)
    return [os.path.join(_encode(directory), program) for directory in directories]


def _number(value: Any) -> int:
    if not isinstance(value, int) or not -1 <= value <= 0x7FFFFFFF:
        raise _Unplain
    return value


def _descriptor(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= 0x7FFFFFFF:
        raise _Unplain
    return value


class _Streams:
    """The standard streams of a program that is being started: the child's ends and ours."""

    def __init__(self, stdin: Any, stdout: Any, stderr: Any) -> None:
        self.ours: list[FileIO | None] = [None, None, None]
        self._childs: list[int] = []  # to be closed here once the child has them
        made = [-1, -1, -1]
        try:
            for number, wanted in enumerate((stdin, stdout, stderr)):
                if wanted is not None:
                    made[number] = self._make(number, wanted, made[1])
        except BaseException:
            self.close_childs()
            self.close_ours()
            raise
        self.child = made

    def _make(self, number: int, wanted: Any, stdout: int) -> int:
        if wanted == subprocess.PIPE:
            read, write = os.pipe()
            child, ours = (read, write) if number == 0 else (write, read)
            self._childs.append(child)
            self.ours[number] = FileIO(ours, "wb" if number == 0 else "rb")
            return child
        if wanted == subprocess.DEVNULL:
            self._childs.append(os.open(os.devnull, os.O_RDWR))
            return self._childs[-1]
        if wanted == subprocess.STDOUT and number == 2 and stdout >= 0:
            return stdout
        return _descriptor(wanted if isinstance(wanted, int) else wanted.fileno())

    def close_childs(self) -> None:
        """Close the child's ends of the pipes, and what else was opened for it."""
        for fd in self._childs:
            os.close(fd)
        self._childs.clear()

    def close_ours(self) -> None:
        """Close our ends of the pipes."""
        for stream in self.ours:
            if stream is not None:
                stream.close()


def _popen(args: Any, stdin: Any, stdout: Any, stderr: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
    # Until Python 3.11.4, when Popen cannot make its second pipe it loses the first, so it is given pipes.
    # https://github.com/python/cpython/issues/87474
    streams = None
    if sys.version_info < (3, 11, 4) and "pipesize" not in kwargs:
        with contextlib.suppress(_Unplain):  # Popen will say what is wrong
            streams = _Streams(stdin, stdout, stderr)
    if streams is None:
        return subprocess.Popen(args, bufsize=0, stdin=stdin, stdout=stdout, stderr=stderr, **kwargs)
    stdin, stdout, stderr = (None if fd < 0 else fd for fd in streams.child)
    try:
        process = subprocess.Popen(args, bufsize=0, stdin=stdin, stdout=stdout, stderr=stderr, **kwargs)
    except BaseException:
        streams.close_ours()
        raise
    finally:
        streams.close_childs()
    process.stdin, process.stdout, process.stderr = streams.ours
    return process


class _Process(subprocess.Popen[bytes]):
    """The Popen of a program that Popen has not started: what it offers for a child, and how it ends, is the same."""

    # What Popen.__init__ sets on Python 3.9 to 3.15 before it starts the child, and after; here, what is the same for all.
    encoding = errors = pipesize = process_group = _input = None
    text_mode = _communication_started = False
    _closed_child_pipe_fds = _child_created = True
    _sigint_wait_secs = 0.25

    def __init__(self, args: Any, pid: int, streams: _Streams) -> None:
        self.args = args
        self.pid = pid
        self.returncode = None
        self.stdin, self.stdout, self.stderr = streams.ours
        self._waitpid_lock = threading.Lock()
