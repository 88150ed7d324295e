"""The kernel as we use it: facts about its versions, and typed calls that raise OSError.

Facts that the code above rests on, by Linux version (tests/kernels tries them on 5.10, 6.1, 6.12, 6.18 and 7.2):

* pidfd_send_signal 5.1, clone with CLONE_PIDFD 5.2, pidfd_open and polling a pidfd 5.3, waitid with P_PIDFD 5.4
  (EINVAL before). A seccomp filter may answer ENOSYS, EPERM or EACCES for any of them.
* A pidfd becomes readable when the process is a zombie. EPOLLHUP when it has been reaped, since 6.9.
* PIDFD_GET_INFO with PIDFD_INFO_EXIT tells the status of a reaped process, since 6.15, to any holder of a pidfd that was
  opened before the reap. Between the reap and EPOLLHUP there is an instant in which it does not tell yet.
* waitid on a pidfd whose process is being traced by another one finds nothing, although the pidfd is readable.
* The shared epoll after fork: what a child changes in an inherited epoll descriptor changes for its parent.
"""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from ._exit import RUSAGE_SIZE
from ._ext import ffi, lib

P_PID: Final = 1
P_PIDFD: Final = 3
PIDFD_SIGNAL_PROCESS_GROUP: Final = 4  # Linux 6.9; EINVAL before

ADD_PEEK: Final = lib.AP_ADD_PEEK
ADD_CHECK_CHILD: Final = lib.AP_ADD_CHECK_CHILD

SOURCE_REAPED: Final = lib.AP_SOURCE_REAPED
SOURCE_PEEKED: Final = lib.AP_SOURCE_PEEKED
SOURCE_RECOVERED: Final = lib.AP_SOURCE_RECOVERED
SOURCE_LOST: Final = lib.AP_SOURCE_LOST
SOURCE_PENDING: Final = lib.AP_SOURCE_PENDING
SOURCE_GATE_READY: Final = lib.AP_SOURCE_GATE_READY
SOURCE_GATE_CLOSED: Final = lib.AP_SOURCE_GATE_CLOSED

# pidfds cannot be used here at all, as against: short of descriptors, or nothing there to open.
FORBIDDEN: Final = frozenset({errno.ENOSYS, errno.EPERM, errno.EACCES})
OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE})


def _explain(code: int) -> str:
    """Say in words what `code` means for a call on a pid or a pidfd, and what helps."""
    if code == errno.ESRCH:
        return "no such process: it has ended and was reaped, or never was"
    if code == errno.ECHILD:
        return "not a child of this process, or already reaped; aiopidfd.wait() can wait for it"
    if code == errno.EMFILE:
        return f"out of descriptors; raise RLIMIT_NOFILE (soft limit {resource.getrlimit(resource.RLIMIT_NOFILE)[0]})"
    if code == errno.ENFILE:
        return "the system is out of descriptors; raise fs.file-max"
    if code in FORBIDDEN:
        return f"{os.strerror(code)}: pidfds are not available here (Linux before 5.4, or a seccomp filter)"
    return os.strerror(code)


def error(code: int, call: str) -> OSError:
    """Make the OSError (of the right subclass) for `call` having failed with errno `code`."""
    return OSError(code, f"{call}: {_explain(code)}")


def open_pidfd(pid: int) -> int:
    """Return a new pidfd for `pid`, close-on-exec. ESRCH if it is gone. See pidfd_open(2)."""
    fd = lib.ap_pidfd_open(pid)
    if fd < 0:
        raise error(-fd, f"pidfd_open(pid {pid})")
    return fd


def send_signal(pidfd: int, signal: int, flags: int = 0) -> None:
    """Signal the process behind `pidfd` and no other. ESRCH once it was reaped. See pidfd_send_signal(2)."""
    result = lib.ap_pidfd_send_signal(pidfd, signal, flags)
    if result < 0:
        raise error(-result, f"pidfd_send_signal(signal {signal})")


class Exit(NamedTuple):
    """What a single waitid call has told: as the C side writes it."""

    pid: int
    status: int
    source: int
    rusage: bytes


_RECORD: Final = struct.Struct(f"@4i{RUSAGE_SIZE}s")
if _RECORD.size != ffi.sizeof("ap_exit"):
    raise ImportError("aiopidfd._ext was built for another architecture; install aiopidfd anew")


