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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from .._ext import ffi, lib
from . import proc
from .exit_status import RUSAGE_SIZE

P_PID: Final = 1
P_PIDFD: Final = 3
PIDFD_SIGNAL_PROCESS_GROUP: Final = 4  # Linux 6.9; EINVAL before

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


def signal_error(code: int, call: str) -> OSError:
    """Make the OSError for `call`, which was to signal a process, having failed with errno `code`."""
    if code == errno.EPERM:
        return OSError(code, f"{call}: {os.strerror(code)}: it runs as another user (or a seccomp filter refuses)")
    return error(code, call)


def open_pidfd(pid: int) -> int:
    """Return a new pidfd for `pid`, close-on-exec. ESRCH if it is gone. See pidfd_open(2)."""
    fd = lib.ap_pidfd_open(pid)
    if fd < 0:
        raise error(-fd, f"pidfd_open(pid {pid})")
    return fd


# Return the inode number of a pidfd, or of a process, which is its own and no other's (Linux 6.9); 0 if there is none.
pidfd_inode: Final[Callable[[int], int]] = lib.ap_pidfd_inode
pid_inode: Final[Callable[[int], int]] = lib.ap_pid_inode


def send_signal(pidfd: int, signal: int, flags: int = 0) -> None:
    """Signal the process behind `pidfd` and no other. ESRCH once it was reaped. See pidfd_send_signal(2)."""
    result = lib.ap_pidfd_send_signal(pidfd, signal, flags)
    if result < 0:
        raise signal_error(-result, f"pidfd_send_signal(signal {signal})")


class Exit(NamedTuple):
    """What a single waitid call has told: as the C side writes it."""

    pid: int
    status: int
    source: int
    rusage: bytes


RECORD: Final = struct.Struct(f"@4i{RUSAGE_SIZE}s")
if RECORD.size != ffi.sizeof("ap_exit"):
    raise ImportError("aiopidfd._ext was built for another architecture; install aiopidfd anew")


def wait_id(idtype: int, id_: int, options: int) -> Exit | None:
    """Wait as waitid(2) does, with rusage; None if WNOHANG found nothing. ECHILD: no such child."""
    ended = ffi.new("ap_exit *")
    result = lib.ap_waitid(idtype, id_, options, ended)
    if result < 0:
        raise error(-result, f"waitid({'pidfd' if idtype == P_PIDFD else 'pid'} {id_})")
    if result == 0:
        return None
    pid, _, status, source, rusage = RECORD.unpack(ffi.buffer(ended))
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


def get_pid(pidfd: int) -> int | None:
    """Return the pid that the process behind `pidfd` has in our PID namespace; 0 if it was reaped, has none, or is none.

    By PIDFD_GET_INFO (Linux 6.13), else by a /proc of our namespace; None where there is neither.
    """
    pid = int(lib.ap_pidfd_get_pid(pidfd))
    if pid > 0:
        return pid
    if pid in (-errno.ESRCH, -errno.EREMOTE):
        return 0
    return proc.read_pid(pidfd)  # ENOTTY, EINVAL: no pidfd, or an older kernel. ENOSYS, EPERM, EACCES: a filter


