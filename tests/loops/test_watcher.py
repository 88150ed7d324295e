"""PidfdWatcher: who is told of an exit, when, and how often."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from typing import Any

import pytest

from aiopidfd import PidfdWatcher, wait
from aiopidfd._kernel.syscalls import describe_sigchld
from aiopidfd._watch.registries import registry_of

from ..conftest import LoopFactory, open_descriptors, run_on
from ..conftest import children as child_pids
from ..helpers.children import Held, await_zombie, held, one_held


class Calls:
    """A callback that remembers its calls and can be awaited."""

    def __init__(self, expected: int = 1) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.threads: set[int] = set()
        self._all = asyncio.get_running_loop().create_future()
        self._expected = expected

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)
        self.threads.add(threading.get_ident())
        if len(self.calls) == self._expected:
            self._all.set_result(None)

    async def all(self) -> list[tuple[Any, ...]]:
        await self._all
        return self.calls


async def drain() -> None:
    """Let the loop see everything that is ready now: each round polls its descriptors once."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_callback_gets_pid_returncode_and_arguments() -> None:
    with one_held() as child:
        calls = Calls()
        PidfdWatcher().add_child_handler(child.pid, calls, "a", 2)
        child.end(7)
        assert await calls.all() == [(child.pid, 7, "a", 2)]
        assert calls.threads == {threading.get_ident()}


async def test_returncode_is_negative_signal_number_of_killed_child() -> None:
    with one_held() as child:
        calls = Calls()
        PidfdWatcher().add_child_handler(child.pid, calls)
        os.kill(child.pid, signal.SIGKILL)
        assert await calls.all() == [(child.pid, -signal.SIGKILL)]


async def test_child_that_was_dead_before_registration_is_reported() -> None:
    with one_held() as child:
        child.end_unreaped(3)
        calls = Calls()
        PidfdWatcher().add_child_handler(child.pid, calls)
        assert calls.calls == []  # never from within the call itself
        assert await calls.all() == [(child.pid, 3)]


async def test_observer_that_has_its_loop_run_loses_nobody() -> None:
    """As nest_asyncio does: we are called again while we tell."""
    registry = registry_of(asyncio.get_running_loop())
    watcher, calls = PidfdWatcher(), Calls(4)

    def call(*args: Any) -> None:
        calls(*args)
        registry.collect()

    with held(4) as all_of_them:
        for child in all_of_them:
            child.end_unreaped(3)
            watcher.add_child_handler(child.pid, call)
        assert sorted(await calls.all()) == sorted((child.pid, 3) for child in all_of_them)


class InterruptedLock:
    """A lock that another thread has: who waits for it is interrupted, and so has nothing to release."""

    def acquire(self) -> bool:
        raise KeyboardInterrupt

    def release(self) -> None:
        raise RuntimeError("cannot release un-acquired lock")

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


async def test_interrupt_of_the_wait_for_another_thread_is_that_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, watcher = registry_of(asyncio.get_running_loop()), PidfdWatcher()
    with one_held() as child:
        with monkeypatch.context() as patched:
            patched.setattr(registry, "_lock", InterruptedLock())
            with pytest.raises(KeyboardInterrupt):
                watcher.add_child_handler(child.pid, print)
        assert child.pid not in registry._children


async def test_500_children_ending_at_once_are_each_reported_once() -> None:
    watcher, calls = PidfdWatcher(), Calls(500)
    # They all read the same pipe: closing it ends them at once.
    read, write = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, read, 0)]
    pids = [os.posix_spawn("/bin/sh", ["sh", "-c", "read x; exit 9"], {}, file_actions=actions) for _ in range(500)]
    os.close(read)
    for pid in pids:
        watcher.add_child_handler(pid, calls)
    os.close(write)
    await calls.all()
    await drain()
    assert sorted(calls.calls) == sorted((pid, 9) for pid in pids)


async def test_second_registration_replaces_the_first() -> None:
    with one_held() as child:
        watcher, first, second = PidfdWatcher(), Calls(), Calls()
        watcher.add_child_handler(child.pid, first)
        watcher.add_child_handler(child.pid, second)
        child.end(1)
        await second.all()
        await drain()
        assert first.calls == []