def wait_id(idtype: int, id_: int, options: int) -> Exit | None:
    """Wait as waitid(2) does, with rusage; None if WNOHANG found nothing. ECHILD: no such child."""
    ended = ffi.new("ap_exit *")
    result = lib.ap_waitid(idtype, id_, options, ended)
    if result < 0:
        raise error(-result, f"waitid({'pidfd' if idtype == P_PIDFD else 'pid'} {id_})")
    if result == 0:
        return None
    pid, _, status, source, rusage = _RECORD.unpack(ffi.buffer(ended))
    return Exit(pid, status, source, rusage)


def get_exit(pidfd: int) -> int | None:
    """Return the wait status of a process that somebody has reaped; None if nobody has yet.

    ENOTTY, EINVAL, ESRCH: this kernel (before 6.11, 6.13, 6.15) does not tell.
    """
    status = ffi.new("int *")
    result = lib.ap_pidfd_get_exit(pidfd, status)
    if result < 0:
        raise error(-result, "ioctl(PIDFD_GET_INFO)")
    return int(status[0]) if result else None


def can_recover_exit() -> bool:
    """Return whether the status of a child that somebody else reaped can be had here, found out by trying.

    OSError: clone(2) with CLONE_PIDFD, which it tries this with, is not to be had (ENOSYS: Linux before 5.2; or a filter).
    """
    result = lib.ap_probe_exit_info()
    if result < 0:
        raise error(-result, "clone(CLONE_PIDFD)")
    return result == 1


Record = tuple[int, int, int, int, bytes]
"""pid (of a gate: minus its number), pidfd (-1: none), wait status, source (SOURCE_*), rusage."""


class Batch:
    """What was reaped and nobody has been told yet: an `ap_batch`."""

    __slots__ = ("_records", "struct")

    def __init__(self) -> None:
        self.struct = ffi.new("ap_batch *")
        self._records = memoryview(ffi.buffer(self.struct))[ffi.offsetof("ap_batch", "exits") :]

    def records(self, count: int) -> Iterator[Record]:
        """Return the first `count` records."""
        return _RECORD.iter_unpack(self._records[: count * _RECORD.size])

    def keep_open(self, pidfd: int) -> None:
        """Take `pidfd` out of the batch: somebody else has closed it."""
        for i in range(self.struct.count):
            if self.struct.exits[i].pidfd == pidfd:
                self.struct.exits[i].pidfd = -1

    def release(self) -> None:
        """Close the pidfds of the batch and empty it."""
        lib.ap_batch_release(self.struct)


