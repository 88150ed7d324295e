"""`aiopidfd.run`, and asyncio's and uvloop's own functions with our loops."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

import aiopidfd

from ..helpers.subprocesses import (
    ANSWER,
    PIPE,
    answer,
    needs_uvloop,
)

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment] # tests on uvloop are skipped, with a reason


def test_run_returns_what_main_returns(loop_class: Any) -> None:
    assert aiopidfd.run(answer(), loop_factory=loop_class) == ANSWER


def test_run_takes_uvloop_if_it_is_there() -> None:
    async def main() -> type[Any]:
        return type(asyncio.get_running_loop())

    assert aiopidfd.run(main()) is (aiopidfd.UvloopEventLoop if uvloop else aiopidfd.SelectorEventLoop)


def test_run_passes_on_what_main_raises(loop_class: Any) -> None:
    async def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        aiopidfd.run(main(), loop_factory=loop_class)


@pytest.mark.parametrize("debug", [True, False])
def test_run_sets_debug(loop_class: Any, debug: bool) -> None:
    async def main() -> bool:
        return asyncio.get_running_loop().get_debug()

    assert aiopidfd.run(main(), loop_factory=loop_class, debug=debug) is debug


def test_run_refuses_what_is_no_coroutine() -> None:
    with pytest.raises(ValueError, match="a coroutine was expected"):
        aiopidfd.run(answer)  # type: ignore[arg-type] # the point of the test


def test_run_refuses_to_run_inside_a_loop(loop_class: Any) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="running event loop"):
            aiopidfd.run(answer(), loop_factory=loop_class)

    aiopidfd.run(main(), loop_factory=loop_class)


def test_run_cancels_tasks_and_closes_generators_at_the_end(loop_class: Any) -> None:
    ended: list[str] = []
    threads = threading.active_count()

    async def task() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append("task")

    async def generate() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            ended.append("generator")

    async def main() -> list[Any]:
        left = asyncio.ensure_future(task())
        generator = generate()
        assert await generator.__anext__() == 1
        await asyncio.get_running_loop().run_in_executor(None, int)
        return [left, generator]  # kept alive until the end

    left, _ = aiopidfd.run(main(), loop_factory=loop_class)
    assert left.cancelled()
    assert ended == ["task", "generator"]
    assert threading.active_count() == threads


def test_run_reports_what_a_cancelled_task_raises(loop_class: Any) -> None:
    contexts: list[dict[str, Any]] = []

    async def task() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            raise ZeroDivisionError

    async def main() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
        left = asyncio.ensure_future(task())
        await asyncio.sleep(0)
        return left

    aiopidfd.run(main(), loop_factory=loop_class)
    assert [type(context["exception"]) for context in contexts] == [ZeroDivisionError]


def test_run_ends_cleanly_on_keyboard_interrupt(loop_class: Any) -> None:
    ended: list[str] = []

    async def main() -> None:
        process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE)
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
        try:
            await process.wait()
        finally:
            process.kill()
            await process.wait()
            ended.append("main")

    # The parent of this process may ignore SIGINT. Python inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            aiopidfd.run(main(), loop_factory=loop_class)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == ["main"]


@needs_uvloop
def test_uvloop_run_takes_our_loop() -> None:
    assert uvloop.run(answer(), loop_factory=aiopidfd.UvloopEventLoop) == ANSWER


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.Runner is new in Python 3.11")
def test_asyncio_runner_takes_our_loops(loop_class: Any) -> None:
    with asyncio.Runner(loop_factory=loop_class) as runner:  # type: ignore[attr-defined] # mypy checks for an older Python
        assert runner.run(answer()) == ANSWER
        assert runner.run(answer()) == ANSWER


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio.run(loop_factory=) is new in Python 3.12")
def test_asyncio_run_takes_our_loops(loop_class: Any) -> None:
    assert asyncio.run(answer(), loop_factory=loop_class) == ANSWER  # type: ignore[call-arg,unused-ignore] # since 3.12