async def test_removed_handler_is_not_called_and_the_child_not_reaped() -> None:
    with one_held() as child:
        watcher, calls = PidfdWatcher(), Calls()
        watcher.add_child_handler(child.pid, calls)
        assert watcher.remove_child_handler(child.pid) is True
        assert watcher.remove_child_handler(child.pid) is False
        child.end_unreaped(4)
        await drain()
        assert calls.calls == []
        assert os.waitpid(child.pid, 0)[1] == 4 << 8


async def test_handler_of_an_ended_child_cannot_be_removed() -> None:
    with one_held() as child:
        watcher, calls = PidfdWatcher(), Calls()
        watcher.add_child_handler(child.pid, calls)
        child.end(0)
        await calls.all()
        assert watcher.remove_child_handler(child.pid) is False


async def test_every_observer_of_a_child_is_told_once() -> None:
    with one_held() as child:
        first, second = Calls(), Calls()
        PidfdWatcher().add_child_handler(child.pid, first)
        PidfdWatcher().add_child_handler(child.pid, second)
        waits = [asyncio.ensure_future(wait(child.pid, reap=reap)) for reap in (True, False)]
        await asyncio.sleep(0)
        child.end_unreaped(6)
        await drain()
        assert [waiting.done() and waiting.result().returncode for waiting in waits] == [6, 6]
        assert first.calls == second.calls == [(child.pid, 6)]


async def test_loop_gets_one_reader_whatever_the_number_of_children(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    readers: list[Any] = []
    add_reader = loop.add_reader

    def count(fd: int, *args: Any) -> None:
        readers.append(fd)
        add_reader(fd, *args)

    monkeypatch.setattr(loop, "add_reader", count)
    calls = Calls(40)
    with held(40) as children:
        for child in children:
            PidfdWatcher().add_child_handler(child.pid, calls)
            child.end(0)
        await calls.all()
    assert len(set(readers)) == 1


async def test_raising_callback_reaches_the_exception_handler_and_harms_no_other() -> None:
    loop = asyncio.get_running_loop()
    contexts: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: contexts.append(context))
    error = RuntimeError("from a callback")

    def fail(pid: int, returncode: int) -> None:
        raise error

    with held(2) as (one, two):
        calls = Calls(2)
        for child in (one, two):
            PidfdWatcher().add_child_handler(child.pid, calls)
            PidfdWatcher().add_child_handler(child.pid, fail)
            child.end_unreaped(0)
        await drain()
        assert sorted(calls.calls) == sorted((child.pid, 0) for child in (one, two))
    assert [context["exception"] for context in contexts] == [error, error]


def test_interrupt_in_a_callback_strands_no_other_child(loop_factory: LoopFactory) -> None:
    """KeyboardInterrupt leaves run_forever; when the loop runs again, the rest of the batch is told."""
    loop = loop_factory()
    seen: list[int] = []

    def interrupt(pid: int, returncode: int) -> None:
        seen.append(pid)
        if len(seen) == 1:
            raise KeyboardInterrupt

    async def register(children: list[Held]) -> None:
        for child in children:
            child.end_unreaped(0)
            PidfdWatcher().add_child_handler(child.pid, interrupt)
        await asyncio.sleep(10)

    with held(3) as children:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(register(children))
        loop.run_until_complete(drain())
        loop.close()
        assert sorted(seen) == sorted(child.pid for child in children)


def test_interrupt_in_a_callback_strands_no_other_callback_of_the_child(loop_factory: LoopFactory) -> None:
    """The rest is told when the loop runs again, and each once."""
    told: list[int] = []
    watchers = [PidfdWatcher() for _ in range(4)]

    def interrupt(_: int, returncode: int, number: int) -> None:
        told.append(number)
        raise SystemExit(returncode)

    async def main() -> None:
        with one_held() as child:
            for number, watcher in enumerate(watchers):
                watcher.add_child_handler(child.pid, interrupt, number)
            child.end(3)
            while len(told) < len(watchers):
                await asyncio.sleep(0.001)

    loop = loop_factory()
    try:
        running = loop.create_task(asyncio.wait_for(main(), 10))
        with pytest.raises(SystemExit, match="3"):
            loop.run_until_complete(running)
        while not running.done():
            with contextlib.suppress(SystemExit):
                loop.run_until_complete(running)
        running.result()
    finally:
        loop.close()
    assert sorted(told) == [0, 1, 2, 3]


