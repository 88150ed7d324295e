"""System calls: typed functions that raise OSError, and facts about the versions of Linux.

Facts, by Linux version. tests/kernels tries them on 5.10, 6.1, 6.12, 6.18 and 7.2.

* pidfd_send_signal 5.1, clone with CLONE_PIDFD 5.2, pidfd_open and polling a pidfd 5.3, waitid with P_PIDFD 5.4
  (EINVAL before). A seccomp filter may answer ENOSYS, EPERM or EACCES for any of them.
* A pidfd becomes readable when the process is a zombie. Since 6.9 it has EPOLLHUP when the process was reaped.
* PIDFD_GET_INFO with PIDFD_INFO_EXIT returns the status of a reaped process, since 6.15. The pidfd must have been opened
  before the reap. For an instant between the reap and EPOLLHUP the status is not available yet.
* waitid on a pidfd finds nothing while another process traces the child, although the pidfd is readable.
* A forked child shares the epoll files of its parent. A change by the child changes them for the parent, too.

Some names below are functions of the C extension itself, without a Python function around them. A newly forked child calls
them, and each Python function would cost it copies of some pages. They are looked up at import: cffi creates a function
object at the first use, and each forked child would do that again.
"""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from .._ext import ffi, lib
from . import proc
from .exit_status import RUSAGE_SIZE

P_PID: Final = 1
P_PIDFD: Final = 3
PIDFD_SIGNAL_PROCESS_GROUP: Final = 4  # Linux 6.9; EINVAL before

# pidfds are not available at all. Other errors concern one process, or a lack of descriptors.
FORBIDDEN: Final = frozenset({errno.ENOSYS, errno.EPERM, errno.EACCES})
OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE})


def _explain(code: int) -> str:
    """Return what the errno `code` means for a call with a pid or a pidfd, and what helps."""
    if code == errno.ESRCH:
        return "no such process: it was reaped, or never existed"
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
    """Return the OSError (of the right subclass) for a failed `call` with errno `code`."""
    return OSError(code, f"{call}: {_explain(code)}")


def signal_error(code: int, call: str) -> OSError:
    """Return the OSError for a failed `call` with errno `code` that sends a signal."""
    if code == errno.EPERM:
        return OSError(code, f"{call}: {os.strerror(code)}: it runs as another user (or a seccomp filter refuses)")
    return error(code, call)


def open_pidfd(pid: int) -> int:
    """Return a new pidfd for `pid`, close-on-exec. ESRCH: there is no such process. See pidfd_open(2)."""
    fd = lib.ap_pidfd_open(pid)
    if fd < 0:
        raise error(-fd, f"pidfd_open(pid {pid})")
    return fd


# Return the inode number of a pidfd, or of a pid, which no other process has (Linux 6.9). 0 if there is none.
pidfd_inode: Final[Callable[[int], int]] = lib.ap_pidfd_inode
pid_inode: Final[Callable[[int], int]] = lib.ap_pid_inode


def send_signal(pidfd: int, signal: int, flags: int = 0) -> None:
    """Send a signal to the process behind `pidfd`. ESRCH: it was reaped. See pidfd_send_signal(2)."""
    result = lib.ap_pidfd_send_signal(pidfd, signal, flags)
    if result < 0:
        raise signal_error(-result, f"pidfd_send_signal(signal {signal})")


class Exit(NamedTuple):
    """The result of one waitid call: an `ap_exit` of the C side."""

    pid: int
    status: int
    source: int
    rusage: bytes


RECORD: Final = struct.Struct(f"@4i{RUSAGE_SIZE}s")
if RECORD.size != ffi.sizeof("ap_exit"):
    raise ImportError("aiopidfd._ext was built for another architecture; install aiopidfd anew")


def wait_id(idtype: int, id_: int, options: int) -> Exit | None:
    """Call waitid(2) with rusage. Return None if WNOHANG found nothing. ECHILD: there is no such child."""
    ended = ffi.new("ap_exit *")
    result = lib.ap_waitid(idtype, id_, options, ended)
    if result < 0:
        raise error(-result, f"waitid({'pidfd' if idtype == P_PIDFD else 'pid'} {id_})")
    if result == 0:
        return None
    pid, _, status, source, rusage = RECORD.unpack(ffi.buffer(ended))
    return Exit(pid, status, source, rusage)


def get_exit(pidfd: int) -> int | None:
    """Return the wait status of a process that was reaped by any process. None if it was not reaped yet.

    ENOTTY, EINVAL, ESRCH: this kernel (before 6.11, 6.13, 6.15) does not report it.
    """
    status = ffi.new("int *")
    result = lib.ap_pidfd_get_exit(pidfd, status)
    if result < 0:
        raise error(-result, "ioctl(PIDFD_GET_INFO)")
    return int(status[0]) if result else None


