"""Others who reap our children: no exit is lost that the kernel can tell, none is told twice, no stranger is signalled."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aiopidfd import ExitStatus, PidfdWatcher, afork, wait
from aiopidfd._backends import lost_status, sigchld_backend
from aiopidfd._backends.pidfd_backend import PidfdBackend
from aiopidfd._kernel import syscalls
from aiopidfd._kernel.syscalls import can_recover_exit, error
from aiopidfd._watch import collector
from aiopidfd._watch.registries import registry_of

from ..conftest import BACKENDS, LoopFactory, children, run_on
from ..helpers.children import Held, Stranger, await_zombie, held, one_held, state_of, traced, undebugged_environment
from ..helpers.seccomp import compile_c, python_under_filter

IGNORE, NOCLDWAIT, REAP_ALL = range(3)  # as in thief.c
CULPRITS = {IGNORE: "SIGCHLD is ignored", NOCLDWAIT: "SA_NOCLDWAIT"}

# (status, pid, returncode, culprit)
CheckTold = Callable[[ExitStatus, int, int, str], None]


@pytest.fixture
def thief() -> Iterator[ctypes.CDLL]:
    """The functions of thief.c; what SIGCHLD was set to is put back afterwards."""
    library = ctypes.CDLL(str(compile_c("thief.c", "-shared", "-fPIC", "-pthread")))
    library.thief_save_sigchld()
    handler = signal.getsignal(signal.SIGCHLD)
    yield library
    signal.signal(signal.SIGCHLD, handler)
    library.thief_restore_sigchld()


@pytest.fixture(autouse=True)
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the SIGCHLD backend look after its handler often, and say each time that SIGCHLD was ignored."""
    monkeypatch.setattr(sigchld_backend, "_warned_of_ignored", False)
    monkeypatch.setattr(collector, "CHECK_INTERVAL_S", 0.05)
    monkeypatch.setattr(
        sigchld_backend, "_replaced", (0.0, "")
    )  # by whom it was replaced in the last test says nothing here


