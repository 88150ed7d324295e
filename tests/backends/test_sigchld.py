"""The SIGCHLD backend: its handler, whoever else handles SIGCHLD, and whoever else reaps."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aiopidfd import PidfdWatcher, afork, wait
from aiopidfd._backends import backend, sigchld_backend
from aiopidfd._fork.handle import PosixChildProcess
from aiopidfd._kernel import syscalls
from aiopidfd._kernel.exit_status import ExitStatus
from aiopidfd._kernel.syscalls import describe_sigchld
from aiopidfd._watch import collector
from aiopidfd._watch.registries import registry_of

from ..conftest import LoopFactory, run_on
from ..helpers.children import Held, Stranger, await_zombie, held, one_held
from ..helpers.seccomp import compile_c

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment] # tests of it are skipped, with a reason

BACKENDS = ["sigchld"]  # for conftest

# An exit that no signal has told is found by the check once a second; the rest is for a busy machine.
FOUND_BY_CHECK_S = 2.5

needs_uvloop = pytest.mark.skipif(uvloop is None, reason="uvloop is not installed")


@pytest.fixture(autouse=True)
def sigchld_at_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start from SIG_DFL and return to it, whatever the test does."""
    monkeypatch.setenv(backend.ENVIRONMENT, "sigchld")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@pytest.fixture
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put off the check once a second: what is seen now, the handler has told."""
    monkeypatch.setattr(collector, "CHECK_INTERVAL_S", 3600.0)


@pytest.fixture
def handlers() -> Any:
    """Handlers in C: 0 and 1 call whoever was there before them, 2 and 3 do not."""
    return ctypes.CDLL(str(compile_c("handlers.c", "-shared", "-fPIC")))


class Noted:
    """A Python handler that counts its calls, and can be awaited."""

    def __init__(self) -> None:
        self.calls = 0
        self.called = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self, number: int, frame: object) -> None:
        self.calls += 1
        self._loop.call_soon_threadsafe(self.called.set)


async def watch(*children: Held) -> list[asyncio.Task[ExitStatus]]:
    """Have the children watched; return what waits for each. Nothing of what was signalled before is still to be heeded."""
    tasks = [asyncio.ensure_future(wait(child.pid)) for child in children]
    for _ in range(5):
        await asyncio.sleep(0)  # a new reaper is woken once for all wakes before it
    return tasks


async def watch_one(child: Held) -> asyncio.Task[ExitStatus]:
    (task,) = await watch(child)
    return task


def is_in_front() -> bool:
    """Whether SIGCHLD calls our handler first."""
    return describe_sigchld().startswith("ours")


# The handler's coming and going


async def test_handler_comes_with_the_first_child_and_goes_with_the_last() -> None:
    with held(2) as (one, two):
        first = await watch_one(one)
        assert describe_sigchld() == "ours"
        second = await watch_one(two)
        one.end(1)
        assert (await first).returncode == 1
        assert describe_sigchld() == "ours"
        two.end(2)
        assert (await second).returncode == 2
        assert describe_sigchld() == "SIG_DFL"


async def test_child_that_was_dead_before_it_was_watched_is_reported_without_a_check(no_checks: None) -> None:
    with one_held() as child:
        child.end_unreaped(3)
        assert (await asyncio.wait_for(wait(child.pid), 10)).returncode == 3


async def test_zombie_that_was_left_and_then_is_to_be_reaped_is_reported_without_a_check(no_checks: None) -> None:
    """The first observer leaves the zombie; the second one, which comes before the first is told, does not."""
    registry, told = registry_of(asyncio.get_running_loop()), asyncio.get_running_loop().create_future()
    with one_held() as child:
        child.end_unreaped(3)
        registry.observe(child.pid, "leaves it", lambda status: None, reap=False)
        registry.observe(child.pid, "reaps it", told.set_result)
        assert (await asyncio.wait_for(told, 10)).source == "reaped"


async def test_handler_goes_with_the_last_observer() -> None:
    with one_held() as child:
        watcher = PidfdWatcher()
        watcher.add_child_handler(child.pid, print)
        assert describe_sigchld() == "ours"
        watcher.remove_child_handler(child.pid)
        assert describe_sigchld() == "SIG_DFL"


async def test_handler_that_was_there_is_put_back() -> None:
    noted = Noted()
    signal.signal(signal.SIGCHLD, noted)
    before = describe_sigchld()
    with held(2) as (one, two):
        waiting = await watch_one(one)
        assert is_in_front()
        one.end(0)
        await waiting
        assert describe_sigchld() == before
        noted.called.clear()
        two.end(0)
        await noted.called.wait()


async def test_handler_of_somebody_who_replaced_ours_stays() -> None:
    with one_held() as child:
        watcher = PidfdWatcher()
        watcher.add_child_handler(child.pid, print)
        signal.signal(signal.SIGCHLD, Noted())
        replaced_by = describe_sigchld()
        watcher.remove_child_handler(child.pid)
        assert describe_sigchld() == replaced_by
        assert not is_in_front()


def test_two_loops_in_threads_share_the_handler(loop_factory: LoopFactory, no_checks: None) -> None:
    both_watch, seen = threading.Barrier(2), []

    async def main() -> None:
        with held(20) as children:
            tasks = await watch(*children)
            both_watch.wait(10)
            for number, child in enumerate(children):
                child.end(number)
            seen.append([status.returncode for status in await asyncio.gather(*tasks)])

    threads = [threading.Thread(target=run_on, args=(loop_factory, main())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [list(range(20))] * 2
    assert describe_sigchld() == "SIG_DFL"


# Reaping


async def test_foreign_zombie_in_the_way_is_left_and_ours_are_reaped(no_checks: None) -> None:
    with held(3) as (foreign, one, two):
        foreign.end_unreaped(9)  # older than ours, so that it is what waitid shows first
        tasks = await watch(one, two)
        one.end(1)
        assert (await tasks[0]).returncode == 1
        two.end(2)
        assert (await tasks[1]).returncode == 2
        assert os.waitpid(foreign.pid, 0)[1] == 9 << 8


@pytest.mark.parametrize("foreign", [False, True])
async def test_more_children_than_a_batch_holds_end_at_once(no_checks: None, foreign: bool) -> None:
    with one_held() as zombie:
        if foreign:
            zombie.end_unreaped(0)
        read, write = os.pipe()
        actions = [(os.POSIX_SPAWN_DUP2, read, 0)]
        pids = [os.posix_spawn("/bin/sh", ["sh", "-c", "read x; exit 9"], {}, file_actions=actions) for _ in range(200)]
        os.close(read)
        tasks = [asyncio.ensure_future(wait(pid)) for pid in pids]
        await asyncio.sleep(0)
        os.close(write)
        for pid in pids:
            await_zombie(pid)
        assert [(s.pid, s.returncode, s.source) for s in await asyncio.gather(*tasks)] == [
            (pid, 9, "reaped") for pid in pids
        ]


async def test_signals_of_many_children_that_merge_into_one_are_enough(no_checks: None) -> None:
    with held(20) as children:
        tasks = await watch(*children)
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        for code, child in enumerate(children[1:], 1):
            child.end_unreaped(code)
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        assert [(await task).returncode for task in tasks[1:]] == list(range(1, 20))
        assert not tasks[0].done()
        children[0].end(0)
        await tasks[0]


async def test_afork_gives_a_posix_child_process(no_checks: None) -> None:
    child = await afork(lambda: 7)
    assert type(child) is PosixChildProcess
    assert child.fileno() == -1
    assert await child.wait() == 7


async def test_signal_to_a_child_that_somebody_else_has_reaped_is_not_sent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed: list[tuple[int, int]] = []
    with one_held() as held_child:
        child = PosixChildProcess(held_child.pid)
        held_child.end(0)
        os.waitpid(child.pid, 0)  # the thief; from now on the pid may be anybody's
        with monkeypatch.context() as patched:
            patched.setattr(os, "kill", lambda *args: killed.append(args))
            child.terminate()
        assert killed == []
        assert f"signal 15 not sent: child process {child.pid} has ended" in caplog.text
        assert await child.wait() == 255
        assert child.exit_status is not None
        assert child.exit_status.source == "lost"


def reap_everything() -> int:
    """Do what gunicorn's SIGCHLD handler does; return how many were there."""
    count = 0
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            count += 1
    return count