def get_pid(pidfd: int) -> int | None:
    """Return the pid of the process behind `pidfd` in our PID namespace.

    0: the process was reaped, has no pid in our namespace, or `pidfd` is no pidfd. None: there is neither PIDFD_GET_INFO
    (Linux 6.13) nor a /proc of our namespace.
    """
    pid = int(lib.ap_pidfd_get_pid(pidfd))
    if pid > 0:
        return pid
    if pid in (-errno.ESRCH, -errno.EREMOTE):
        return 0
    return proc.read_pid(pidfd)  # ENOTTY, EINVAL: no pidfd, or an older kernel. ENOSYS, EPERM, EACCES: a seccomp filter


def can_recover_exit() -> bool:
    """Try whether the kernel reports the status of a child that another waitpid() reaped. Return the answer.

    OSError: clone(2) with CLONE_PIDFD, which the trial needs, is not available (ENOSYS: Linux before 5.2, or a filter).
    """
    result = lib.ap_probe_exit_info()
    if result < 0:
        raise error(-result, "clone(CLONE_PIDFD)")
    return result == 1


STEP_PARENT: Final = lib.AP_STEP_PARENT
STEP_SETUP: Final = lib.AP_STEP_SETUP
STEP_CHDIR: Final = lib.AP_STEP_CHDIR
STEP_EXEC: Final = lib.AP_STEP_EXEC

SPAWN_CLOSE_FDS: Final = lib.AP_SPAWN_CLOSE_FDS
SPAWN_RESTORE_SIGNALS: Final = lib.AP_SPAWN_RESTORE_SIGNALS
SPAWN_SETSID: Final = lib.AP_SPAWN_SETSID


_join: Final = b"\0".join  # the last string has its NUL, too: each `bytes` object ends with one


# Return a new `ap_program`, of a program that is not started.
new_program: Final[Callable[[], Any]] = partial(ffi.new, ffi.typeof("ap_program *"))


def spawn(
    program: Any,
    reaper: int,
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
) -> tuple[int, int]:
    """Start a program, note it in `program`, and add its pidfd to the reaper with the descriptor `reaper`.

    The C contract, with the meaning of each argument, is in cffi_build/spawn.h. No string may contain a NUL byte.

    Returns 0 and STEP_PARENT, or the errno and the step (STEP_*) that failed. After a failure there is no child.
    """
    result = lib.ap_spawn(
        program,
        reaper,
        _join(paths),
        len(paths),
        _join(argv),
        len(argv),
        ffi.NULL if env is None else _join(env),
        -1 if env is None else len(env),
        ffi.NULL if cwd is None else cwd,
        pass_fds or ffi.NULL,
        len(pass_fds),
        *stdio,
        umask,
        pgid,
        flags,
    )
    return -result & 0xFFFF, -result >> 16


def open_sigchld() -> int:
    """Return the descriptor that our SIGCHLD handler writes to. A process has one. EMFILE, ENFILE: out of descriptors."""
    fd = lib.ap_sigchld_open()
    if fd < 0:
        raise error(-fd, "eventfd()")
    return fd


def simulate_sigchld(pid: int) -> None:
    """Do what our SIGCHLD handler does for an exit of `pid`: wake every loop that watches by SIGCHLD."""
    lib.ap_sigchld_add_name(pid)


INSTALL_UNCHANGED: Final = lib.AP_INSTALL_UNCHANGED
INSTALL_DONE: Final = lib.AP_INSTALL_DONE
INSTALL_RESUMED: Final = lib.AP_INSTALL_RESUMED


def install_sigchld(*, resume: bool = True) -> int:
    """Install our SIGCHLD handler in front of the present one. Return INSTALL_*.

    `resume`: install it also if it has paused itself (see sigchld.h).
    """
    result = lib.ap_sigchld_install(resume)
    if result < 0:
        raise MemoryError
    return result


def restore_sigchld() -> bool:
    """Restore the handler that was there before ours. Return False if other code has replaced ours."""
    return lib.ap_sigchld_restore() == 1


def abandon_to_sigchld(pid: int) -> bool:
    """Have our SIGCHLD handler reap `pid`. Return False if it has too many children already."""
    return lib.ap_sigchld_abandon(pid) == 0


def claim_abandoned(pid: int) -> bool:
    """Undo `abandon_to_sigchld`. Return whether the handler had the child."""
    return lib.ap_sigchld_claim(pid) == 1


def reap_abandoned() -> int:
    """Reap the abandoned children that have ended. Return how many are left."""
    return lib.ap_sigchld_reap_abandoned()


def untrack_fd(fd: int) -> None:
    """Stop tracking `fd`, which other code has closed: forked children do not close their copy."""
    lib.ap_untrack_fd(fd)


def close_tracked_fd(fd: int) -> None:
    """Close a tracked descriptor, such as a reaper, a pidfd or a start gate. Forked children close their copies."""
    lib.ap_close_tracked_fd(fd)


def dup_tracked_fd(fd: int) -> int:
    """Return a tracked copy of a descriptor. EBADF; EMFILE: out of descriptors."""
    copy = os.dup(fd)
    lib.ap_track_fd(copy)
    return copy


# In a forked child: close the copies of tracked descriptors, restore SIGCHLD, and initialise the fork lock.
after_fork_in_child: Final[Callable[[], None]] = lib.ap_after_fork_in_child


