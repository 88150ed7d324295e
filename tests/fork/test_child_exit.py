"""The end of a forked child, and of a fork server's worker: what the interpreter and multiprocessing do happens."""

from __future__ import annotations

import atexit
import concurrent.futures.process
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import util
from typing import Any

import pytest

from aiopidfd import ChildStartError, afork

from ..helpers.workers import fork_server

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # queues and executors have threads

FORK = multiprocessing.get_context("fork")

ENDS: dict[str, tuple[Callable[[], int | None], int]] = {
    "return": (lambda: 7, 7),
    "sys.exit": (lambda: sys.exit(9), 9),
    "exception": (lambda: 1 // 0, 1),
    "KeyboardInterrupt": (lambda: signal.raise_signal(signal.SIGINT), -signal.SIGINT),
}


class Pipe:
    """What children say, each a line."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()

    def say(self, text: str) -> None:
        os.write(self.write, f"{text}\n".encode())

    def lines(self) -> list[str]:
        """What was said until nobody could say more, for which those who said it have ended."""
        os.close(self.write)
        self.write = -1
        heard = b""
        while select.select([self.read], [], [], 10)[0]:
            part = os.read(self.read, 65536)
            if not part:
                return heard.decode().split()
            heard += part
        pytest.fail("somebody who can say more has not ended")


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    for fd in (made.read, made.write):
        if fd >= 0:
            os.close(fd)


@pytest.mark.parametrize("end", ENDS)
async def test_atexit_callbacks_of_the_child_run_and_inherited_ones_do_not(
    end: str, pipe: Pipe, capfd: pytest.CaptureFixture[str]
) -> None:
    function, expected = ENDS[end]
    inherited = weakref.finalize(pipe, pipe.say, "inherited-finalizer")

    def child() -> int | None:
        atexit.register(pipe.say, "first")
        weakref.finalize(pipe, pipe.say, "finalizer")
        weakref.finalize(pipe, pipe.say, "no-exit-finalizer").atexit = False
        atexit.register(pipe.say, "second")
        return function()

    atexit.register(pipe.say, "inherited")
    try:
        assert await (await afork(child)).wait() == expected
    finally:
        atexit.unregister(pipe.say)
        inherited.detach()
    assert pipe.lines() == ["second", "first", "finalizer"]


async def test_child_of_a_child_runs_neither_what_its_parent_nor_what_its_grandparent_has_registered(pipe: Pipe) -> None:
    def child() -> None:
        import asyncio

        def grandchild() -> None:
            weakref.finalize(pipe, pipe.say, "grandchild")

        async def main() -> None:
            weakref.finalize(pipe, pipe.say, "child")
            assert await (await afork(grandchild)).wait() == 0

        asyncio.run(main())

    assert await (await afork(child)).wait() == 0
    assert pipe.lines() == ["grandchild", "child"]


async def test_exit_callbacks_that_fail_are_printed_and_the_others_run(
    pipe: Pipe, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(error: type[Exception]) -> None:
        raise error

    def child() -> int:
        atexit.register(pipe.say, "atexit")
        atexit.register(fail, ZeroDivisionError)
        weakref.finalize(pipe, pipe.say, "finalizer")
        weakref.finalize(pipe, fail, KeyError)
        util.Finalize(None, pipe.say, ("multiprocessing",), exitpriority=1)
        threading._register_atexit(fail, IndexError)  # type: ignore[attr-defined]
        return 5

    assert await (await afork(child)).wait() == 5
    assert sorted(pipe.lines()) == ["atexit", "finalizer", "multiprocessing"]
    errors = capfd.readouterr().err
    assert all(name in errors for name in ("KeyError", "IndexError"))


async def test_child_that_the_parent_has_given_up_runs_no_exit_callbacks(pipe: Pipe) -> None:
    atexit.register(pipe.say, "inherited")
    try:
        with pytest.raises(ChildStartError):
            await afork(lambda: 3, process_group=2**22 + 1)
    finally:
        atexit.unregister(pipe.say)
    assert pipe.lines() == []


def _fill(queue: Any) -> None:
    for _ in range(100):
        queue.put(b"x" * 2000)


def _drain(queue: Any, count: int) -> int:
    for got in range(count):
        if not queue._reader.poll(20):
            return got
        queue.get()
    return count


@pytest.mark.parametrize("used", [False, True], ids=["new", "used in the parent"])
async def test_items_that_a_child_has_put_into_a_queue_arrive(used: bool) -> None:
    queue = FORK.Queue()
    if used:  # then its feeder is a thread of the parent
        queue.put(b"")
        assert _drain(queue, 1) == 1
    child = await afork(partial(_fill, queue))
    assert _drain(queue, 100) == 100
    assert await child.wait() == 0
    queue.close()
    queue.join_thread()


@pytest.mark.parametrize("end", ENDS)
async def test_daemonic_processes_of_the_child_are_ended_and_others_waited_for(
    end: str, pipe: Pipe, capfd: pytest.CaptureFixture[str]
) -> None:
    function, expected = ENDS[end]
    go = os.pipe()

    def say_later(timeout_s: float, text: str) -> None:
        time.sleep(timeout_s)
        os.read(go[0], 1)
        pipe.say(text)

    def child() -> int | None:
        FORK.Process(target=say_later, args=(30, "daemon"), daemon=True).start()
        FORK.Process(target=say_later, args=(0, "other")).start()
        atexit.register(os.write, go[1], b"x")
        atexit.register(pipe.say, "atexit")
        return function()

    forked = await afork(child)
    assert await forked.wait() == expected
    assert pipe.lines() == ["atexit", "other"]  # until its end, which comes as long as the daemon has the pipe, too
    for fd in go:
        os.close(fd)


async def test_processes_and_finalizers_of_the_parent_are_left_alone(pipe: Pipe) -> None:
    go = os.pipe()
    process = FORK.Process(target=os.read, args=(go[0], 1), daemon=True)
    process.start()
    finalizer = util.Finalize(None, pipe.say, ("inherited",), exitpriority=1)
    forked = await afork(lambda: len(multiprocessing.active_children()))
    assert await forked.wait() == 0
    assert process.is_alive()
    os.write(go[1], b"x")
    process.join()
    process.close()
    finalizer.cancel()
    assert pipe.lines() == []
    for fd in go:
        os.close(fd)


async def test_after_fork_functions_of_multiprocessing_run_and_may_fail() -> None:
    class Known:
        pid = os.getpid()

    known = Known()
    util.register_after_fork(known, lambda it: setattr(it, "pid", os.getpid()))
    util.register_after_fork(known, lambda it: 1 // 0)
    assert await (await afork(lambda: known.pid == os.getpid())).wait() == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_multiprocessing_pools_work_in_a_child(method: str) -> None:
    def child() -> int:
        pool = multiprocessing.get_context(method).Pool(1)
        return int(pool.apply(abs, (-4,)))  # and is left to be ended at the exit

    assert await (await afork(child)).wait() == 4


async def test_executors_of_a_child_finish_their_work_and_those_of_the_parent_are_left_alone(pipe: Pipe) -> None:
    def work() -> None:
        time.sleep(0.05)
        pipe.say("done")

    def child() -> None:
        executor = concurrent.futures.ThreadPoolExecutor(1)
        executor.submit(work)

    class Wakeup:
        def wakeup(self) -> None:
            pipe.say("woken")

    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    known: Any = concurrent.futures.process._threads_wakeups
    known[thread] = Wakeup()
    try:
        assert await (await afork(child)).wait() == 0
    finally:
        del known[thread]
        ended.set()
        thread.join()
    assert pipe.lines() == ["done"]


def _work_and_register(fd: int) -> None:
    atexit.register(os.write, fd, b"atexit ")
    os.write(fd, f"{len(_registered)} ".encode())
    weakref.finalize(_registered, os.write, fd, b"finalizer ")


class _Registered(list):  # type: ignore[type-arg]
    pass


_registered = _Registered()


async def test_workers_of_a_fork_server_run_what_was_registered_in_them(pipe: Pipe) -> None:
    async with fork_server() as server:
        for _ in range(2):
            worker = await server.afork(_work_and_register, pipe.write, pass_fds=[pipe.write])
            assert await worker.wait() == 0
    assert pipe.lines() == ["0", "atexit", "finalizer"] * 2


class NoStream:
    """What loggers put in the place of sys.stdout: it can be written to, and that is all."""

    def write(self, text: str) -> None:
        """Lose it."""


class Broken(NoStream):
    def __init__(self, error: type[BaseException]) -> None:
        self._error = error

    def write(self, text: str) -> None:
        raise self._error

    def flush(self) -> None:
        raise self._error


class Odd:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


STREAMS = {
    "none": None,
    "no stream": NoStream(),
    "odd": Odd(),
    **{error.__name__: Broken(error) for error in (OSError, RuntimeError, MemoryError)},
}
WORSE = {error.__name__: Broken(error) for error in (SystemExit, KeyboardInterrupt, GeneratorExit)}


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("stream", STREAMS)
async def test_what_the_parent_has_for_a_stream_does_not_matter(
    name: str, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, name, STREAMS[stream])
        status = await (await afork(lambda: 6)).wait()
    assert status == 6


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("stream", [*STREAMS, *WORSE])
@pytest.mark.parametrize("end", ENDS)
async def test_what_the_child_has_for_a_stream_does_not_matter(
    name: str, stream: str, end: str, capfd: pytest.CaptureFixture[str]
) -> None:
    function, expected = ENDS[end]

    def child() -> int | None:
        setattr(sys, name, {**STREAMS, **WORSE}[stream])
        return function()

    assert await (await afork(child)).wait() == expected


async def test_message_of_sys_exit_that_cannot_be_printed_is_exit_code_1() -> None:
    def child() -> None:
        sys.stderr = Broken(KeyboardInterrupt)
        sys.exit("no")

    assert await (await afork(child)).wait() == 1


async def test_deleted_streams_do_not_matter() -> None:
    def child() -> int:
        del sys.stdout, sys.stderr
        return 8

    assert await (await afork(child)).wait() == 8


def test_a_process_without_multiprocessing_stays_one() -> None:
    code = (
        "import sys, aiopidfd\n"
        "async def main():\n"
        "    child = await aiopidfd.afork(lambda: sum(name.startswith('multiprocessing') for name in sys.modules))\n"
        "    return await child.wait()\n"
        "sys.exit(aiopidfd.run(main()))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