@pytest.mark.parametrize("order", ["before", "after"])
async def test_status_that_a_reaping_handler_steals_is_lost_at_once(no_checks: None, order: str) -> None:
    read, write = os.pipe()

    def steal(number: int, frame: object) -> None:
        os.write(write, b"x" * reap_everything())

    with held(2) as (one, two):
        if order == "before":
            signal.signal(signal.SIGCHLD, steal)
        waiting = await watch_one(one)
        if order == "after":
            signal.signal(signal.SIGCHLD, steal)
            await watch_one(two)  # each registration puts ours back in front
        one.end(3)
        assert os.read(read, 1) == b"x"  # stolen, before the loop has run
        status = await asyncio.wait_for(waiting, 10)
        assert (status.returncode, status.source) == (255, "lost")
    os.close(read)
    os.close(write)


async def test_reaping_handler_that_replaced_ours_delays_by_one_check() -> None:
    read, write = os.pipe()
    with one_held() as one:
        waiting = await watch_one(one)
        signal.signal(signal.SIGCHLD, lambda number, frame: os.write(write, b"x" * reap_everything()))
        one.end(3)
        assert os.read(read, 1) == b"x"
        status = await asyncio.wait_for(waiting, FOUND_BY_CHECK_S)
        assert (status.returncode, status.source) == (255, "lost")
    os.close(read)
    os.close(write)


