"""`features()`: what this kernel, this sandbox and this process allow. Each system call is tried."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from .._kernel import syscalls
from .._kernel.proc import find_obstacle
from .backend import BackendName, decide

YES: Final = "yes"

SpawnName = Literal["clone", "Popen"]

# A descriptor number that is never open. A system call that exists fails with EBADF.
_NO_DESCRIPTOR: Final = 0x7FFFFFFF


@dataclass(frozen=True)
class Features:
    """What can be used here. The value of a system call is "yes", or the name of the errno with which it fails.

    Attributes:
        kernel: the kernel's release, for people to read. aiopidfd decides nothing by it.
        pidfd_open: whether a process can be watched by pidfd (Linux 5.3).
        waitid_pidfd: whether a child can be reaped by pidfd (Linux 5.4; EINVAL before).
        pidfd_send_signal: whether a process can be signalled by pidfd (Linux 5.1).
        clone_pidfd: whether clone(2) can return a pidfd of the program that it starts (Linux 5.2).
        recover_exit: whether the status of a child that another waitpid() reaped first can be read (Linux 6.15). If not, the
            errno of PIDFD_GET_INFO, or "no" where that exists without the exit status (6.13, 6.14).
        sigchld: what SIGCHLD is set to in this process: "SIG_DFL", "SIG_IGN" (then the kernel reaps every child at once),
            "ours", or whose handler it is.
        proc: "yes", or why /proc does not show every process: it cannot be read, belongs to another PID namespace, or hides
            the processes of other users. Without pidfds `wait()` then notices the exit of a process that is not a child of
            this one when its parent has reaped it, and not at all if its pid belongs to another process by then.
        nofile: how many descriptors this process may have open (RLIMIT_NOFILE, soft limit); each watched child takes one.
        nofile_max: the value to which that limit can be raised (hard limit).
        backend: how children are watched here. It follows from pidfd_open and waitid_pidfd.
        reason: why, as a sentence.
        spawn: how programs are started: by clone(2) in C, or by subprocess.Popen.
    """

    kernel: str
    pidfd_open: str
    waitid_pidfd: str
    pidfd_send_signal: str
    clone_pidfd: str
    recover_exit: str
    sigchld: str
    proc: str
    nofile: int
    nofile_max: int
    backend: BackendName
    reason: str
    spawn: SpawnName


def features() -> Features:
    """Try each system call once, and return what the kernel, a seccomp filter and this process allow now.

    Nothing is left behind. The slowest part is one clone(2) that copies no memory.
    """
    tried = _try_calls()
    backend, reason = decide()
    refused = _try(syscalls.can_recover_exit)
    recovers = refused is None and syscalls.can_recover_exit()
    nofile, nofile_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Features(
        kernel=os.uname().release,
        pidfd_open=_answer(tried.pidfd_open),
        waitid_pidfd=_answer(tried.waitid_pidfd),
        pidfd_send_signal=_answer(tried.pidfd_send_signal),
        clone_pidfd=_answer(refused),
        recover_exit=YES if recovers else _answer(tried.get_exit, otherwise="no"),
        sigchld=syscalls.describe_sigchld(),
        proc=find_obstacle() or YES,
        nofile=nofile,
        nofile_max=nofile_max,
        backend=backend,
        reason=_explain(tried) or reason if backend == "sigchld" else reason,
        spawn="Popen" if backend == "sigchld" or refused else "clone",
    )


class _Tried(NamedTuple):
    """The error of each call; None if it works."""

    pidfd_open: OSError | None
    waitid_pidfd: OSError | None
    pidfd_send_signal: OSError | None
    get_exit: OSError | None


def _try_calls() -> _Tried:
    """Try each call on a pidfd of this process; on a closed descriptor if there is no pidfd."""
    pidfd = _NO_DESCRIPTOR
    opened: OSError | None = None
    try:
        pidfd = syscalls.open_pidfd(os.getpid())
    except OSError as exc:
        opened = exc
    try:
        return _Tried(
            opened,
            # ECHILD: the kernel has read the pidfd, and no process is a child of itself.
            _try(lambda: syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG), errno.ECHILD),
            _try(lambda: syscalls.send_signal(pidfd, 0)),
            _try(lambda: syscalls.get_exit(pidfd)),
        )
    finally:
        if opened is None:
            os.close(pidfd)


def _try(call: Callable[[], object], *works: int) -> OSError | None:
    """Return the error of `call`. None if it succeeds, or fails with one of the errnos `works`, which show that it works."""
    try:
        call()
    except OSError as exc:
        # EBADF: there is no pidfd to try with, but the call exists.
        return None if exc.errno in (*works, errno.EBADF) else exc
    return None


def _explain(tried: _Tried) -> str | None:
    for call, failure in (
        ("pidfd_open", tried.pidfd_open),
        ("waitid(P_PIDFD)", tried.waitid_pidfd),
        ("pidfd_send_signal", tried.pidfd_send_signal),
    ):
        if failure is not None and failure.errno not in syscalls.OUT_OF_DESCRIPTORS:
            return f"{call} answers {_answer(failure)}: Linux before 5.4, or a seccomp filter"
    return None


def _answer(error: OSError | None, *, otherwise: str = YES) -> str:
    return otherwise if error is None else errno.errorcode.get(error.errno or 0, f"errno {error.errno}")
