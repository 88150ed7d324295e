"""What the running kernel answers.

Each function tries one thing and returns the answer: "yes", the name of an errno, or what the thing is.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from aiopidfd._kernel import syscalls
from aiopidfd._kernel.threads import count_threads

from ..helpers.children import one_held
from ..helpers.seccomp import compile_c

CLONE_PIDFD = 0x1000
CLONE_CLEAR_SIGHAND = 0x100000000
SYS_IO_URING_SETUP = 425  # on every architecture but alpha, as is the next one
SYS_CLOSE_RANGE = 436


def answer(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    return "yes"


def clone3(flags: int = 0, exit_signal: int = signal.SIGCHLD) -> tuple[int, int]:
    """The pid and the pidfd of a new child. It exits with 1 if it has a handler for SIGUSR1."""
    library = ctypes.CDLL(str(compile_c("../kernels/since.c", "-shared", "-fPIC")))
    library.since_clone3.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.POINTER(ctypes.c_int)]
    pidfd = ctypes.c_int(-1)
    pid = library.since_clone3(flags | CLONE_PIDFD, exit_signal, ctypes.byref(pidfd))
    if pid < 0:
        raise OSError(-pid, os.strerror(-pid))
    return pid, pidfd.value


def reap(pidfd: int) -> int:
    """Wait for a child of any kind and close its pidfd. Return its wait status."""
    try:
        ended = syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED)
    finally:
        os.close(pidfd)
    assert ended is not None
    return ended.status


def signals_by_pidfd() -> str:
    with one_held() as child:
        pidfd = syscalls.open_pidfd(child.pid)
        said = answer(lambda: syscalls.send_signal(pidfd, signal.SIGTERM))
        assert said != "yes" or reap(pidfd) == signal.SIGTERM
    return said


def clones_with_pidfd() -> str:
    return answer(syscalls.can_recover_exit)


def opens_pidfd() -> str:
    return answer(lambda: os.close(syscalls.open_pidfd(os.getpid())))


def clones_by_clone3() -> str:
    return answer(lambda: reap(clone3()[1]))


def polls_zombie() -> str:
    """The events of an edge-triggered epoll inside another one, for a running child, a zombie and a reaped child."""
    said = []
    with one_held() as child, select.epoll() as reaper, select.epoll() as loop:
        pidfd = syscalls.open_pidfd(child.pid)
        reaper.register(pidfd, select.EPOLLIN | select.EPOLLET)
        loop.register(reaper, select.EPOLLIN)

        def look() -> None:
            woken = [fd for fd, _ in loop.poll(0)] == [reaper.fileno()]
            events = dict(reaper.poll(0)).get(pidfd, 0)
            assert woken is (events != 0)
            said.append({0: "-", select.EPOLLIN: "IN", select.EPOLLIN | select.EPOLLHUP: "IN|HUP"}[events])

        look()
        child.end_unreaped(0)
        look()
        look()
        os.waitpid(child.pid, 0)
        look()
        os.close(pidfd)
    return " ".join(said)


def waits_by_pidfd() -> str:
    def peek_and_reap() -> None:
        with one_held() as child:
            pidfd = syscalls.open_pidfd(child.pid)
            try:
                assert syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is None
                child.end_unreaped(3)
                for options in (os.WNOWAIT, os.WNOWAIT, 0):
                    ended = syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | options)
                    assert ended is not None
                    assert (ended.pid, ended.status) == (child.pid, 3 << 8)
                    assert any(ended.rusage)
                assert answer(lambda: syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)) == "ECHILD"
            finally:
                os.close(pidfd)

    return answer(peek_and_reap)


def clears_handlers() -> str:
    statuses = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        said = answer(lambda: statuses.extend([reap(clone3()[1]), reap(clone3(CLONE_CLEAR_SIGHAND)[1])]))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert said != "yes" or statuses == [1 << 8, 0]
    return said


def closes_range() -> str:
    read, write = os.pipe()
    os.close(write)
    call = ctypes.CDLL(None, use_errno=True).syscall
    if call(SYS_CLOSE_RANGE, read, read, 0) == 0:
        assert answer(lambda: fcntl.fcntl(read, fcntl.F_GETFD)) == "EBADF"
        return "yes"
    os.close(read)
    return errno.errorcode[ctypes.get_errno()]


def lists_worker_of_io_uring() -> str:
    """Whether the kernel lists a worker of io_uring among the threads of the process."""

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before, counted = threads(), count_threads()
    parameters = struct.pack("30I", 0, 0, 2, *[0] * 27)  # IORING_SETUP_SQPOLL: a worker at once
    ring = ctypes.CDLL(None, use_errno=True).syscall(SYS_IO_URING_SETUP, 1, ctypes.create_string_buffer(parameters))
    if ring < 0:
        pytest.skip(f"this process may not have an io_uring: {os.strerror(ctypes.get_errno())}")
    try:
        said = {0: "not listed", 1: "listed"}[threads() - before]
        eventually(lambda: count_threads() == counted)  # the worker sets its own name, by which we recognise it
        assert threads() - before == (said == "listed")
    finally:
        os.close(ring)
    eventually(lambda: threads() == before)
    return said


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def signals_group() -> str:
    read, write = os.pipe()
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "read x"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)], setpgroup=0)
    os.close(read)
    pidfd = syscalls.open_pidfd(pid)
    said = answer(lambda: syscalls.send_signal(pidfd, signal.SIGTERM, syscalls.PIDFD_SIGNAL_PROCESS_GROUP))
    os.close(write)
    status = reap(pidfd)
    assert status == (signal.SIGTERM if said == "yes" else 1 << 8)
    return said


def reports_exit() -> str:
    """The answer of PIDFD_GET_INFO for a child that another waitpid() reaped."""
    with one_held() as child:
        pidfd = syscalls.open_pidfd(child.pid)
        child.end_unreaped(3)
        os.waitpid(child.pid, 0)
        reported: list[int | None] = []
        said = answer(lambda: reported.append(syscalls.get_exit(pidfd)))
        os.close(pidfd)
    assert said != "yes" or reported == [3 << 8]
    return said


def reports_exit_of_zombie() -> str:
    with one_held() as child:
        pidfd = syscalls.open_pidfd(child.pid)
        child.end_unreaped(3)
        reported: list[int | None] = []
        said = answer(lambda: reported.append(syscalls.get_exit(pidfd)))
        os.close(pidfd)
    return "not yet" if reported == [None] else said


# These answers are the same on every kernel.


def keeps_child_without_signal() -> str:
    """Only __WALL finds a child without an exit signal, and the kernel does not reap it where SIGCHLD is ignored."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        _, pidfd = clone3(exit_signal=0)
        hidden = answer(lambda: os.waitpid(-1, os.WNOHANG))
        assert reap(pidfd) == 0
    finally:
        signal.signal(signal.SIGCHLD, before)
    return "kept" if hidden == "ECHILD" else hidden


