"""Our SIGCHLD handler beside others: of Python and C, of uvloop, and of asyncio's child watchers."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import threading
import warnings
from typing import Any

import pytest

from aiopidfd._kernel import syscalls

from ..conftest import LoopFactory, run_on
from ..helpers.children import held, one_held
from ..helpers.sigchld import FOUND_BY_CHECK_S, Noted, handlers, is_in_front, no_checks, sigchld_at_default, watch, watch_one

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment] # tests of it are skipped, with a reason

__all__ = ["handlers", "no_checks", "sigchld_at_default"]  # fixtures

BACKENDS = ["sigchld"]  # for conftest

needs_uvloop = pytest.mark.skipif(uvloop is None, reason="uvloop is not installed")


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
        # The check has installed our handler again, in front of the other one.
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
    """The handler runs when the blocking call of the main thread returns. A restarted call would not return."""
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


async def test_python_handler_is_still_called_for_children_that_stop() -> None:
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
    """Otherwise the handler of libuv deadlocks: it takes a lock, which the handler of another signal takes, too."""
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
        # Our handler calls this one, which calls ours: each is called once, not for ever.
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
        for which in order:  # each replaces our handler, which is installed again
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
    """The resident memory of this process."""
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
            # Our last child has ended: the handler of libuv is installed.
            assert [await end(before), await end(after)] == [11, 13]
            # The last child of libuv has ended, so libuv has reset SIGCHLD.
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
    """asyncio's watcher needs the main thread for its signal handler. Ours runs in another thread."""
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