BEHIND: Final = ", and behind it "
NOCLDWAIT: Final = " with SA_NOCLDWAIT"


def describe_sigchld() -> str:
    """Return what SIGCHLD is set to: "SIG_DFL", "SIG_IGN", "ours", or the owner of the handler.

    NOCLDWAIT follows if it is set. After "ours" follow BEHIND and what our handler has replaced, unless that is SIG_DFL
    without flags.
    """
    text = ffi.new("char[512]")
    lib.ap_sigchld_describe(text, 512)
    return ffi.string(text).decode(errors="replace")


# Return a mask (bit n - 1 for signal n) of the signals that have a handler, of Python or of a C library.
caught_signals: Final[Callable[[], int]] = lib.ap_caught_signals
# Return whether a signal is ignored: 1 or 0.
is_ignored: Final[Callable[[int], int]] = lib.ap_is_ignored
# Save, restore and recognise handlers of signals. The C contracts are in cffi_build/child.h.
keep_handler: Final[Callable[[int], None]] = lib.ap_keep_handler
put_back_handler: Final[Callable[[int], int]] = lib.ap_put_back_handler
is_handler_of_loop: Final[Callable[[int], int]] = lib.ap_is_handler_of_loop

ALL_SIGNALS: Final = (1 << 64) - 1


# Set the signal mask of this thread (bit n - 1 for signal n), and return the previous one. signal.pthread_sigmask makes sets
# of enum members: in a new process that takes longer than all the rest.
set_signal_mask: Final[Callable[[int], int]] = lib.ap_set_signal_mask


def set_pdeathsig(signal: int, gate: int) -> bool:
    """Have the kernel send `signal` when the thread that forked this process ends. Return False if the parent has ended.

    `gate` is a socket whose other end only the parent has. EINVAL: there is no such signal.
    """
    result = lib.ap_set_pdeathsig(signal, gate)
    if result < 0:
        raise error(-result, f"prctl(PR_SET_PDEATHSIG, {signal})")
    return bool(result)


FORK_SIBLING: Final = lib.AP_FORK_SIBLING


ChildMain = Callable[[int, int], object]
"""The function that a forked child calls, with its end of the start gate and the signal mask to set."""


def new_child() -> Any:
    """Return a new `ap_child`, of a child that is not forked."""
    return ffi.new("ap_child *", (0, -1, -1))


def fork_child(struct: Any, reaper: int, number: int, child_main: ChildMain, fork: Callable[[], int] | None) -> None:
    """Make a start gate and fork, by `fork` or by clone(2). `struct` has the results. See fork.h and clone.h."""
    failures: list[BaseException] = []
    result = lib.ap_child_fork(struct, reaper, number, 0 if fork is None else id(fork), id(child_main), id(failures))
    if result > 0:
        raise failures.pop()
    if result < 0:
        raise error(-result, "socketpair()" if -result in OUT_OF_DESCRIPTORS else "clone(CLONE_PIDFD)")


# Watch a child and release it from its start gate. Arguments: its struct, the reaper. Return 0 or -errno.
try_release: Final[Callable[[Any, int], int]] = lib.ap_child_release
# Kill and reap a child that is not watched, and close its start gate. The same arguments.
undo_child: Final[Callable[[Any, int], None]] = lib.ap_child_undo
close_gate: Final[Callable[[Any], None]] = lib.ap_child_close_gate
set_exit_code: Final[Callable[[int], None]] = lib.ap_set_exit_code
note_ready_fd: Final[Callable[[int], None]] = lib.ap_note_ready_fd
is_ready_fd: Final[Callable[[int], int]] = lib.ap_is_ready_fd


def fork_sibling(child_main: ChildMain, mask: int) -> tuple[int, int]:
    """Fork a sibling, a child of our parent, by clone(2). Return its pid and pidfd. It calls child_main(-1, mask)."""
    pid, pidfd = ffi.new("int *"), ffi.new("int *", -1)
    result = lib.ap_fork(FORK_SIBLING, id(child_main), -1, mask, pid, pidfd)
    if result < 0:
        raise error(-result, "clone(CLONE_PIDFD | CLONE_PARENT)")
    return pid[0], pidfd[0]


# The C contracts are in cffi_build/epolls.h.
is_expected_child: Final[Callable[[], int]] = lib.ap_is_expected_child
occupy: Final[Callable[[int], None]] = lib.ap_occupy
_detach_epolls: Final = lib.ap_detach_epolls

if lib.ap_hook_forks() < 0:
    raise MemoryError


def detach_epolls(probe: int) -> int:
    """Replace all inherited epoll descriptors by /dev/null. Return how many there were.

    Epolls that a fork hook has made in this process stay. `probe` is a descriptor that can be polled and is in no epoll.
    """
    count = _detach_epolls(probe)
    if count < 0:
        raise error(-count, "noting epoll descriptors")
    return count


def detach_all_epolls(probe: int) -> int:
    """Replace all epoll descriptors of this process by /dev/null, also those that it has made itself."""
    lib.ap_note_epolls(probe)
    return detach_epolls(probe)