def sibling_has_signal_of_its_maker() -> str:
    """A process without an exit signal makes siblings without one by CLONE_PARENT, as a fork server makes its workers."""
    made = ctypes.CDLL(str(compile_c("../kernels/since.c", "-shared", "-fPIC"))).since_sibling()
    assert made == 0, os.strerror(-made)
    hidden = answer(lambda: os.waitpid(-1, os.WNOHANG))
    os.waitpid(-1, 0x40000000)  # __WALL
    return "none" if hidden == "ECHILD" else hidden


def pidfd_of_reaped() -> str:
    """The answers of pidfd_open and pidfd_send_signal for a reaped child. Both succeed for a zombie."""
    with one_held() as child:
        child.end_unreaped(0)
        pidfd = syscalls.open_pidfd(child.pid)
        syscalls.send_signal(pidfd, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        answers = {answer(lambda: syscalls.send_signal(pidfd, 0)), answer(lambda: syscalls.open_pidfd(child.pid))}
        os.close(pidfd)
    return " ".join(answers)


def traced_child_is_hidden() -> str:
    """The answer of waitid for a child that another process still traces, although its pidfd is readable."""
    tracer = """
import ctypes, os, sys
libc, pid = ctypes.CDLL(None, use_errno=True), int(sys.argv[1])
if libc.ptrace(0x4206, pid, None, None):  # PTRACE_SEIZE
    print(os.strerror(ctypes.get_errno()), flush=True)
else:
    print("tracing", flush=True)
    sys.stdin.read()
    os.waitpid(pid, 0x40000000)
"""
    with one_held() as child:
        pidfd = syscalls.open_pidfd(child.pid)
        command = [sys.executable, "-c", tracer, str(child.pid)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            said = process.stdout.readline().strip()
            if said == "tracing":
                child.end(3)
                select.select([pidfd], [], [])
                found = syscalls.wait_id(syscalls.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
                said = "nothing" if found is None else f"status {found.status}"
            process.stdin.close()
            process.wait()
        if said == "nothing":
            assert reap(pidfd) == 3 << 8
        else:
            os.close(pidfd)
    if said == os.strerror(errno.EPERM):
        pytest.skip("this process may not trace another one")
    return said


def epoll_is_shared_after_fork() -> str:
    """Whose epoll a forked child changes by an inherited epoll descriptor."""
    read, write = os.pipe()
    with select.epoll() as epoll:
        pid = os.fork()
        if pid == 0:
            epoll.register(read, select.EPOLLIN)
            os._exit(0)
        os.waitpid(pid, 0)
        os.write(write, b"x")
        found = [fd for fd, _ in epoll.poll(0)]
    os.close(read)
    os.close(write)
    return "its parent's too" if found == [read] else "its own"


def counts_descriptors() -> str:
    """The meaning of the size of /proc/self/fd."""
    copies = [os.dup(0) for _ in range(3)]
    try:
        size = os.stat("/proc/self/fd").st_size
        open_now = len(os.listdir("/proc/self/fd")) - 1  # without that of listdir() itself
    finally:
        for fd in copies:
            os.close(fd)
    return "how many are open" if size == open_now else str(size)