def test_interrupt_before_the_batch_is_released_leaves_no_descriptor(loop_factory: LoopFactory) -> None:
    """The fixture that sees what is left open is the test: the batch is noted a second time, and must still be closed."""
    loop = loop_factory()
    seen: list[int] = []

    async def register(child: Held) -> None:
        child.end_unreaped(0)
        PidfdWatcher().add_child_handler(child.pid, lambda pid, code: seen.append(pid))
        reaper = registry_of(loop)._reaper
        release = reaper.release

        def interrupt() -> None:
            reaper.release = release
            raise KeyboardInterrupt

        reaper.release = interrupt
        await asyncio.sleep(10)

    with one_held() as child:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(register(child))
        loop.run_until_complete(drain())
        assert not [what for what in open_descriptors().values() if what.startswith(("pidfd:", "anon_inode:[pidfd]"))]
        loop.close()
        assert seen == [child.pid]


async def test_callback_may_register_the_next_child() -> None:
    watcher = PidfdWatcher()
    with held(2) as (one, two):
        two.end_unreaped(2)
        calls = Calls()
        watcher.add_child_handler(one.pid, lambda pid, code: watcher.add_child_handler(two.pid, calls))
        one.end(1)
        assert await calls.all() == [(two.pid, 2)]


@pytest.mark.parametrize(
    ("pid", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (2**31, ValueError),
        ("1", TypeError),
        (1.0, TypeError),
        (True, TypeError),
        (None, TypeError),
        (1, ChildProcessError),
        (os.getpid(), ChildProcessError),
    ],
)
async def test_pid_that_cannot_be_watched_is_refused_at_the_call(pid: Any, error: type[Exception]) -> None:
    calls = Calls()
    with pytest.raises(error, match=str(pid) if error is not TypeError else "int"):
        PidfdWatcher().add_child_handler(pid, calls)
    assert PidfdWatcher().remove_child_handler(pid) is False


async def test_reaped_child_is_refused_at_the_call() -> None:
    with one_held() as child:
        child.end(0)
        os.waitpid(child.pid, 0)
        with pytest.raises(ProcessLookupError, match=f"pid {child.pid}.*reaped"):
            PidfdWatcher().add_child_handler(child.pid, Calls())


async def test_callback_that_cannot_be_called_is_refused() -> None:
    with one_held() as child, pytest.raises(TypeError, match="callable"):
        PidfdWatcher().add_child_handler(child.pid, "no function")  # type: ignore[arg-type] # the point of the test


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
    watcher = PidfdWatcher()  # one for both: a watcher belongs to no loop
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
        while survivor.pid in child_pids():  # nobody but the handler that we left behind is there to reap it
            assert time.monotonic() < deadline
            time.sleep(0.01)
    # The next loop puts back who was there before.
    run_on(loop_factory, asyncio.sleep(0))
    with one_held() as other:

        async def end() -> None:
            other.end(0)
            await wait(other.pid)

        run_on(loop_factory, end())
    assert describe_sigchld() == before


async def test_repr_tells_the_state() -> None:
    watcher = PidfdWatcher()
    assert "active" in repr(watcher)
    watcher.close()
    assert "closed" in repr(watcher)


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
    # Python 3.12 deprecates set_child_watcher itself, and says so once for each of our two calls; nothing else warns.
    assert [str(warning.message) for warning in caught if "set_child_watcher" not in str(warning.message)] == []


def test_importing_and_subclassing_warn_of_nothing() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", "import aiopidfd; aiopidfd.PidfdWatcher()"], check=True)


async def test_zombie_helper_leaves_the_child_unreaped() -> None:
    """The tests above rest on it."""
    with one_held() as child:
        child.end(0)
        await_zombie(child.pid)
        assert os.waitpid(child.pid, 0)[0] == child.pid