class Reaper:
    """One epoll descriptor that holds many pidfds. The C contract is in cffi_build/reaper.h."""

    __slots__ = ("_batch", "_fd", "keep_open", "release", "try_add", "try_let_out")

    def __init__(self) -> None:
        """Open it. EMFILE, ENFILE: out of descriptors."""
        fd = lib.ap_reaper_open()
        if fd < 0:
            raise error(-fd, "epoll_create1()")
        self._fd = fd
        # Does what `add` does, and returns minus the errno where that raises. No method, whose call costs as much again.
        self.try_add: Callable[[int, int], int] = partial(lib.ap_reaper_add, fd)
        # The same for a newly forked child, which is then let out of its gate.
        self.try_let_out: Callable[[int, int], int] = partial(lib.ap_reaper_let_out, fd)
        self._batch = Batch()
        self.keep_open, self.release = self._batch.keep_open, self._batch.release

    def fileno(self) -> int:
        """Return the epoll descriptor; -1 once closed."""
        return self._fd

    def add(self, pid: int, flags: int) -> int:
        """Open a pidfd for `pid` and hold it; return it. Errors as in reaper.h."""
        pidfd = lib.ap_reaper_add(self._fd, pid, flags)
        if pidfd < 0:
            raise error(-pidfd, f"cannot watch pid {pid}")
        return pidfd

    def adopt(self, pid: int, pidfd: int, flags: int) -> None:
        """Hold an open pidfd. EEXIST: held already; EBADF, EPERM: not a pidfd."""
        result = lib.ap_reaper_adopt(self._fd, pid, pidfd, flags)
        if result < 0:
            raise error(-result, f"cannot watch pid {pid} by pidfd {pidfd}")

    def add_wake(self, fd: int) -> None:
        """Hold a descriptor that is no pidfd: each write to it makes us readable, and `woken` true."""
        result = lib.ap_reaper_add_wake(self._fd, fd)
        if result < 0:
            raise error(-result, "epoll_ctl(EPOLL_CTL_ADD)")

    def open_gate(self, number: int) -> tuple[int, int]:
        """Make a socket pair for a child that is to be forked, and listen to our end; return both. EMFILE, ENFILE."""
        result = lib.ap_reaper_open_gate(self._fd, number)
        if result < 0:
            raise error(-result, "socketpair()")
        return result >> 32, result & 0xFFFFFFFF

    def modify(self, pid: int, pidfd: int, flags: int) -> None:
        """Change the flags of a held pidfd."""
        result = lib.ap_reaper_modify(self._fd, pid, pidfd, flags)
        if result < 0:
            raise error(-result, f"cannot change how pid {pid} is watched")

    def remove(self, pidfd: int) -> None:
        """Let go of a pidfd and close it."""
        lib.ap_reaper_remove(self._fd, pidfd)

    def reap(self) -> Iterator[Record]:
        """Reap what has ended and return it, together with what was reaped before and not released yet."""
        count = lib.ap_reaper_reap(self._fd, self._batch.struct)
        if count < 0:
            raise error(-count, "epoll_wait()")
        return self._batch.records(count)

    @property
    def woken(self) -> bool:
        """Whether the wake descriptor was written to, until `clear_woken`."""
        return bool(self._batch.struct.woken)

    def clear_woken(self) -> None:
        """Say that the wake was heeded."""
        self._batch.struct.woken = 0

    def close(self) -> None:
        """Close the epoll descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close_owned(fd)


STEP_PARENT: Final = lib.AP_STEP_PARENT
STEP_SETUP: Final = lib.AP_STEP_SETUP
STEP_CHDIR: Final = lib.AP_STEP_CHDIR
STEP_EXEC: Final = lib.AP_STEP_EXEC

SPAWN_CLOSE_FDS: Final = lib.AP_SPAWN_CLOSE_FDS
SPAWN_RESTORE_SIGNALS: Final = lib.AP_SPAWN_RESTORE_SIGNALS
SPAWN_SETSID: Final = lib.AP_SPAWN_SETSID


def _block(strings: Sequence[bytes]) -> bytes:
    return b"\0".join(strings) + b"\0"


def spawn(
    reaper: Reaper,
    paths: Sequence[bytes],
    argv: Sequence[bytes],
    *,
    env: Sequence[bytes] | None,
    cwd: bytes | None,
    pass_fds: Sequence[int],
    stdio: Sequence[int],
    umask: int,
    pgid: int,
    flags: int,
) -> tuple[int, int, int]:
    """Start a program, and hold its pidfd in the reaper. The C contract, and what each means, is in cffi_build/spawn.h.

    No string may hold a NUL byte. Returns the program's pid and pidfd, and STEP_EXEC. If that fails: minus the errno, -1,
    and the step (STEP_*) that failed; then there is no child.
    """
    result = lib.ap_spawn(
        reaper.fileno(),
        _block(paths),
        len(paths),
        _block(argv),
        len(argv),
        ffi.NULL if env is None else _block(env),
        -1 if env is None else len(env),
        ffi.NULL if cwd is None else cwd,
        pass_fds or ffi.NULL,
        len(pass_fds),
        *stdio,
        umask,
        pgid,
        flags,
    )
    if result > 0:
        return result >> 32, result & 0xFFFFFFFF, STEP_EXEC
    return -(-result & 0xFFFF), -1, -result >> 16


BATCH_SIZE: Final = lib.AP_BATCH


class Pids:
    """The children that one loop watches by pid, and their reaping. The C contract is in cffi_build/sigchld.h."""

    __slots__ = ("_batch", "_pids", "keep_open", "release")

    def __init__(self) -> None:
        self._pids = ffi.gc(ffi.new("ap_pids *"), lib.ap_pids_clear)
        self._batch = Batch()
        self.keep_open, self.release = self._batch.keep_open, self._batch.release

    def __len__(self) -> int:
        return int(self._pids.count)

    def add(self, pid: int, peek: bool) -> None:
        """Add a child, or change whether it is only peeked at."""
        if lib.ap_pids_add(self._pids, pid, peek) < 0:
            raise MemoryError

    def remove(self, pid: int) -> bool:
        """Remove a child; return whether it was there."""
        return lib.ap_pids_remove(self._pids, pid) == 1

    @property
    def deferred(self) -> bool:
        """Whether the last `reap` has left something to be looked for by another one, soon."""
        return bool(self._pids.deferred)

    def reap(self, scan: bool) -> tuple[int, Iterator[Record]]:
        """Reap what has ended; return how many there are, and what. `scan`: ask for each child."""
        count = lib.ap_sigchld_reap(self._pids, scan, self._batch.struct)
        return count, self._batch.records(count)


def open_sigchld() -> int:
    """Return the descriptor that our SIGCHLD handler wakes, one for the process. EMFILE, ENFILE: out of descriptors."""
    fd = lib.ap_sigchld_open()
    if fd < 0:
        raise error(-fd, "eventfd()")
    return fd


def wake_sigchld() -> None:
    """Wake every loop that watches by SIGCHLD, as the handler does."""
    lib.ap_sigchld_wake()


def install_sigchld() -> bool:
    """Put our SIGCHLD handler in front of whoever is there now; return False if it is there already."""
    result = lib.ap_sigchld_install()
    if result < 0:
        raise MemoryError
    return result == 1


def restore_sigchld() -> bool:
    """Put back who was there before our SIGCHLD handler; return False if somebody else has replaced it."""
    return lib.ap_sigchld_restore() == 1


def abandon_to_sigchld(pid: int) -> bool:
    """Have our SIGCHLD handler reap `pid`; return False if it has too many already."""
    return lib.ap_sigchld_abandon(pid) == 0


def reap_abandoned() -> int:
    """Reap those abandoned children that have ended; return how many are left."""
    return lib.ap_sigchld_reap_abandoned()


def own(fd: int) -> None:
    """Have every forked child close its copy of `fd`, as that of a reaper's descriptors, until `close_owned`."""
    lib.ap_own(fd)