def lost_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged about lost statuses."""
    return [message for message in (record.getMessage() for record in caplog.records) if "lost" in message]


@pytest.fixture
def assert_told(backend: str, caplog: pytest.LogCaptureFixture) -> CheckTold:
    """Asserts that a stolen exit was told as this kernel allows, and if it was lost, that one warning says to whom."""

    def check(status: ExitStatus, pid: int, code: int, culprit: str) -> None:
        if backend == "pidfd" and can_recover_exit():
            assert (status.pid, status.returncode, status.source) == (pid, code, "recovered")
            assert lost_warnings(caplog) == []
        else:
            assert (status.pid, status.returncode, status.source) == (pid, 255, "lost")
            (message,) = lost_warnings(caplog)
            assert f"pid {pid}:" in message
            assert culprit in message

    return check


async def watched(pid: int) -> asyncio.Task[ExitStatus]:
    """A wait() that has begun."""
    waiting = asyncio.ensure_future(wait(pid))
    await asyncio.sleep(0)
    return waiting


async def drain() -> None:
    """Let the loop see everything that is ready now: each round polls its descriptors once."""
    for _ in range(5):
        await asyncio.sleep(0)


def end_stolen(child: Held, code: int) -> None:
    """End the child, and return once a thread in waitpid(-1) has reaped it."""
    reaped: list[int] = []
    child.end(code)
    thread = threading.Thread(target=lambda: reaped.append(os.waitpid(-1, 0)[0]))
    thread.start()
    thread.join()
    assert reaped == [child.pid]


def end_vanishing(child: Held, code: int) -> None:
    """End a child that somebody else reaps at once, and return when it is gone."""
    child.end(code)
    with contextlib.suppress(ChildProcessError):
        await_zombie(child.pid)
    while child.pid in children():  # for an instant after waitid has said ECHILD, if it is the kernel that reaps
        os.sched_yield()


# Who reaps, and who is told.


async def test_thread_that_reaps_everything(assert_told: CheckTold) -> None:
    with one_held() as child:
        waiting = await watched(child.pid)
        end_stolen(child, 42)
        assert_told(await waiting, child.pid, 42, "another thread or library")


async def test_signal_that_killed_a_stolen_child_is_told(assert_told: CheckTold) -> None:
    with one_held() as child:
        waiting = await watched(child.pid)
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        assert_told(await waiting, child.pid, -signal.SIGKILL, "another thread or library")


@pytest.mark.parametrize("when", ["before", "after"])
async def test_python_handler_that_reaps_everything(when: str, thief: ctypes.CDLL, assert_told: CheckTold) -> None:
    reaped: list[int] = []

    def reap_everything(number: int, frame: Any) -> None:
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                reaped.append(pid)

    with one_held() as child:
        if when == "before":
            signal.signal(signal.SIGCHLD, reap_everything)
        waiting = await watched(child.pid)
        if when == "after":
            signal.signal(signal.SIGCHLD, reap_everything)
        end_vanishing(child, 7)
        assert reaped == [child.pid]
        assert_told(await waiting, child.pid, 7, "the SIGCHLD handler <function test_python_handler")


@pytest.mark.parametrize("when", ["before", "after"])
async def test_c_handler_that_reaps_everything(when: str, thief: ctypes.CDLL, backend: str, assert_told: CheckTold) -> None:
    with one_held() as child:
        if when == "before":
            thief.thief_set_sigchld(REAP_ALL)
        waiting = await watched(child.pid)
        if when == "after":
            thief.thief_set_sigchld(REAP_ALL)
        end_vanishing(child, 8)
        assert_told(await waiting, child.pid, 8, f"the SIGCHLD handler in {thief._name}")


@pytest.mark.parametrize("how", [IGNORE, NOCLDWAIT])
async def test_kernel_that_reaps_since_before_the_child(
    how: int, thief: ctypes.CDLL, backend: str, caplog: pytest.LogCaptureFixture, assert_told: CheckTold
) -> None:
    thief.thief_set_sigchld(how)
    with one_held() as child:
        waiting = await watched(child.pid)
        if backend == "sigchld":  # its handler has taken the place of what made the kernel reap, and it has said so
            child.end(9)
            status = await waiting
            assert (status.returncode, status.source) == (9, "reaped")
            assert "other children of this process must be waited for" in caplog.text
        else:
            end_vanishing(child, 9)
            assert_told(await waiting, child.pid, 9, CULPRITS[how])


@pytest.mark.parametrize("how", [IGNORE, NOCLDWAIT])
async def test_kernel_that_reaps_since_the_child_is_watched(how: int, thief: ctypes.CDLL, assert_told: CheckTold) -> None:
    with one_held() as child:
        waiting = await watched(child.pid)
        thief.thief_set_sigchld(how)
        end_vanishing(child, 10)
        assert_told(await waiting, child.pid, 10, CULPRITS[how])


async def test_sigchld_ignored_from_python(thief: ctypes.CDLL, assert_told: CheckTold) -> None:
    with one_held() as child:
        waiting = await watched(child.pid)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        end_vanishing(child, 11)
        assert_told(await waiting, child.pid, 11, "SIGCHLD is ignored")


async def test_popen_that_polls_its_own_child(assert_told: CheckTold) -> None:
    process = subprocess.Popen(["/bin/sh", "-c", "read code; exit $code"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    waiting = await watched(process.pid)
    process.stdin.write(b"12\n")
    process.stdin.close()
    await_zombie(process.pid)
    assert process.poll() == 12
    assert_told(await waiting, process.pid, 12, "another thread or library")


def test_watchers_of_two_loops_in_two_threads(
    loop_factory: LoopFactory, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One of them reaps; both are told. By pid, the other one can only tell that it was too late."""
    watching = threading.Barrier(3, timeout=30)
    told: list[ExitStatus] = []

    async def watch(pid: int) -> None:
        waiting = await watched(pid)
        watching.wait()
        told.append(await waiting)

    with one_held() as child:
        threads = [threading.Thread(target=run_on, args=(loop_factory, watch(child.pid))) for _ in range(2)]
        for thread in threads:
            thread.start()
        watching.wait()
        child.end(13)
        for thread in threads:
            thread.join()
    sources = sorted(status.source for status in told)
    if backend == "pidfd" and can_recover_exit():
        assert [status.returncode for status in told] == [13, 13]
        assert sources == ["reaped", "recovered"]
    else:
        assert sorted(status.returncode or 0 for status in told) == [13, 255]
        assert sources == ["lost", "reaped"]
        assert len(lost_warnings(caplog)) == 1


