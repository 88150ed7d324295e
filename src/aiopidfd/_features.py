"""What this kernel, this sandbox and this process allow, found out by trying: `features()`."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from . import _linux
from ._backend import BackendName

YES: Final = "yes"

SigchldAction = Literal["default", "ignored", "Python handler", "C handler"]

# A descriptor number that is never open: a call that is there answers EBADF, one that is not there something else.
_NO_DESCRIPTOR: Final = 0x7FFFFFFF

# Linux 5.3 has pidfd_open, and answers EINVAL to waitid(P_PIDFD).
_WAITID_FORBIDDEN: Final = _linux.FORBIDDEN | {errno.EINVAL}


@dataclass(frozen=True)
class Features:
    """What can be used here; each system call as "yes" or the name of the errno that it answers.

    Attributes:
        kernel: the kernel's release, for people to read: nothing is decided by it.
        pidfd_open: whether a process can be watched by pidfd (Linux 5.3).
        waitid_pidfd: whether a child can be reaped by pidfd (Linux 5.4; EINVAL before).
        pidfd_send_signal: whether a process can be signalled by pidfd (Linux 5.1).
        recover_exit: whether a status that somebody else has reaped can still be had (Linux 6.15). If not, the errno of
            PIDFD_GET_INFO, or "no" where it is there but does not tell of exits (6.13, 6.14).
        sigchld: what SIGCHLD does in this process. Where it is ignored the kernel reaps every child at once.
        nofile: how many descriptors this process may have open (RLIMIT_NOFILE, soft limit); each watched child takes one.
        nofile_max: what that limit can be raised to (hard limit).
        backend: how the ends of children are learnt of here, which follows from pidfd_open and waitid_pidfd.
        reason: why, in words.
    """

    kernel: str
    pidfd_open: str
    waitid_pidfd: str
    pidfd_send_signal: str
    recover_exit: str
    sigchld: SigchldAction
    nofile: int
    nofile_max: int
    backend: BackendName
    reason: str


def features() -> Features:
    """Return what the kernel, its seccomp filter and this process allow at this moment, each call tried once.

    It leaves nothing behind. The dearest part is a clone(2) that copies no memory.
    """
    tried = _try_calls()
    forbidding = _forbidding(tried)
    nofile, nofile_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Features(
        kernel=os.uname().release,
        pidfd_open=_answer(tried.pidfd_open),
        waitid_pidfd=_answer(tried.waitid_pidfd),
        pidfd_send_signal=_answer(tried.pidfd_send_signal),
        recover_exit=YES if _linux.can_recover_exit() else _answer(tried.get_exit, otherwise="no"),
        sigchld=_sigchld_action(),
        nofile=nofile,
        nofile_max=nofile_max,
        backend="sigchld" if forbidding else "pidfd",
        reason=_explain(forbidding, tried) if forbidding else "processes can be opened and waited for by pidfd",
    )


def probe_pidfd() -> OSError | None:
    """Return the error that forbids pidfds here, None if nothing does.

    ENOSYS, EPERM, EACCES: no such call in this kernel, or a seccomp filter. EINVAL: Linux 5.3, which cannot wait for a
    pidfd. Being short of descriptors (EMFILE, ENFILE) passes, and so forbids nothing.
    """
    return _forbidding(_try_calls())


class _Tried(NamedTuple):
    """What was tried: the error, or None if the call is there and does what it should."""

    pidfd_open: OSError | None
    waitid_pidfd: OSError | None
    pidfd_send_signal: OSError | None
    get_exit: OSError | None


def _try_calls() -> _Tried:
    """Try each call on a pidfd of this very process; on no descriptor at all where it cannot be had."""
    pidfd = _NO_DESCRIPTOR
    opened: OSError | None = None
    try:
        pidfd = _linux.open_pidfd(os.getpid())
    except OSError as exc:
        opened = exc
    try:
        return _Tried(
            opened,
            # ECHILD: nobody is a child of its own, and to find that out the kernel has looked at the pidfd.
            _try(lambda: _linux.wait_id(_linux.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG), errno.ECHILD),
            _try(lambda: _linux.send_signal(pidfd, 0)),
            _try(lambda: _linux.get_exit(pidfd)),
        )
    finally:
        if opened is None:
            os.close(pidfd)


def _try(call: Callable[[], object], *works: int) -> OSError | None:
    """Return the error with which `call` fails, but None for one of `works`, which shows that the call is there."""
    try:
        call()
    except OSError as exc:
        # EBADF: there is no pidfd to try with, and the call is there to say so.
        return None if exc.errno in (*works, errno.EBADF) else exc
    return None


def _forbidding(tried: _Tried) -> OSError | None:
    if tried.pidfd_open is not None and tried.pidfd_open.errno in _linux.FORBIDDEN:
        return tried.pidfd_open
    if tried.waitid_pidfd is not None and tried.waitid_pidfd.errno in _WAITID_FORBIDDEN:
        return tried.waitid_pidfd
    return None


def _explain(forbidding: OSError, tried: _Tried) -> str:
    call, before = ("pidfd_open", "5.3") if forbidding is tried.pidfd_open else ("waitid(P_PIDFD)", "5.4")
    return f"{call} answers {_answer(forbidding)}: Linux before {before}, or a seccomp filter"


def _answer(error: OSError | None, *, otherwise: str = YES) -> str:
    return otherwise if error is None else errno.errorcode.get(error.errno or 0, f"errno {error.errno}")


def _sigchld_action() -> SigchldAction:
    if signal.SIGCHLD in _linux.caught_signals():
        # Python knows only what it has installed itself: a C library that took over from a Python handler is not told apart.
        return "Python handler" if callable(signal.getsignal(signal.SIGCHLD)) else "C handler"
    return "ignored" if _is_ignored(signal.SIGCHLD) else "default"


def _is_ignored(number: int) -> bool:
    """Ask the kernel whether it drops the signal: signal.getsignal() does not see what C code has set."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            ignored = next(int(line.split()[1], 16) for line in status if line.startswith("SigIgn:"))
    except OSError:  # ENOENT: no /proc in this sandbox. EMFILE, ENFILE: no descriptor left. Then what Python knows must do.
        return signal.getsignal(number) is signal.SIG_IGN
    return bool(ignored >> (number - 1) & 1)
