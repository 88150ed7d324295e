"""What another thread, or a signal, does in the very moment of a fork."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from aiopidfd import ChildStartError, afork
from aiopidfd._backends import sigchld_backend
from aiopidfd._kernel import syscalls
from aiopidfd._watch import registries

from ..conftest import LoopFactory, run_on
from ..helpers.seccomp import compile_c

# Python 3.12+ warns of it, and it is what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@contextlib.contextmanager
def held_by_another_thread(lock: Any) -> Any:
    holds, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            holds.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("lock", [registries._lock, sigchld_backend._lock], ids=["registries", "sigchld"])
def test_lock_held_by_another_thread_is_free_in_a_forked_child(lock: Any, loop_factory: LoopFactory) -> None:
    async def fork_once() -> int:
        async with await afork(lambda: 0) as child:  # so that the hooks are in place
            return await child.wait()

    assert run_on(loop_factory, fork_once()) == 0
    with held_by_another_thread(lock):
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(0 if lock.acquire(blocking=False) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


_LOCK_IN_C = """
import ctypes, os, signal, sys, threading, warnings
from aiopidfd._kernel import syscalls
warnings.simplefilter("ignore")  # of a fork beside a thread
os.register_at_fork(after_in_child=syscalls.after_fork_in_child)
(entered_read, entered), (go, go_write) = os.pipe(), os.pipe()
ctypes.CDLL(sys.argv[1]).hold_next(entered, go)
thread = threading.Thread(target=syscalls.install_sigchld)
thread.start()
os.read(entered_read, 1)  # it has the lock
pid = os.fork()
if pid == 0:
    signal.alarm(3)  # ends who waits for a lock that nobody will ever release
    syscalls.install_sigchld()
    syscalls.restore_sigchld()
    os._exit(7)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
os.write(go_write, b"x")
thread.join()
print(code)
"""


def test_lock_in_c_held_by_another_thread_is_free_in_a_forked_child() -> None:
    library = str(compile_c("holds.c", "-shared", "-fPIC", "-ldl"))
    command = [sys.executable, "-c", _LOCK_IN_C, library]
    preload = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), library]))
    done = subprocess.run(command, env={**os.environ, "LD_PRELOAD": preload}, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("7\n", "")


async def test_lock_of_forks_held_by_another_thread_is_free_in_a_forked_child(loop_factory: LoopFactory) -> None:
    forks, done = threading.Event(), threading.Event()
    real_fork = os.fork

    def fork() -> int:
        forks.set()
        done.wait()
        return real_fork()

    async def fork_once() -> int:
        return await (await afork(lambda: 3)).wait()

    def fork_in_child() -> int:
        os.fork = real_fork
        signal.alarm(10)  # ends who waits for a lock that nobody will ever release
        return run_on(loop_factory, fork_once())  # type: ignore[no-any-return]

    assert await fork_once() == 3  # so that the hooks are in place
    codes: list[int] = []
    os.fork = fork
    thread = threading.Thread(target=lambda: codes.append(run_on(loop_factory, fork_once())))
    try:
        thread.start()
        forks.wait()
        pid = real_fork()
        if pid == 0:
            try:
                os._exit(fork_in_child())
            finally:
                os._exit(2)
    finally:
        os.fork = real_fork
        done.set()
        thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert codes == [3]


def test_forks_of_two_threads_take_turns(loop_factory: LoopFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each child would hold the other one's gate. The first fork goes on when the second one is in line, or forks."""
    first_forks, second_has_come, second_forks = threading.Event(), threading.Event(), threading.Event()
    real_fork, real_fork_child, overlapped = os.fork, syscalls.fork_child, []

    def fork() -> int:
        if first_forks.is_set():
            second_forks.set()
        else:
            first_forks.set()
            assert second_has_come.wait(30)
            overlapped.append(second_forks.wait(0.2))  # it has nothing else to do but to fork
        return real_fork()

    def fork_child(*args: Any) -> None:
        if first_forks.is_set():
            second_has_come.set()
        real_fork_child(*args)

    async def fork_and_wait() -> int:
        return await (await afork(lambda: 3)).wait()

    codes: list[int] = []

    def run_second() -> None:
        first_forks.wait()
        codes.append(run_on(loop_factory, fork_and_wait()))

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(syscalls, "fork_child", fork_child)
    second = threading.Thread(target=run_second)
    second.start()
    codes.append(run_on(loop_factory, fork_and_wait()))
    second.join()
    assert codes == [3, 3]
    assert overlapped == [False]


async def test_signal_at_the_birth_of_a_child_is_not_heeded_before_it_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the child, as it does a moment later: the parent's handler must not run in there."""
    real_fork = os.fork
    heeded_read, heeded = os.pipe()

    def fork() -> int:
        pid = real_fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return pid

    before = signal.signal(signal.SIGUSR1, lambda *_: os.write(heeded, b"x"))
    monkeypatch.setattr(os, "fork", fork)
    try:
        with pytest.raises(ChildStartError) as caught:
            await afork(lambda: 0)
        assert caught.value.exit_status.returncode == -signal.SIGUSR1
        os.close(heeded)
        assert os.read(heeded_read, 1) == b""
    finally:
        signal.signal(signal.SIGUSR1, before)
        os.close(heeded_read)