# Checks that cannot be made


async def test_checks_go_on_while_there_are_no_descriptors() -> None:
    """To look at a stranger takes one."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with one_held() as one, Stranger() as stranger:
        waiting = await watch_one(one)
        for_stranger = asyncio.ensure_future(wait(stranger.pid))
        await asyncio.sleep(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            await asyncio.sleep(FOUND_BY_CHECK_S)  # a check, at least
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # so that only another one can find it
            one.end(3)
            status = await asyncio.wait_for(waiting, FOUND_BY_CHECK_S)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert (status.returncode, status.source) == (3, "reaped")
        assert not for_stranger.done()
        stranger.tell("end")
        stranger.tell("reap")
        status = await asyncio.wait_for(for_stranger, FOUND_BY_CHECK_S)
        assert (status.returncode, status.source) == (None, "not-child")


def test_interrupt_of_a_check_ends_no_checks(loop_factory: LoopFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt leaves run_forever; when the loop runs again, so do the checks."""
    check = sigchld_backend.SigchldBackend.check

    def interrupted(self: sigchld_backend.SigchldBackend) -> None:
        monkeypatch.setattr(sigchld_backend.SigchldBackend, "check", check)
        raise KeyboardInterrupt

    async def main() -> ExitStatus:
        return await asyncio.wait_for(waiting, FOUND_BY_CHECK_S)

    loop = loop_factory()
    with one_held() as one:
        waiting = loop.run_until_complete(watch_one(one))
        monkeypatch.setattr(sigchld_backend.SigchldBackend, "check", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(asyncio.sleep(FOUND_BY_CHECK_S))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        one.end(3)
        assert loop.run_until_complete(main()).returncode == 3
    loop.close()


# SIGCHLD ignored


def ignore_in_python(handlers: Any) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def discard_in_c(handlers: Any) -> None:
    """As a C program may: what SA_SIGINFO means with SIG_DFL is nothing."""
    assert handlers.set_default(0x2 | 0x4) == 0  # SA_NOCLDWAIT, SA_SIGINFO


@pytest.mark.parametrize(
    ("ignore", "said"), [(ignore_in_python, "SIGCHLD is ignored"), (discard_in_c, "SIGCHLD is handled with SA_NOCLDWAIT")]
)
async def test_ignored_sigchld_costs_no_status_and_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    handlers: Any,
    ignore: Callable[[Any], None],
    said: str,
) -> None:
    monkeypatch.setattr(sigchld_backend, "_warned_of_ignored", False)
    ignore(handlers)
    before = describe_sigchld()
    for code in (3, 4):
        with one_held() as child:
            waiting = await watch_one(child)
            child.end(code)
            status = await waiting
            assert (status.returncode, status.source) == (code, "reaped")
            assert describe_sigchld() == before
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith(said)
    assert "other children of this process must be waited for" in record.getMessage()


