"""A start that is interrupted anywhere leaves no program, no zombie and no pidfd, also after the loop is closed."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aiopidfd
from aiopidfd._kernel import syscalls
from aiopidfd._programs import lifecycle, loop_methods
from aiopidfd._programs import spawn as spawning
from aiopidfd._watch.registries import registry_of
from aiopidfd._watch.registry import Registry

from .. import conftest
from ..conftest import LoopFactory, children, open_descriptors
from ..helpers.subprocesses import (
    BY_POPEN,
    PIPE,
    assert_reaped,
    plug,  # noqa: F401 - pytest looks for it in this module
    pytest_generate_tests,  # noqa: F401 - pytest looks for it in this module
)

# Each test runs on loops of our classes, and on other loops with a watcher: see `plug`.
pytestmark = [pytest.mark.usefixtures("plug"), pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")]

# Without clone(CLONE_PIDFD), Popen starts the programs.
BACKENDS = [name for name in conftest.BACKENDS if name == "pidfd"]

PACKAGE = str(Path(aiopidfd.__file__).parent)


class Interrupt(BaseException):
    """What a Python signal handler raises. It is no Exception: `_call` would take that for one of the protocol."""


def interrupt(*args: object) -> None:
    raise Interrupt


class Tracer:
    """Raises at one of the places in our code at which a signal handler might, from a program's birth until all is done."""

    def __init__(self, registry: Registry, place: int) -> None:
        self._registry = registry
        self._left = place
        self._is_born = self._is_done = False
        self.where: str | None = None

    def __call__(self, frame: Any, event: str, arg: object) -> Any:
        if frame.f_code.co_name == "sleep":  # asyncio's: the last step of `_start`, which then returns what it has made
            self._is_done = True
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        return self._trace

    def _trace(self, frame: Any, event: str, arg: object) -> Any:
        self._is_born = self._is_born or any(program.pid for program in self._registry.starting)
        if event == "opcode" and self._is_born and not self._is_done:
            if self._left == 0:
                self.where = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                self._is_done = True
                raise Interrupt
            self._left -= 1
        return self._trace


def pidfds() -> list[str]:
    return [what for what in open_descriptors().values() if what.startswith(("pidfd:", "anon_inode:[pidfd]"))]


def await_no_children(where: str, deadline_s: float = 10) -> None:
    """Return once every child is reaped by the SIGCHLD handler, which does that for closed loops."""
    deadline = time.monotonic() + deadline_s
    while children():
        assert time.monotonic() < deadline, f"a child is left by an interrupt in {where}"
        time.sleep(0.0005)


async def start_traced(place: int) -> str | None:
    """Start a program and interrupt the start. Return the place, or None if the start was complete before."""
    tracer = Tracer(registry_of(asyncio.get_running_loop()), place)
    gc.disable()
    sys.settrace(tracer)
    try:
        process = await asyncio.create_subprocess_exec("/bin/sleep", "1000", stdin=PIPE)
    except Interrupt:
        return tracer.where
    finally:
        sys.settrace(None)
        gc.enable()
    process.kill()
    await process.wait()
    return tracer.where  # not None: Python itself has ignored the exception, as in a __del__


@pytest.mark.skipif(sys.gettrace() is not None, reason="something else traces this program")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python ignores what a __del__ raises
def test_interrupt_at_any_place_leaves_nothing(loop_factory: LoopFactory, locks_to_lose: None) -> None:
    place, places = 0, set()
    while True:
        loop = loop_factory()
        where = loop.run_until_complete(start_traced(place))
        loop.close()
        assert pidfds() == [], where
        if where is None:
            break
        await_no_children(where)
        places.add(where)
        place += 1
    assert place > 100
    assert any(where.startswith("spawn,") for where in places)
    assert any(where.startswith("watch_program,") for where in places)


def patch_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawning, "_Process", interrupt)


def patch_after_spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = syscalls.spawn

    def interrupted(*args: Any, **keywords: Any) -> None:
        spawn(*args, **keywords)
        interrupt()

    monkeypatch.setattr(syscalls, "spawn", interrupted)


def patch_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    observe = Registry.observe

    def interrupted(*args: Any, **keywords: Any) -> None:
        monkeypatch.undo()
        observe(*args, **keywords)
        interrupt()

    monkeypatch.setattr(Registry, "observe", interrupted)