def close_owned(fd: int) -> None:
    """Close a descriptor that is ours alone."""
    lib.ap_close_owned(fd)


# In a forked child: close the copies of what is owned, and put SIGCHLD back. Neither this nor the next few are functions of
# Python's, whose pages a newly forked child would have to copy.
let_go: Final[Callable[[], None]] = lib.ap_let_go


def describe_sigchld() -> str:
    """Say what SIGCHLD is set to: "SIG_DFL", "SIG_IGN", "ours", or whose handler it is, or whose is behind ours."""
    text = ffi.new("char[512]")
    lib.ap_sigchld_describe(text, 512)
    return ffi.string(text).decode(errors="replace")


# Return a mask (bit n - 1 for signal n) of the signals that have a handler in this process, Python's or a C library's.
caught_signals: Final[Callable[[], int]] = lib.ap_caught_signals
# Return whether a signal is ignored: 1 or 0.
is_ignored: Final[Callable[[int], int]] = lib.ap_is_ignored

ALL_SIGNALS: Final = (1 << 64) - 1


# Block the signals in a mask (bit n - 1 for signal n), and no others, in this thread; return what it was. As
# signal.pthread_sigmask, without its sets of enum members: in a new process they take longer than all the rest.
set_signal_mask: Final[Callable[[int], int]] = lib.ap_set_signal_mask


def set_pdeathsig(signal: int) -> None:
    """Have `signal` sent to this process when the thread that forked it ends. EINVAL: no such signal."""
    result = lib.ap_set_pdeathsig(signal)
    if result < 0:
        raise error(-result, f"prctl(PR_SET_PDEATHSIG, {signal})")


FORK_SIBLING: Final = lib.AP_FORK_SIBLING


def fork(flags: int = 0) -> tuple[int, int]:
    """Fork by clone(2), as os.fork() does, and return the child's pid and pidfd; 0 in the child.

    Only for the one thread of a process that has no other. The C contract, and the errnos, are in cffi_build/clone.h.
    """
    pidfd = ffi.new("int *", -1)
    pid = lib.ap_fork(flags, pidfd)
    if pid < 0:
        raise error(-pid, "clone(CLONE_PIDFD | CLONE_PARENT)" if flags & FORK_SIBLING else "clone(CLONE_PIDFD)")
    return pid, pidfd[0]


def count_threads() -> int:
    """Return how many threads this process has, those of C libraries among them.

    io_uring's workers (Linux 5.12+, 5.10.162+) don't count, though the kernel lists them: they run none of the process's
    code, so they hold none of its locks. uvloop's process has one for some seconds whenever a change to its epoll met a lock
    taken.
    """
    threads = os.listdir("/proc/self/task")
    return 1 if len(threads) == 1 else sum(not _is_uring_worker(thread) for thread in threads)


def _is_uring_worker(thread: str) -> bool:
    try:
        with open(f"/proc/self/task/{thread}/comm", "rb") as comm:
            return comm.read().startswith((b"iou-wrk-", b"iou-sqp-"))
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return False


_detach_epolls: Final = (
    lib.ap_detach_epolls
)  # here, since what cffi makes at the first use each forked child would make anew


def detach_epolls() -> int:
    """Replace every inherited epoll descriptor of this process by /dev/null; return how many there were."""
    count = _detach_epolls()
    if count < 0:
        raise error(-count, "opendir(/proc/self/fd)")
    return count