async def test_sigchld_ignored_later_loses_what_ends_before_the_check_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sigchld_backend, "_warned_of_ignored", False)
    with held(2) as (one, two):
        tasks = await watch(one, two)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        one.end(1)
        with pytest.raises(ChildProcessError):
            os.waitpid(one.pid, 0)  # the kernel has reaped it
        status = await asyncio.wait_for(tasks[0], FOUND_BY_CHECK_S)
        assert (status.returncode, status.source) == (255, "lost")
        assert "SIGCHLD is ignored" in caplog.text
        two.end(2)
        assert (await tasks[1]).returncode == 2


async def test_blocked_sigchld_delays_by_one_check() -> None:
    with one_held() as child:
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        try:
            waiting = await watch_one(child)
            child.end(1)
            assert (await asyncio.wait_for(waiting, FOUND_BY_CHECK_S)).returncode == 1
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


# Others' handlers


async def test_python_handler_from_before_is_called_too(no_checks: None) -> None:
    noted = Noted()
    signal.signal(signal.SIGCHLD, noted)
    with one_held() as child:
        waiting = await watch_one(child)
        child.end(1)
        assert (await waiting).returncode == 1
        await asyncio.wait_for(noted.called.wait(), 10)


async def test_python_handler_that_replaced_ours_is_called_and_delays_by_one_check_at_most() -> None:
    noted = Noted()
    with held(2) as (one, two):
        tasks = await watch(one, two)
        signal.signal(signal.SIGCHLD, noted)
        one.end(1)
        await noted.called.wait()
        assert (await asyncio.wait_for(tasks[0], FOUND_BY_CHECK_S)).returncode == 1
        # The check has put ours back in front, and the other one behind it.
        assert is_in_front()
        noted.called.clear()
        two.end(2)
        await noted.called.wait()
        assert (await tasks[1]).returncode == 2


async def test_registration_puts_ours_back_in_front(no_checks: None) -> None:
    with held(2) as (one, two):
        waiting = await watch_one(one)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        await watch_one(two)
        assert is_in_front()
        one.end(1)
        assert (await waiting).returncode == 1


def test_python_handler_still_interrupts_system_calls(loop_factory: LoopFactory, no_checks: None) -> None:
    """It runs when the main thread's blocking call returns; were that restarted, it would not run at all."""
    read, write = os.pipe()
    signal.signal(signal.SIGCHLD, lambda number, frame: os.write(write, b"x"))
    watched = threading.Event()
    with one_held() as child:

        async def main() -> None:
            waiting = await watch_one(child)
            watched.set()
            assert (await waiting).returncode == 5

        thread = threading.Thread(target=run_on, args=(loop_factory, main()))
        thread.start()
        assert watched.wait(10)
        too_late = threading.Timer(10, os.write, (write, b"t"))
        too_late.start()
        child.end(5)
        assert os.read(read, 1) == b"x"
        too_late.cancel()
        too_late.join()
        thread.join()
    os.close(read)
    os.close(write)


async def test_python_handler_still_hears_of_children_that_stop() -> None:
    noted = Noted()
    signal.signal(signal.SIGCHLD, noted)
    with one_held() as child:
        waiting = await watch_one(child)
        os.kill(child.pid, signal.SIGSTOP)
        await noted.called.wait()
        assert not waiting.done()
        os.kill(child.pid, signal.SIGCONT)
        child.end(1)
        assert (await waiting).returncode == 1


async def test_handler_behind_ours_finds_the_signals_blocked_that_it_has_asked_for(handlers: Any, no_checks: None) -> None:
    """libuv's deadlocks without: it takes a lock, and the handler of another signal takes it, too."""
    handlers.install_handler(2)
    calls = handlers.count_calls(2)
    with one_held() as child:
        waiting = await watch_one(child)
        child.end(1)
        assert (await waiting).returncode == 1
    assert handlers.count_calls(2) == calls + 1
    assert handlers.was_blocked(signal.SIGUSR1)


