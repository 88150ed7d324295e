"""PidfdWatcher: what a callback raises, and what interrupts it, harms no other callback and no other child."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from aiopidfd import PidfdWatcher
from aiopidfd._watch.registries import registry_of

from ..conftest import LoopFactory, open_descriptors
from ..helpers.calls import Calls, drain
from ..helpers.children import Held, held, one_held


async def test_observer_that_has_its_loop_run_loses_nobody() -> None:
    """As with nest_asyncio: collect() is called again inside a callback."""
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
    """A lock that another thread holds. acquire() is interrupted, so there is nothing to release."""

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
    """KeyboardInterrupt leaves run_forever(). When the loop runs again, the rest of the batch is reported."""
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
    """The other callbacks are called once, when the loop runs again."""
    reported: list[int] = []
    watchers = [PidfdWatcher() for _ in range(4)]

    def interrupt(_: int, returncode: int, number: int) -> None:
        reported.append(number)
        raise SystemExit(returncode)

    async def main() -> None:
        with one_held() as child:
            for number, watcher in enumerate(watchers):
                watcher.add_child_handler(child.pid, interrupt, number)
            child.end(3)
            while len(reported) < len(watchers):
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
    assert sorted(reported) == [0, 1, 2, 3]


def test_interrupt_before_the_batch_is_released_leaves_no_descriptor(loop_factory: LoopFactory) -> None:
    """The fixture that looks for open descriptors is the test. The batch is taken a second time, and is closed then."""
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