def can_recover_exit() -> bool:
    """Return whether the status of a child that somebody else reaped can be had here, found out by trying.

    OSError: clone(2) with CLONE_PIDFD, which it tries this with, is not to be had (ENOSYS: Linux before 5.2; or a filter).
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


_join: Final = b"\0".join  # the last one's NUL is that which each `bytes` has at its end


# Return a new `ap_birth`, of no program.
new_birth: Final[Callable[[], Any]] = partial(ffi.new, ffi.typeof("ap_birth *"))


def spawn(
    birth: Any,
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
    """Start a program, note it in `birth`, and hold its pidfd in the reaper of that descriptor.

    The C contract, and what each argument means, is in cffi_build/spawn.h.

    No string may hold a NUL byte. Returns 0 and STEP_PARENT. If that fails: the errno and the step (STEP_*) that failed;
    then there is no child.
    """
    result = lib.ap_spawn(
        birth,
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
    """Return the descriptor that our SIGCHLD handler wakes, one for the process. EMFILE, ENFILE: out of descriptors."""
    fd = lib.ap_sigchld_open()
    if fd < 0:
        raise error(-fd, "eventfd()")
    return fd


def simulate_sigchld(pid: int) -> None:
    """Do what our SIGCHLD handler does when a signal names `pid` as ended: wake every loop that watches by SIGCHLD."""
    lib.ap_sigchld_add_name(pid)


INSTALL_UNCHANGED: Final = lib.AP_INSTALL_UNCHANGED
INSTALL_DONE: Final = lib.AP_INSTALL_DONE
INSTALL_RESUMED: Final = lib.AP_INSTALL_RESUMED


def install_sigchld(*, resume: bool = True) -> int:
    """Put our SIGCHLD handler in front of whoever is there now; return INSTALL_*.

    `resume`: also if it has paused itself, as sigchld.h says.
    """
    result = lib.ap_sigchld_install(resume)
    if result < 0:
        raise MemoryError
    return result


def restore_sigchld() -> bool:
    """Put back who was there before our SIGCHLD handler; return False if somebody else has replaced it."""
    return lib.ap_sigchld_restore() == 1


def abandon_to_sigchld(pid: int) -> bool:
    """Have our SIGCHLD handler reap `pid`; return False if it has too many already."""
    return lib.ap_sigchld_abandon(pid) == 0


def claim_abandoned(pid: int) -> bool:
    """Take back `abandon_to_sigchld`; return whether there was anything to take back."""
    return lib.ap_sigchld_claim(pid) == 1


def reap_abandoned() -> int:
    """Reap those abandoned children that have ended; return how many are left."""
    return lib.ap_sigchld_reap_abandoned()


def untrack_fd(fd: int) -> None:
    """Have forked children not close their copy of `fd`: it was closed by somebody else."""
    lib.ap_untrack_fd(fd)


def close_tracked_fd(fd: int) -> None:
    """Close a descriptor of which a forked child would close its copy: a reaper, a pidfd in it, a gate."""
    lib.ap_close_tracked_fd(fd)


def dup_tracked_fd(fd: int) -> int:
    """Return a copy of a descriptor, to be closed by `close_tracked_fd`. EBADF; EMFILE: out of descriptors."""
    copy = os.dup(fd)
    lib.ap_track_fd(copy)
    return copy


# In a forked child: close the copies of tracked descriptors, put SIGCHLD back, and make the fork lock new. Neither this nor
# the next few are functions of Python's, whose pages a newly forked child would have to copy.
after_fork_in_child: Final[Callable[[], None]] = lib.ap_after_fork_in_child


BEHIND: Final = ", and behind it "
NOCLDWAIT: Final = " with SA_NOCLDWAIT"


def describe_sigchld() -> str:
    """Say what SIGCHLD is set to: "SIG_DFL", "SIG_IGN", "ours", or whose handler it is, and NOCLDWAIT if that is on.

    After "ours" there is BEHIND and what ours has replaced, unless that is a plain SIG_DFL.
    """
    text = ffi.new("char[512]")
    lib.ap_sigchld_describe(text, 512)
    return ffi.string(text).decode(errors="replace")


# Return a mask (bit n - 1 for signal n) of the signals that have a handler in this process, Python's or a C library's.
caught_signals: Final[Callable[[], int]] = lib.ap_caught_signals
# Return whether a signal is ignored: 1 or 0.
is_ignored: Final[Callable[[int], int]] = lib.ap_is_ignored
# Whose handler a signal has. The C contracts are in cffi_build/child.h.
keep_handler: Final[Callable[[int], None]] = lib.ap_keep_handler
put_back_handler: Final[Callable[[int], int]] = lib.ap_put_back_handler
is_handler_of_loop: Final[Callable[[int], int]] = lib.ap_is_handler_of_loop

ALL_SIGNALS: Final = (1 << 64) - 1


# Block the signals in a mask (bit n - 1 for signal n), and no others, in this thread; return what it was. As
# signal.pthread_sigmask, without its sets of enum members: in a new process they take longer than all the rest.
set_signal_mask: Final[Callable[[int], int]] = lib.ap_set_signal_mask


def set_pdeathsig(signal: int, gate: int) -> bool:
    """Have `signal` sent to this process when the thread that forked it ends; return False if its process has died already.

    `gate` is a socket whose other end only the parent holds. EINVAL: no such signal.
    """
    result = lib.ap_set_pdeathsig(signal, gate)
    if result < 0:
        raise error(-result, f"prctl(PR_SET_PDEATHSIG, {signal})")
    return bool(result)


FORK_SIBLING: Final = lib.AP_FORK_SIBLING


ChildMain = Callable[[int, int], object]
"""What a forked child calls: with its end of its gate, and the signal mask that it is to have."""


def new_child() -> Any:
    """Return a new `ap_child`, of no child."""
    return ffi.new("ap_child *", (0, -1, -1))


def fork_child(struct: Any, reaper: int, number: int, child_main: ChildMain, fork: Callable[[], int] | None) -> None:
    """Make a gate and fork, by `fork` or else by clone(2), as fork.h and clone.h say; what is made is in `struct`."""
    failures: list[BaseException] = []
    result = lib.ap_child_fork(struct, reaper, number, 0 if fork is None else id(fork), id(child_main), id(failures))
    if result > 0:
        raise failures.pop()
    if result < 0:
        raise error(-result, "socketpair()" if -result in OUT_OF_DESCRIPTORS else "clone(CLONE_PIDFD)")


# Watch a child and let it out of its gate; return minus the errno if that cannot be done. Arguments: its struct, the reaper.
try_release: Final[Callable[[Any, int], int]] = lib.ap_child_release
# Kill and reap a child that nobody watches, and close its gate. The same arguments.
undo_child: Final[Callable[[Any, int], None]] = lib.ap_child_undo
close_gate: Final[Callable[[Any], None]] = lib.ap_child_close_gate
set_exit_code: Final[Callable[[int], None]] = lib.ap_set_exit_code
note_ready_fd: Final[Callable[[int], None]] = lib.ap_note_ready_fd
is_ready_fd: Final[Callable[[int], int]] = lib.ap_is_ready_fd


def fork_sibling(child_main: ChildMain, mask: int) -> tuple[int, int]:
    """Fork a child of our parent's by clone(2), return its pid and pidfd. The child calls child_main(-1, mask)."""
    pid, pidfd = ffi.new("int *"), ffi.new("int *", -1)
    result = lib.ap_fork(FORK_SIBLING, id(child_main), -1, mask, pid, pidfd)
    if result < 0:
        raise error(-result, "clone(CLONE_PIDFD | CLONE_PARENT)")
    return pid[0], pidfd[0]


# The C contracts are in cffi_build/epolls.h. Looked up here: what cffi makes at the first use of a function, each forked
# child would make anew.
is_expected_child: Final[Callable[[], int]] = lib.ap_is_expected_child
occupy: Final[Callable[[int], None]] = lib.ap_occupy
_detach_epolls: Final = lib.ap_detach_epolls

if lib.ap_hook_forks() < 0:
    raise MemoryError


def detach_epolls(probe: int) -> int:
    """Replace every inherited epoll descriptor of this process by /dev/null; return how many there were.

    One that a fork hook has made in this process stays. `probe` is a descriptor that can be polled and is in none of them.
    """
    count = _detach_epolls(probe)
    if count < 0:
        raise error(-count, "noting epoll descriptors")
    return count


def detach_all_epolls(probe: int) -> int:
    """Do so with every epoll descriptor that this process has, wherever it has it from."""
    lib.ap_note_epolls(probe)
    return detach_epolls(probe)