@pytest.mark.parametrize("which", [0, 1])
async def test_handler_that_replaced_ours_and_calls_it_delays_nothing(handlers: Any, no_checks: None, which: int) -> None:
    with held(2) as (one, two):
        waiting = await watch_one(one)
        handlers.install_handler(which)
        calls = handlers.count_calls(which)
        one.end(1)
        assert (await waiting).returncode == 1
        assert handlers.count_calls(which) == calls + 1
        # Ours in front of it, which calls ours: it is called once, and so is nobody for ever.
        handlers.install_handler(which)
        waiting = await watch_one(two)
        assert is_in_front()
        calls = handlers.count_calls(which)
        two.end(2)
        assert (await waiting).returncode == 2
        assert handlers.count_calls(which) == calls + 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0), (0, 1, 1, 0, 1)])
async def test_all_handlers_that_call_ours_are_called_in_whatever_order_they_come(
    handlers: Any, no_checks: None, order: tuple[int, ...]
) -> None:
    with one_held() as child:
        waiting = await watch_one(child)
        for which in order:  # each replaces ours, and ours comes back in front
            handlers.install_handler(which)
            assert syscalls.install_sigchld()
        calls = [handlers.count_calls(which) for which in (0, 1)]
        child.end(1)
        assert (await waiting).returncode == 1
        assert [handlers.count_calls(which) for which in (0, 1)] == [count + 1 for count in calls]


@pytest.mark.parametrize("which", [(0,), (2,), (0, 1), (2, 3), (0, 1, 2, 3)])
async def test_handlers_that_replace_ours_over_and_over_cost_no_memory(
    handlers: Any, no_checks: None, which: tuple[int, ...]
) -> None:
    def replace(times: int) -> None:
        for number in range(times):
            handlers.install_handler(which[number % len(which)])
            assert syscalls.install_sigchld()

    with one_held() as child:
        waiting = await watch_one(child)
        replace(1000)
        before_kib = resident_kib()
        replace(10_000)
        assert resident_kib() - before_kib < 800
        calls = handlers.count_calls(which[-1])
        child.end(1)
        assert (await waiting).returncode == 1
        assert handlers.count_calls(which[-1]) == calls + 1