async def test_every_kind_of_observer_is_told_of_a_stolen_exit_once(assert_told: CheckTold) -> None:
    calls: list[int] = []
    child = await afork(signal.pause, pdeathsig=signal.SIGKILL)
    PidfdWatcher().add_child_handler(child.pid, lambda pid, code: calls.append(code))
    waiting, peeking = await watched(child.pid), asyncio.ensure_future(wait(child.pid, reap=False))
    await asyncio.sleep(0)
    child.terminate()
    os.waitpid(child.pid, 0)
    code = await child.wait()
    await drain()
    assert calls == [code]
    status = child.exit_status
    assert status is await waiting is await peeking
    assert status is not None
    assert_told(status, child.pid, -signal.SIGTERM, "another thread or library")


async def test_half_of_many_children_are_stolen(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    """More than one batch of them, in one round of the loop."""
    with held(150) as all_of_them:
        waiting = [await watched(child.pid) for child in all_of_them]
        for number, child in enumerate(all_of_them):
            child.end_unreaped(number)
            if number % 2:
                os.waitpid(child.pid, 0)
        statuses = await asyncio.gather(*waiting)
    recovers = backend == "pidfd" and can_recover_exit()
    expected = [number if recovers or not number % 2 else 255 for number in range(150)]
    assert [status.returncode for status in statuses] == expected
    assert len(lost_warnings(caplog)) == (0 if recovers else 75)


# What the warning says.


def test_harmless_handler_is_not_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    """libuv's, which asks for its own children only."""
    action = "ours, and behind it a handler in /x/site-packages/uvloop/loop.so"
    monkeypatch.setattr(syscalls, "describe_sigchld", lambda: action)
    assert "another thread" in lost_status.find_thief()


# Older kernels, which do not tell the status of a reaped process, and the instant before a kernel tells it.

_STOLEN = """
import asyncio, logging, os, sys
import aiopidfd
logging.basicConfig(stream=sys.stdout, format="%(message)s")
async def main():
    read, write = os.pipe()
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "read x; exit 7"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
    calls = []
    aiopidfd.PidfdWatcher().add_child_handler(pid, lambda pid, code: calls.append(code))
    waiting = asyncio.ensure_future(aiopidfd.wait(pid))
    await asyncio.sleep(0)
    os.write(write, b"\\n")
    os.waitpid(pid, 0)
    status = await asyncio.wait_for(waiting, 10)
    for _ in range(5):
        await asyncio.sleep(0)
    print(status.returncode, status.source, calls, pid)
LOOP
loop.run_until_complete(main())
loop.close()
"""

_WITHOUT_WAITID = """
import asyncio, os
from aiopidfd._watch.registries import registry_of
async def main():
    loop = asyncio.get_running_loop()
    read, write = os.pipe()
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "read x; exit 7"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
    told = loop.create_future()
    child = registry_of(loop).observe(pid, told, told.set_result, check=False)
    os.write(write, b"\\n")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not told.done() and child.end is None  # nobody has reaped it, so nobody can know
    os.waitpid(pid, 0)
    status = await asyncio.wait_for(told, 10)
    print(status.returncode, status.source)
LOOP
loop.run_until_complete(main())
loop.close()
"""


def on_loop(program: str, loop_factory: LoopFactory) -> str:
    """The program, with its loop made by `loop_factory`."""
    return program.replace("LOOP", f"import {loop_factory.__module__} as m; loop = m.{loop_factory.__qualname__}()")


@pytest.mark.parametrize("answer", ["ENOTTY", "EINVAL", "ESRCH"])  # before Linux 6.11, 6.13, 6.15
def test_older_kernel_loses_a_stolen_status_at_once_and_says_so(
    answer: str, loop_factory: LoopFactory, backend: str
) -> None:
    if backend != "pidfd":
        pytest.skip("the filter is over a call on pidfds")
    output = python_under_filter(f"pidfd_get_info={answer}", on_loop(_STOLEN, loop_factory))
    warning, told = output.splitlines()
    returncode, source, calls, pid = told.split()
    assert (returncode, source, calls) == ("255", "lost", "[255]")
    assert warning.startswith(f"child process pid {pid}: ")
    assert "another thread or library" in warning


def test_status_that_is_not_published_yet_is_waited_for(loop_factory: LoopFactory, backend: str) -> None:
    """The instant between a reap and its publication, in slow motion: waitid says ECHILD, the kernel says nothing yet."""
    if backend != "pidfd" or not can_recover_exit():
        pytest.skip("there is nothing to wait for here")
    output = python_under_filter(f"waitid_pidfd={errno.ECHILD}", on_loop(_WITHOUT_WAITID, loop_factory))
    assert output == "7 recovered\n"


@pytest.mark.parametrize(("early", "result"), [(0, 1), (1, 1), (100, -errno.ESRCH)])
def test_status_that_the_kernel_is_about_to_publish_is_asked_for_again(early: int, result: int) -> None:
    """ESRCH may mean an older kernel, or that the process was reaped while the kernel looked: once more tells them apart."""
    if BACKENDS[0] != "pidfd" or not can_recover_exit():
        pytest.skip("there is nothing to recover here")
    library = ctypes.CDLL(str(compile_c("early.c", "-shared", "-fPIC")))
    status = ctypes.c_int(-1)
    with one_held() as child:
        pidfd = syscalls.open_pidfd(child.pid)
        child.end_unreaped(18)
        assert library.ap_pidfd_get_exit(pidfd, ctypes.byref(status)) == 0
        os.waitpid(child.pid, 0)
        ctypes.c_int.in_dll(library, "too_early").value = early
        assert library.ap_pidfd_get_exit(pidfd, ctypes.byref(status)) == result
        os.close(pidfd)
    assert status.value == (18 << 8 if result == 1 else -1)


async def test_stranger_s_status_is_told_when_its_zombie_is_reaped(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "pidfd" or not can_recover_exit():
        pytest.skip("a stranger's status cannot be known here")
    monkeypatch.setattr(collector, "STRANGER_GRACE_S", 60.0)
    with Stranger() as stranger:
        waiting = await watched(stranger.pid)
        pidfd = os.pidfd_open(stranger.pid)
        stranger.tell("end")
        select.select([pidfd], [], [])
        os.close(pidfd)
        await drain()
        assert not waiting.done()
        stranger.tell("reap")
        status = await waiting
    assert (status.returncode, status.source) == (11, "recovered")


# Signals after the end, and numbers that are used again.


@pytest.fixture
def recycle(thief: ctypes.CDLL) -> Iterator[Callable[[int], int]]:
    """Makes a new child with the number of one that was reaped; returns what to write its exit code to."""
    pipes: list[int] = []
    pids: list[int] = []

    def make(pid: int) -> int:
        read, write = os.pipe()
        pipes.append(write)
        made = thief.thief_run_as(pid, read, b"read code; exit $code")
        os.close(read)
        if made in (-errno.EPERM, -errno.ENOSYS, -errno.EINVAL):
            pytest.skip(f"the number of a process cannot be chosen here: {os.strerror(-made)}")
        assert made == pid
        pids.append(pid)
        return write

    yield make
    for pipe in pipes:
        os.close(pipe)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):  # reaped by the test
            os.waitpid(pid, 0)


async def test_signal_does_not_reach_the_next_process_of_that_number(
    backend: str, caplog: pytest.LogCaptureFixture, recycle: Callable[[int], int]
) -> None:
    """Neither before the loop has heard of the end, nor after."""
    if backend != "pidfd":
        pytest.skip("by pid the two cannot be told apart")
    child = await afork(signal.pause, pdeathsig=signal.SIGKILL)
    os.kill(child.pid, signal.SIGKILL)
    os.waitpid(child.pid, 0)
    order = recycle(child.pid)
    child.send_signal(signal.SIGTERM)
    child.kill()
    await child.wait()
    child.kill()
    warned = [record.getMessage() for record in caplog.records if "not sent" in record.getMessage()]
    assert warned == [f"signal {sig} not sent: child process {child.pid} has ended" for sig in (15, 9, 9)]
    os.write(order, b"3\n")
    assert os.waitpid(child.pid, 0)[1] == 3 << 8


@pytest.mark.parametrize("spawned", [False, True])
async def test_next_child_of_the_same_number_is_not_mistaken_for_the_last(
    spawned: bool, backend: str, recycle: Callable[[int], int]
) -> None:
    """The first was stolen, and the loop has not heard of it when the second is watched."""
    if backend != "pidfd" or not can_recover_exit():
        pytest.skip("by pid the two cannot be told apart")
    registry = registry_of(asyncio.get_running_loop())
    told: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
    with held(100) as others, one_held() as first:
        waiting, *also_waiting = [await watched(child.pid) for child in (first, *others)]
        for child in others:  # so that the first is not in the first batch
            child.end_unreaped(1)
        first.end(5)
        assert os.waitpid(first.pid, 0) == (first.pid, 5 << 8)
        order = recycle(first.pid)
        if spawned:
            registry.observe_spawned(first.pid, registry._reaper.add(first.pid, 0), told, told.set_result)
        else:
            registry.observe(first.pid, told, told.set_result)
        assert (await waiting).returncode == 5
        await drain()
        assert not told.done()
        os.write(order, b"6\n")
        assert (await told).returncode == 6
        assert [(await one).returncode for one in also_waiting] == [1] * 100


async def test_stolen_child_can_still_be_observed_until_it_is_told(assert_told: CheckTold) -> None:
    """Its number is nobody's yet."""
    told: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
    with one_held() as child:
        waiting = await watched(child.pid)
        end_stolen(child, 5)
        registry_of(asyncio.get_running_loop()).observe(child.pid, told, told.set_result)
        assert await waiting is await told
        assert_told(await told, child.pid, 5, "another thread or library")


# A tracer between the child and us.


async def test_traced_child_is_told_when_the_tracer_lets_go() -> None:
    """Its pidfd is readable and there is nothing to reap: that neither blocks the loop nor keeps it busy."""
    with one_held() as child, traced(child.pid) as tracer:
        waiting = await watched(child.pid)
        child.end(14)
        while state_of(child.pid) != "Z":
            await asyncio.sleep(0)
        await drain()
        poll = select.poll()
        poll.register(registry_of(asyncio.get_running_loop())._reaper.fd, select.POLLIN)
        assert poll.poll(0) == []  # or the loop would look again at once, and again
        assert not waiting.done()
        tracer.let_go()
        status = await waiting
        assert (status.returncode, status.source) == (14, "reaped")


# Out of descriptors.


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[int]:
    """Lower RLIMIT_NOFILE so that exactly `count` more descriptors can be opened; give the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(count + 1)]
    for fd in free:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], hard))
    try:
        yield free[count]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_children_without_a_descriptor_are_watched_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AIOPIDFD_BACKEND", "auto")
    with held(6) as all_of_them:
        waiting = [await watched(all_of_them[0].pid)]
        with descriptors_left(0) as limit:
            waiting += [await watched(child.pid) for child in all_of_them[1:3]]
            registry = registry_of(asyncio.get_running_loop())
            assert [registry._children[child.pid].backend.name for child in all_of_them[:3]] in (
                ["pidfd", "sigchld", "sigchld"],
                ["sigchld"] * 3,
            )
            all_of_them[1].end(1)
            assert (await waiting[1]).returncode == 1
        waiting += [await watched(child.pid) for child in all_of_them[3:]]
        for number, child in enumerate(all_of_them):
            if number != 1:
                child.end(number)
        assert [(await one).returncode for one in waiting] == list(range(6))
    if BACKENDS[0] == "pidfd":
        (message,) = (record.getMessage() for record in caplog.records)
        assert "RLIMIT_NOFILE" in message
        assert f"(soft limit {limit})" in message


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
async def test_shortage_concerns_one_child_only(
    code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if BACKENDS[0] != "pidfd":
        pytest.skip("pidfds are forbidden here")
    monkeypatch.setenv("AIOPIDFD_BACKEND", "auto")

    def fail(self: PidfdBackend, pid: int, flags: int) -> int:
        raise error(code, f"cannot watch pid {pid}")

    with held(2) as (one, two):
        with monkeypatch.context() as patched:
            patched.setattr(PidfdBackend, "add", fail)
            waiting = [await watched(one.pid)]
        waiting.append(await watched(two.pid))
        registry = registry_of(asyncio.get_running_loop())
        assert [registry._children[child.pid].backend.name for child in (one, two)] == ["sigchld", "pidfd"]
        one.end(1)
        two.end(2)
        assert [(await one).returncode for one in waiting] == [1, 2]
    assert "out of descriptors" in caplog.text
    assert ("RLIMIT_NOFILE" if code == errno.EMFILE else "fs.file-max") in caplog.text


@pytest.mark.parametrize("left", [0, 1])
async def test_afork_without_descriptors_fails_before_the_fork(left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    registry_of(asyncio.get_running_loop())
    before = children()
    with descriptors_left(left), monkeypatch.context() as patched:
        patched.setattr(os, "fork", lambda: pytest.fail("forked"))
        with pytest.raises(OSError, match="RLIMIT_NOFILE"):
            await afork(signal.pause, pdeathsig=signal.SIGKILL)
    assert children() == before
    async with await afork(signal.pause, pdeathsig=signal.SIGKILL) as child:  # nothing is broken
        assert child.returncode is None


async def test_afork_with_the_last_descriptors_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for the gate, none for a pidfd."""
    monkeypatch.setenv("AIOPIDFD_BACKEND", "auto")
    registry_of(asyncio.get_running_loop())
    with descriptors_left(2):
        child = await afork(lambda: 15)
        assert await child.wait() == 15


async def test_subprocess_without_a_descriptor_for_its_pidfd_is_watched() -> None:
    """On whatever loop, by way of our own subprocess_exec."""
    watcher = PidfdWatcher()
    watcher.attach_loop(asyncio.get_running_loop())
    registry_of(asyncio.get_running_loop())
    try:
        with open(os.devnull, "r+b") as null:
            for left in range(12):  # somewhere in here there is enough to start it, and not enough for more
                with descriptors_left(left):
                    try:
                        process = await asyncio.create_subprocess_exec(
                            "/bin/sh", "-c", "exit 16", stdin=null, stdout=null, stderr=null
                        )
                    except OSError as exc:
                        assert os.strerror(errno.EMFILE) in str(exc) or "RLIMIT_NOFILE" in str(exc)  # noqa: PT017 - some succeed
                    else:
                        assert await process.wait() == 16
    finally:
        watcher.close()


# Loops, threads, and the end of the process.


def test_many_loops_in_many_threads_watch_and_fork_at_once(loop_factory: LoopFactory, backend: str) -> None:
    results: list[list[int | None]] = []

    async def work() -> None:
        with held(20) as some:
            waiting = [await watched(child.pid) for child in some]
            forked = []
            for number in range(5):
                forked.append(await afork(lambda number=number: 100 + number))  # type: ignore[misc] # mypy cannot infer it
                some[number].end(number)
            for number in range(5, 20):
                some[number].end(number)
            results.append([(await one).returncode for one in waiting] + [await child.wait() for child in forked])

    threads = [threading.Thread(target=run_on, args=(loop_factory, work())) for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12+ warns of fork beside threads; that is the test
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [[*range(20), *range(100, 105)]] * 4


def test_thief_after_the_loop_is_closed_harms_nobody(loop_factory: LoopFactory) -> None:
    """The handler that we leave behind to reap the child finds it gone; the next loop works."""

    async def begin(pid: int) -> None:
        PidfdWatcher().add_child_handler(pid, print)

    async def finish(child: Held) -> int | None:
        waiting = await watched(child.pid)
        child.end(17)
        return (await waiting).returncode

    with held(2) as (one, two):
        run_on(loop_factory, begin(one.pid))
        one.end(0)
        with contextlib.suppress(ChildProcessError):  # whoever is faster
            os.waitpid(one.pid, 0)
        assert run_on(loop_factory, finish(two)) == 17


_EXITS = {
    "loop closed": "loop.run_until_complete(main())\nloop.close()",
    "loop left open": "loop.run_until_complete(main())",
    "SystemExit in the loop": "async def exit():\n    await main()\n    sys.exit(0)\nloop.run_until_complete(exit())",
}


@pytest.mark.parametrize("end", _EXITS.values(), ids=_EXITS.keys())
def test_exit_of_the_interpreter_with_children_alive_is_silent(end: str, loop_factory: LoopFactory, backend: str) -> None:
    """The children outlive it: they wait for an end of file that its death brings."""
    program = on_loop(
        f"""
import asyncio, os, sys
import aiopidfd
read, write = os.pipe()
kept = []
def sleep():
    os.close(write)
    os.read(read, 1)
async def main():
    for _ in range(3):
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", "read x"], {{}}, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
        aiopidfd.PidfdWatcher().add_child_handler(pid, print)
        kept.append(asyncio.ensure_future(aiopidfd.wait(pid)))
    child = await aiopidfd.afork(sleep)
    child.detach()
    await asyncio.sleep(0)
    for waiting in kept:
        waiting.cancel()
    await asyncio.gather(*kept, return_exceptions=True)
LOOP
{end}
""",
        loop_factory,
    )
    command, environment = [sys.executable, "-c", program], undebugged_environment()
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


async def test_loop_s_own_subprocesses_beside_watched_children() -> None:
    """On uvloop, libuv's: its SIGCHLD handler comes and goes with them."""
    with held(3) as all_of_them:
        for number, child in enumerate(all_of_them):
            waiting = await watched(child.pid)
            process = await asyncio.create_subprocess_exec("/bin/sh", "-c", f"exit {20 + number}")
            child.end(number)
            assert (await waiting).returncode == number
            assert await process.wait() == 20 + number