@pytest.mark.parametrize("patch", [patch_process, patch_after_spawn, patch_observed])
async def test_interrupted_program_is_killed_at_once_and_reaped_by_the_loop(
    patch: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await (await asyncio.create_subprocess_exec("/bin/true")).wait()
    patch(monkeypatch)
    with pytest.raises(Interrupt):
        await asyncio.create_subprocess_exec("/bin/sleep", "1000", stdin=PIPE, stdout=PIPE)
    (pid,) = children()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)  # it is dead, and not reaped yet
    while children():
        await asyncio.sleep(0)
    assert_reaped(pid)
    assert pidfds() == []
    assert caplog.messages == []  # we have reaped it ourselves: nothing is lost


async def test_interrupt_of_the_undoing_leaves_nothing_once_the_loop_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with Ctrl+C twice: the program is not watched then. The fixture finds what is left after the loop is closed."""
    patch_process(monkeypatch)
    monkeypatch.setattr(loop_methods, "cancel_program", interrupt)
    with pytest.raises(Interrupt):
        await asyncio.create_subprocess_exec("/bin/sleep", "1000")
    assert len(children()) == 1


async def test_program_that_ends_after_two_interrupts_is_reaped_and_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the loop is closed, its pid may be another process's, and the number of its pidfd another file's."""
    patch_process(monkeypatch)
    monkeypatch.setattr(loop_methods, "cancel_program", interrupt)
    with pytest.raises(Interrupt):
        await asyncio.create_subprocess_exec("/bin/true")
    while children():
        await asyncio.sleep(0)
    assert registry_of(asyncio.get_running_loop()).starting == set()
    assert pidfds() == []


async def test_real_signal_between_clone_and_popen_object(monkeypatch: pytest.MonkeyPatch) -> None:
    process_class = spawning._Process

    def with_signal(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return process_class(*args)

    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        monkeypatch.setattr(spawning, "_Process", with_signal)
        with pytest.raises(Interrupt):
            await asyncio.create_subprocess_exec("/bin/true")
    finally:
        signal.signal(signal.SIGUSR1, previous)
    while children():
        await asyncio.sleep(0)


@pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning")
async def test_interrupt_inside_popen_once_it_has_the_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any, *args: Any) -> None:
        monkeypatch.undo()
        interrupt()

    monkeypatch.setattr(subprocess.Popen, "_close_pipe_fds", interrupted)  # Popen calls this after the fork
    with pytest.raises(Interrupt):
        await asyncio.create_subprocess_exec("/bin/sleep", "1000", stdin=PIPE, **BY_POPEN)
    while children():
        await asyncio.sleep(0)


@pytest.fixture
def signalled_by_pid(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The pids that os.kill was called with. Popen.kill calls it, too."""
    pids: list[int] = []
    kill = os.kill

    def note(pid: int, number: int) -> None:
        pids.append(pid)
        kill(pid, number)

    monkeypatch.setattr(os, "kill", note)
    yield pids
    monkeypatch.undo()


@pytest.mark.parametrize("keywords", [{}, BY_POPEN], ids=["in C", "by Popen"])
async def test_program_that_cannot_be_watched_is_ended_by_pidfd_alone(
    signalled_by_pid: list[int], keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise OSError(12, "no memory")

    monkeypatch.setattr(lifecycle, "watch_program", fail)
    monkeypatch.setattr("aiopidfd._programs.transport.watch_program", fail)
    with pytest.raises(OSError, match="no memory"):
        await asyncio.create_subprocess_exec("/bin/sleep", "1000", **keywords)
    assert signalled_by_pid == []
    assert children() == set()


@pytest.mark.parametrize("keywords", [{}, BY_POPEN], ids=["in C", "by Popen"])
async def test_program_that_was_reaped_by_others_and_cannot_be_watched_is_not_signalled(
    signalled_by_pid: list[int], keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have its pid."""

    def reap_first(registry: Registry, program: Any, observer: Any) -> None:
        os.waitpid(program.pid, 0)
        raise OSError(12, "no memory")

    def fail(*args: Any, **more: Any) -> None:
        raise OSError(12, "no memory")

    monkeypatch.setattr("aiopidfd._programs.transport.watch_program", reap_first)
    monkeypatch.setattr(lifecycle, "watch_program", fail)
    with pytest.raises(OSError, match="no memory"):
        await asyncio.create_subprocess_exec("/bin/true", **keywords)
    assert signalled_by_pid == []
    assert children() == set()
