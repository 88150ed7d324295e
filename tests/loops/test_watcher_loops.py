"""PidfdWatcher and its loops: attached, detached, closed, and in several threads."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import warnings

import pytest

from aiopidfd import PidfdWatcher, wait
from aiopidfd._kernel.syscalls import describe_sigchld

from ..conftest import LoopFactory, open_descriptors, run_on
from ..conftest import children as child_pids
from ..helpers.calls import Calls, drain
from ..helpers.children import held, one_held


def test_without_a_loop_add_child_handler_says_what_is_missing() -> None:
    watcher = PidfdWatcher()
    assert not watcher.is_active()
    with one_held() as child, pytest.raises(RuntimeError, match=r"no running event loop.*attach_loop"):
        watcher.add_child_handler(child.pid, print)


async def test_closed_watcher_refuses_and_forgets_its_handlers() -> None:
    with held(2) as (one, two):
        watcher, calls = PidfdWatcher(), Calls()
        watcher.add_child_handler(one.pid, calls)
        watcher.close()
        assert not watcher.is_active()
        with pytest.raises(RuntimeError, match="closed"):
            watcher.add_child_handler(two.pid, calls)
        one.end_unreaped(0)
        await drain()
        assert calls.calls == []
        watcher.close()


async def test_with_leaves_the_watcher_usable_as_asyncio_expects() -> None:
    with PidfdWatcher() as watcher:
        assert watcher.is_active()
    with one_held() as child:
        calls = Calls()
        watcher.add_child_handler(child.pid, calls)
        child.end(0)
        await calls.all()


async def test_attached_loop_is_used_by_other_threads() -> None:
    loop = asyncio.get_running_loop()
    watcher, calls = PidfdWatcher(), Calls()
    watcher.attach_loop(loop)
    with one_held() as child:
        await loop.run_in_executor(None, watcher.add_child_handler, child.pid, calls)
        child.end(5)
        assert await calls.all() == [(child.pid, 5)]
        assert calls.threads == {threading.get_ident()}
    watcher.close()


async def test_detaching_with_pending_handlers_warns_as_asyncio_does() -> None:
    watcher = PidfdWatcher()
    watcher.attach_loop(asyncio.get_running_loop())
    with one_held() as child:
        watcher.add_child_handler(child.pid, Calls())
        with pytest.warns(RuntimeWarning, match="pending handlers"):
            watcher.attach_loop(None)
        assert not watcher.remove_child_handler(child.pid)


def test_attach_loop_refuses_what_is_no_loop() -> None:
    with pytest.raises(TypeError, match="event loop"):
        PidfdWatcher().attach_loop("loop")  # type: ignore[arg-type] # the point of the test


def test_two_loops_in_two_threads_watch_at_once(loop_factory: LoopFactory) -> None:
    watcher = PidfdWatcher()  # one for both loops
    results: list[list[int]] = []

    async def watch() -> None:
        with held(50) as children:
            calls = Calls(50)
            for child in children:
                watcher.add_child_handler(child.pid, calls)
            for number, child in enumerate(children):
                child.end(number)
            results.append(sorted(code for _, code in await calls.all()))
            assert calls.threads == {threading.get_ident()}

    threads = [threading.Thread(target=run_on, args=(loop_factory, watch())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [list(range(50))] * 2


def test_closing_the_loop_closes_the_pidfds_and_the_child_is_reaped_when_it_ends(loop_factory: LoopFactory) -> None:
    before = describe_sigchld()
    with one_held() as survivor:

        async def register() -> None:
            PidfdWatcher().add_child_handler(survivor.pid, print)

        run_on(loop_factory, register())
        assert not [what for what in open_descriptors().values() if what.startswith(("pidfd:", "anon_inode:[pidfd]"))]
        survivor.end(0)
        deadline = time.monotonic() + 10
        while survivor.pid in child_pids():  # only our SIGCHLD handler can reap it
            assert time.monotonic() < deadline
            time.sleep(0.01)
    # The next loop restores the handler that was there before.
    run_on(loop_factory, asyncio.sleep(0))
    with one_held() as other:

        async def end() -> None:
            other.end(0)
            await wait(other.pid)

        run_on(loop_factory, end())
    assert describe_sigchld() == before


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="asyncio.set_child_watcher is gone in Python 3.14")
def test_set_child_watcher_makes_asyncio_subprocesses_use_it() -> None:
    watcher = PidfdWatcher()
    registered: list[int] = []

    async def main() -> tuple[int | None, bytes]:
        process = await asyncio.create_subprocess_exec("/bin/sh", "-c", "echo hello; exit 3", stdout=asyncio.subprocess.PIPE)
        registered.append(process.pid)
        output, _ = await process.communicate()
        return process.returncode, output

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.set_child_watcher(watcher)
        try:
            assert asyncio.run(main()) == (3, b"hello\n")
        finally:
            asyncio.set_child_watcher(None)  # type: ignore[arg-type] # None resets it
    assert registered
    # Python 3.12 deprecates set_child_watcher itself, and warns for each of the two calls. Nothing else warns.
    assert [str(warning.message) for warning in caught if "set_child_watcher" not in str(warning.message)] == []
