"""A loop that is run again inside a callback, as nest_asyncio does it, goes on reporting.

uvloop's loop cannot be run again. Plain asyncio, where each protocol method is a callback of its own, is the oracle.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Coroutine
from typing import Any

import pytest

import aiopidfd
from aiopidfd import PidfdWatcher
from tests.conftest import BACKENDS
from tests.helpers.children import Held, held, one_held


class Ready(collections.deque[Any]):
    """What is ready to run: a round that finds it emptied by a nested one has nothing left to do."""

    def popleft(self) -> Any:
        if self:
            return super().popleft()
        handle = asyncio.Handle(print, (), asyncio.get_running_loop())
        handle.cancel()
        return handle


def run_nested(loop: Any, main: Coroutine[Any, Any, Any], rounds: int = 20_000) -> Any:
    """Run the running loop until `main` is done, as nest_asyncio does. A loop that spins runs out of rounds."""
    task = loop.create_task(main)
    while not task.done():
        loop._run_once()
        rounds -= 1
        assert rounds, "the loop spins"
    return task.result()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run on a loop of ours, and let nothing be logged."""
    loop: Any = aiopidfd.SelectorEventLoop()
    loop._ready = Ready()
    errors: list[Any] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    try:
        return loop.run_until_complete(asyncio.wait_for(main, 60))
    finally:
        loop.close()
        assert not errors, errors


async def run_program() -> int:
    process = await asyncio.create_subprocess_exec("sh", "-c", "echo out; exit 3", stdout=asyncio.subprocess.PIPE)
    assert (await process.communicate())[0] == b"out\n"
    return process.returncode or 0


async def run_child() -> int:
    async with await aiopidfd.afork(lambda: 3) as child:
        return await child.wait()


async def wait_for_child() -> int:
    with one_held() as child:
        child.end(3)
        status = await aiopidfd.wait(child.pid)
        return status.returncode or 0


BOTH_BACKENDS = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
NESTED = [run_program, run_child, wait_for_child]


class Nester(asyncio.SubprocessProtocol):
    """Run the loop in one of its methods."""

    def __init__(self, where: str, main: Any) -> None:
        self._where, self._main = where, main
        self.calls: list[str] = []
        loop = asyncio.get_running_loop()
        self.result: asyncio.Future[int] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self._where and self.calls.count(name) == 1:
            self.result.set_result(run_nested(asyncio.get_running_loop(), self._main()))

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._call("pipe_data_received")

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._call("pipe_connection_lost")

    def process_exited(self) -> None:
        self._call("process_exited")

    def connection_lost(self, exc: Exception | None) -> None:
        self._call("connection_lost")
        self.lost.set_result(None)


@BOTH_BACKENDS
@pytest.mark.parametrize("main", NESTED)
@pytest.mark.parametrize("where", ["pipe_data_received", "pipe_connection_lost", "process_exited", "connection_lost"])
def test_loop_that_is_run_in_a_protocol_method_goes_on(where: str, main: Any, backend: str) -> None:
    async def outer() -> None:
        program = ("sh", "-c", "echo x; exec cat")
        transport, protocol = await asyncio.get_running_loop().subprocess_exec(lambda: Nester(where, main), *program)
        writer: Any = transport.get_pipe_transport(0)
        writer.write(b"y" * 200_000)  # there is more to be read all the time
        writer.close()
        await protocol.lost
        assert await protocol.result == 3
        assert protocol.calls.count("process_exited") == 1
        assert protocol.calls.count("pipe_connection_lost") == 3
        assert protocol.calls[-1] == "connection_lost"

    run(outer())


@BOTH_BACKENDS
@pytest.mark.parametrize("main", NESTED)
def test_loop_that_is_run_in_an_exit_callback_goes_on(main: Any, backend: str) -> None:
    async def outer() -> None:
        loop = asyncio.get_running_loop()
        reported = loop.create_future()

        def note(pid: int, returncode: int) -> None:
            try:
                reported.set_result(run_nested(loop, main(), 500))
            except AssertionError as exc:
                reported.set_exception(exc)

        with one_held() as child:
            PidfdWatcher().add_child_handler(child.pid, note)
            child.end(0)
            assert await reported == 3

    run(outer())


@BOTH_BACKENDS
@pytest.mark.parametrize("deep", [1, 3])
def test_each_observer_of_a_batch_is_notified_once_however_deep_the_loop_runs(deep: int, backend: str) -> None:
    count = 100  # more than a batch

    async def outer() -> None:
        loop = asyncio.get_running_loop()
        reported: list[int] = []
        done = loop.create_future()
        left = deep

        def note(pid: int, returncode: int) -> None:
            nonlocal left
            reported.append(pid)
            if left:
                left -= 1
                assert run_nested(loop, run_program()) == 3
            if len(reported) == 2 * count and not done.done():
                done.set_result(None)

        with held(count) as children:
            watchers = PidfdWatcher(), PidfdWatcher()
            for child in children:
                for watcher in watchers:
                    watcher.add_child_handler(child.pid, note)
            end_all(children)
            await done
            await asyncio.sleep(0)
            assert sorted(reported) == sorted(2 * [child.pid for child in children])

    run(outer())


def end_all(children: list[Held]) -> None:
    """Have them all be zombies before the loop looks again."""
    for child in children:
        child.end_unreaped(0)


@BOTH_BACKENDS
def test_resumed_protocol_may_run_the_loop(backend: str) -> None:
    class Resumed(Nester):
        def resume_writing(self) -> None:
            self._call("resume_writing")

    async def outer() -> None:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.subprocess_exec(
            lambda: Resumed("resume_writing", run_program), "cat", stdout=asyncio.subprocess.DEVNULL
        )
        writer: Any = transport.get_pipe_transport(0)
        writer.write(b"y" * 1_000_000)
        writer.close()
        await protocol.lost
        assert await protocol.result == 3

    run(outer())
