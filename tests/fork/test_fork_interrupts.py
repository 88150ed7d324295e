"""Exceptions of Python signal handlers: between any two bytecodes of afork(), and in the last frames of a child."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import pytest

from aiopidfd import AbstractChildProcess, afork
from aiopidfd._fork import child as child_life
from aiopidfd._fork.afork import clone, start_child
from aiopidfd._watch.registries import registry_of
from aiopidfd._watch.registry import Registry

from ..conftest import children
from ..helpers.workers import exit_with, fork_server, wait_for_signal


class Stop(Exception):
    """What the handler raises."""


def _last_line() -> int:
    lines, first = inspect.getsourcelines(start_child)
    return first + next(i for i, line in enumerate(lines) if line.strip() == "return child")


class Interrupter:
    """Raises at one bytecode of this package's, counted from the first of start_child()."""

    def __init__(self, number: int) -> None:
        self.missing = number
        self.where = ""
        self._returned = False
        self._last_line = _last_line()
        self._pid = os.getpid()

    def __enter__(self) -> Interrupter:
        self._old = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(self._old)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        if (
            os.getpid() != self._pid
            or f"{os.sep}aiopidfd{os.sep}" not in name
            or frame.f_code.co_name in ("afork", "__del__")
        ):
            return None
        frame.f_trace_opcodes = True
        return self._trace_one

    def _trace_one(self, frame: FrameType, event: str, _: object) -> Any:
        # What the caller gets it must store itself.
        self._returned |= frame.f_code is start_child.__code__ and frame.f_lineno == self._last_line
        if event == "opcode" and os.getpid() == self._pid and not self._returned and self._is_started(frame):
            self.missing -= 1
            if self.missing == 0:
                self.where = f"{frame.f_code.co_name}:{frame.f_lineno}"
                raise Stop
        return self._trace_one

    def _is_started(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code is start_child.__code__:
                return True
            frame = frame.f_back
        return False


async def _interrupt_each(start: Callable[[], Coroutine[Any, Any, AbstractChildProcess]], full: bool) -> None:
    """Interrupt `start` at each bytecode in turn, or at each seventh, until it is over before."""
    await (await start()).stop()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: None)  # it is the loop that gets the interrupt of a callback
    registry = registry_of(loop)
    before, mask = os.listdir("/proc/self/fd"), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for number in itertools.count(1, 1 if full else 7):
        child = None
        with Interrupter(number) as interrupter, contextlib.suppress(Stop):
            child = await start()
        where = interrupter.where
        if child is not None:
            await child.stop()
            if not where:
                break
        assert not children(), where
        assert os.listdir("/proc/self/fd") == before, where
        assert not registry.gates._gates, where
        assert not registry._children, where
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask, where
    assert number > 100


async def test_interrupt_at_any_bytecode_of_afork_leaves_nothing(locks_to_lose: None, full: bool) -> None:
    await _interrupt_each(lambda: afork(wait_for_signal), full)


async def test_interrupt_at_any_bytecode_of_a_fork_by_clone_leaves_nothing(
    pidfds: None, one_thread: None, locks_to_lose: None, full: bool
) -> None:
    loop = asyncio.get_running_loop()
    await _interrupt_each(lambda: start_child(loop, wait_for_signal, child_life.Options(), clone), full)


async def test_interrupt_of_the_cleaning_up_of_an_interrupt_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kill = Registry.kill_forked
    stops = [Stop, KeyboardInterrupt, SystemExit]

    def interrupted(*args: Any) -> bool:
        if stops:
            raise stops.pop()
        return kill(*args)

    monkeypatch.setattr(Registry, "kill_forked", interrupted)
    monkeypatch.setattr(Registry, "release", lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        await afork(wait_for_signal)
    assert stops == []


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit])
async def test_fork_that_raises_after_it_has_forked_leaves_no_child(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = os.fork

    def interrupted() -> int:
        pid = fork()
        if pid:
            raise error
        return pid

    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", interrupted)
        with pytest.raises(error) as caught:
            await afork(wait_for_signal)
    assert caught.traceback[-1].name == "interrupted"
    assert await (await afork(lambda: 3)).wait() == 3


def _fail(_: object) -> None:
    raise Stop


def _break_ends(error: type[BaseException]) -> None:
    def fail(*_: object) -> None:
        raise error

    vars(child_life)["run_exit_handlers"] = vars(os)["_exit"] = fail  # in a child: there is nothing to be put back


ERRORS = [Stop, KeyboardInterrupt, SystemExit]


@pytest.mark.parametrize("error", ERRORS)
async def test_exception_in_the_last_frame_of_a_child_ends_it_as_it_was_to_end(error: type[BaseException]) -> None:
    def returning() -> int:
        _break_ends(error)
        return 7

    def interrupted() -> int:
        _break_ends(error)
        raise KeyboardInterrupt

    assert await (await afork(returning)).wait() == 7
    assert await (await afork(interrupted)).wait() == -signal.SIGINT


def _break_ends_and_return(number: int) -> int:
    _break_ends(ERRORS[number])
    return number + 7


@pytest.mark.parametrize("number", range(len(ERRORS)))
async def test_exception_in_the_last_frame_of_a_worker_ends_it_as_it_was_to_end(number: int) -> None:
    async with fork_server() as server:
        assert await (await server.afork(_break_ends_and_return, number)).wait() == number + 7
        assert await (await server.afork(exit_with, 3)).wait() == 3


async def test_child_that_forks_as_it_ends_does_not_hand_on_its_exit_code() -> None:
    def child() -> int:
        import atexit

        async def fork_broken() -> int:
            def broken() -> None:
                vars(child_life)["set_exit_code"] = _fail

            return await (await afork(broken)).wait()

        atexit.register(lambda: os.write(write, bytes([asyncio.run(fork_broken())])))
        return 9

    read, write = os.pipe()
    assert await (await afork(child)).wait() == 9
    assert os.read(read, 1) == b"\1"
    os.close(read)
    os.close(write)