def resident_kib() -> int:
    """The memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() // 1024


# uvloop's own subprocesses


@needs_uvloop
def test_subprocesses_of_plain_uvloop_complete_among_ours() -> None:
    async def start(code: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec("/bin/sh", "-c", f"read x; exit {code}", stdin=asyncio.subprocess.PIPE)

    async def end(process: asyncio.subprocess.Process) -> int:
        assert process.stdin is not None
        process.stdin.close()
        return await process.wait()

    async def main() -> None:
        with held(3) as (one, two, three):
            before = await start(11)
            first = await watch_one(one)
            between = await start(12)
            second = await watch_one(two)
            assert await end(between) == 12
            one.end(1)
            assert (await asyncio.wait_for(first, FOUND_BY_CHECK_S)).returncode == 1
            after = await start(13)
            two.end(2)
            assert (await asyncio.wait_for(second, FOUND_BY_CHECK_S)).returncode == 2
            # Our last child has ended: libuv's handler is its own again, or still.
            assert [await end(before), await end(after)] == [11, 13]
            # And libuv, whose last child has ended, has reset what it thinks is its own.
            third = await watch_one(three)
            last = await start(14)
            assert await end(last) == 14
            three.end(3)
            assert (await asyncio.wait_for(third, FOUND_BY_CHECK_S)).returncode == 3

    run_on(uvloop.new_event_loop, main())


@needs_uvloop
def test_subprocesses_of_uvloop_in_one_thread_and_ours_in_another_all_complete(loop_factory: LoopFactory) -> None:
    results: dict[str, Any] = {}

    async def spawn() -> None:
        codes = []
        for code in range(40):
            process = await asyncio.create_subprocess_exec("/bin/sh", "-c", f"exit {code}")
            codes.append(await process.wait())
        results["theirs"] = codes

    async def fork() -> None:
        with held(40) as children:
            tasks = await watch(*children)
            for code, child in enumerate(children):
                child.end(code)
                await asyncio.sleep(0)
            results["ours"] = [status.returncode for status in await asyncio.wait_for(asyncio.gather(*tasks), 20)]

    thread = threading.Thread(target=run_on, args=(loop_factory, fork()))
    thread.start()
    run_on(uvloop.new_event_loop, spawn())
    thread.join()
    assert results == {"ours": list(range(40)), "theirs": list(range(40))}


# asyncio's child watchers


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="asyncio's child watchers are gone in Python 3.14")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["SafeChildWatcher", "ThreadedChildWatcher"])
def test_asyncio_watcher_in_another_loop_and_ours_both_see_every_exit(
    loop_factory: LoopFactory, kind: str, order: str
) -> None:
    """asyncio's needs the main thread, for its signal handler; ours is in another."""
    ours_watches, theirs_is_attached, all_watched = threading.Event(), threading.Event(), threading.Event()
    seen: list[int | None] = []

    async def ours() -> None:
        with held(3) as children:
            if order == "before":
                assert theirs_is_attached.wait(10)
            tasks = await watch(*children)
            ours_watches.set()
            assert all_watched.wait(10)
            for code, child in enumerate(children):
                child.end(code)
            seen.extend(status.returncode for status in await asyncio.wait_for(asyncio.gather(*tasks), FOUND_BY_CHECK_S))

    async def theirs() -> list[int]:
        loop = asyncio.get_running_loop()
        codes: asyncio.Queue[int] = asyncio.Queue()
        if order == "after":
            assert ours_watches.wait(10)
        watcher.attach_loop(loop)
        theirs_is_attached.set()
        assert ours_watches.wait(10)
        with watcher, held(3) as children:
            for child in children:
                watcher.add_child_handler(child.pid, lambda pid, code: loop.call_soon_threadsafe(codes.put_nowait, code))
            all_watched.set()
            for code, child in enumerate(children):
                child.end(code)
            found = [await codes.get() for _ in children]
        watcher.attach_loop(None)
        return sorted(found)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and 3.13 warn of every child watcher
        watcher = getattr(asyncio, kind)()
        thread = threading.Thread(target=run_on, args=(loop_factory, ours()))
        thread.start()
        assert run_on(asyncio.SelectorEventLoop, theirs()) == [0, 1, 2]
        thread.join()
        watcher.close()
    assert seen == [0, 1, 2]


# Forked children


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # uvloop has a worker of io_uring's now and then
async def test_forked_child_has_the_handler_from_before_and_does_not_wake_its_parent(no_checks: None) -> None:
    loop = asyncio.get_running_loop()
    with one_held() as child:
        waiting = await watch_one(child)
        reaper = select.poll()
        reaper.register(registry_of(loop)._reaper.fd, select.POLLIN)
        done_read, done_write = os.pipe()
        go_read, go_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                grandchild = os.fork()
                if grandchild == 0:
                    os._exit(0)
                os.waitpid(grandchild, 0)  # it has sent this child a SIGCHLD
                os.write(done_write, describe_sigchld().encode())
                os.close(go_write)
                os.read(go_read, 1)
                code = 0
            finally:
                os._exit(code)
        assert os.read(done_read, 100) == b"SIG_DFL"
        assert reaper.poll(0) == []
        assert is_in_front()
        os.close(go_write)
        assert (await wait(pid)).returncode == 0
        for fd in (done_read, done_write, go_read):
            os.close(fd)
        child.end(1)
        assert (await waiting).returncode == 1


async def test_aforked_child_watches_children_of_its_own() -> None:
    """The handler, and what it is told, are its own: the parent's are left behind."""

    def live() -> int:
        if describe_sigchld() != "SIG_DFL":
            return 1

        async def main() -> int:
            child = await afork(lambda: 42)
            return await child.wait()

        return asyncio.run(main())

    with one_held() as other:
        waiting = await watch_one(other)
        child = await afork(live)
        assert await child.wait() == 42
        other.end(0)
        await waiting
