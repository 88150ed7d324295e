"""The SIGCHLD backend beside others: what is not ours costs little, and hides none of ours for longer than a check."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aiopidfd import PidfdWatcher, wait
from aiopidfd._backends import lost_status, sigchld_backend
from aiopidfd._backends.backend import ENVIRONMENT
from aiopidfd._kernel import reaper, syscalls
from aiopidfd._kernel.exit_status import ExitStatus
from aiopidfd._kernel.syscalls import describe_sigchld
from aiopidfd._watch import collector
from aiopidfd._watch.registries import registry_of

from ..conftest import LoopFactory, children, run_on
from ..helpers.children import Held, held, one_held
from ..helpers.seccomp import compile_c

BACKENDS = ["sigchld"]  # for conftest

# More than the handler bears between two checks.
STORM = 1001

SA_NOCLDWAIT = 2


@pytest.fixture(autouse=True)
def sigchld_at_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start from SIG_DFL and return to it, whatever the test does."""
    monkeypatch.setenv(ENVIRONMENT, "sigchld")
    monkeypatch.setattr(sigchld_backend, "_replaced", (0.0, ""))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@pytest.fixture
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put off the check once a second."""
    monkeypatch.setattr(collector, "CHECK_INTERVAL_S", 3600.0)


@pytest.fixture
def handlers() -> Iterator[Any]:
    """Handlers in C: 0 and 1 call whoever was there before, 1 without a siginfo_t; 2 does not."""
    library = ctypes.CDLL(str(compile_c("handlers.c", "-shared", "-fPIC")))
    yield library
    library.set_flags(2, 0)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What asking for each child has found, each time."""
    found: list[int] = []
    reap_all = reaper.Pids.reap_all

    def counted(self: reaper.Pids) -> Any:
        count, records = reap_all(self)
        found.append(count)
        return count, records

    monkeypatch.setattr(reaper.Pids, "reap_all", counted)
    return found


async def watch(*some: Held) -> list[asyncio.Task[ExitStatus]]:
    """Have children watched; return what waits for each. Nothing of what was signalled before is still to be heeded."""
    tasks = [asyncio.ensure_future(wait(child.pid)) for child in some]
    await drain()
    return tasks


async def drain() -> None:
    """Let the loop do what it can do without waiting."""
    for _ in range(10):
        await asyncio.sleep(0)


def backend_of_this_loop() -> sigchld_backend.SigchldBackend:
    """The one under test."""
    backend = registry_of(asyncio.get_running_loop())._sigchld
    assert backend is not None
    return backend


def check_now() -> None:
    """Do the check of once a second now."""
    registry = registry_of(asyncio.get_running_loop())
    with registry._lock:
        registry._note(backend_of_this_loop().check())
    registry.collect()


# Exits of others


async def test_exit_of_somebody_else_s_child_has_none_of_ours_asked_for(
    no_checks: None, scans: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(2) as ours, held(20) as foreign:
        tasks = await watch(*ours)
        looks: list[bool] = []
        begin_look = sigchld_backend.SigchldBackend.begin_look

        def note(self: sigchld_backend.SigchldBackend, number: float) -> bool:
            looks.append(begin_look(self, number))
            return looks[-1]

        monkeypatch.setattr(sigchld_backend.SigchldBackend, "begin_look", note)
        for child in foreign:
            child.end_unreaped(0)
            os.waitpid(child.pid, 0)
            await drain()
        while True not in looks:
            await asyncio.sleep(0.01)
        await drain()
        assert scans == []
        for child, task in zip(ours, tasks):
            child.end(1)
            assert (await task).returncode == 1
        assert scans == []


async def test_many_exits_of_others_cost_one_look(no_checks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sigchld_backend, "_LOOK_DELAY_S", 3600.0)
    planned: list[float] = []
    with one_held() as ours, held(5) as foreign:
        (task,) = await watch(ours)
        backend = backend_of_this_loop()
        plan = backend._plan

        def note(delay_s: float, number: float) -> None:
            planned.append(delay_s)
            plan(delay_s, number)

        monkeypatch.setattr(backend, "_plan", note)
        for child in foreign:
            child.end_unreaped(0)
            await drain()
            os.waitpid(child.pid, 0)
        assert len(planned) == 1
        ours.end(1)
        assert (await task).returncode == 1  # its look overtakes that one


async def test_exit_that_a_signal_has_named_is_told_at_once_though_no_look_is_due(no_checks: None) -> None:
    """A foreign zombie stands before it, and there has been too much looking."""
    with held(2) as (foreign, ours):
        (task,) = await watch(ours)
        foreign.end_unreaped(9)
        backend_of_this_loop()._look_after = float("inf")
        ours.end_unreaped(7)
        await drain()
        assert task.done()
        assert task.result().returncode == 7


@pytest.mark.parametrize("before", ["foreign exit", "foreign zombie", "kill", "stop"])
async def test_exit_whose_signal_has_merged_with_one_that_is_not_for_us_is_found(no_checks: None, before: str) -> None:
    with held(3) as (foreign, one, two):
        tasks = await watch(one, two)
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        try:
            if before.startswith("foreign"):
                foreign.end_unreaped(9)
            else:
                os.kill(os.getpid(), signal.SIGCHLD)
            one.end_unreaped(1)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        if before == "foreign exit":
            os.waitpid(foreign.pid, 0)
        assert (await asyncio.wait_for(tasks[0], 10)).returncode == 1
        two.end(2)
        assert (await asyncio.wait_for(tasks[1], 10)).returncode == 2


async def test_exits_of_ours_beside_a_zombie_that_nobody_reaps_are_looked_behind_within_a_bound(
    no_checks: None, scans: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look takes 20 ms by its clock: then a second of rest, in which those that were named are told all the same."""
    clock = iter(number * 0.02 for number in range(1000))
    times = types.SimpleNamespace(monotonic=time.monotonic, thread_time=lambda: next(clock))
    with held(12) as (foreign, *ours):
        foreign.end_unreaped(9)
        tasks = await watch(*ours)
        monkeypatch.setattr(sigchld_backend, "time", times)
        for child, task in zip(ours, tasks):
            child.end_unreaped(1)
            await drain()
            assert task.done()
        assert len(scans) <= 3


async def test_look_that_finds_some_is_no_look_in_vain(no_checks: None) -> None:
    with held(30) as ours:
        tasks = await watch(*ours)
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        for child in ours:
            child.end_unreaped(3)
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        await drain()
        assert all(task.done() for task in tasks)


# Signals that nobody's end has sent


def ignore(handlers: Any) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def discard(handlers: Any) -> None:
    assert handlers.set_default(SA_NOCLDWAIT) == 0


def handle_in_python(handlers: Any) -> None:
    signal.signal(signal.SIGCHLD, lambda number, frame: None)


def handle_in_c_and_discard(handlers: Any) -> None:
    handlers.set_flags(2, SA_NOCLDWAIT)
    handlers.install_handler(2)


BEFORE = pytest.mark.parametrize("set_up", [lambda _: None, ignore, discard, handle_in_python, handle_in_c_and_discard])


def storm() -> None:
    """Send more signals than the handler bears."""
    for _ in range(STORM):
        os.kill(os.getpid(), signal.SIGCHLD)


@BEFORE
async def test_storm_has_the_handler_pause_until_the_check(
    no_checks: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    handlers: Any,
    set_up: Callable[[Any], None],
) -> None:
    monkeypatch.setattr(sigchld_backend, "_warned_of_storm", False)
    set_up(handlers)
    before = describe_sigchld()
    with held(3) as (one, two, three):
        tasks = await watch(one, two)
        ours = describe_sigchld()
        storm()
        assert not describe_sigchld().startswith(("ours", "SIG_IGN"))
        assert syscalls.NOCLDWAIT not in describe_sigchld()
        tasks += await watch(three)  # a further child does not end the pause
        assert not describe_sigchld().startswith("ours")
        one.end_unreaped(1)
        await drain()
        assert not tasks[0].done()
        check_now()
        assert describe_sigchld() == ours
        status = await tasks[0]
        assert (status.returncode, status.source) == (1, "reaped")
        two.end_unreaped(2)
        await drain()
        assert tasks[1].result().returncode == 2
        storm()
        assert not describe_sigchld().startswith("ours")
        check_now()
        three.end(3)
        assert (await tasks[2]).returncode == 3
    assert describe_sigchld() == before
    messages = [record.getMessage() for record in caplog.records if "very often" in record.getMessage()]
    assert len(messages) == 1


@BEFORE
async def test_last_child_that_ends_in_a_pause_leaves_what_was_there_before(
    no_checks: None, handlers: Any, set_up: Callable[[Any], None]
) -> None:
    set_up(handlers)
    before = describe_sigchld()
    with one_held() as child:
        watcher = PidfdWatcher()
        watcher.add_child_handler(child.pid, print)
        storm()
        watcher.remove_child_handler(child.pid)
        assert describe_sigchld() == before
        (task,) = await watch(child)
        assert describe_sigchld().startswith("ours")
        child.end(3)
        assert (await task).returncode == 3


async def test_handler_that_comes_in_a_pause_is_called_from_behind_ours(no_checks: None, handlers: Any) -> None:
    with one_held() as child:
        (task,) = await watch(child)
        storm()
        handlers.install_handler(2)
        check_now()
        assert describe_sigchld().startswith("ours")
        calls = handlers.count_calls(2)
        child.end(3)
        assert (await task).returncode == 3
        assert handlers.count_calls(2) == calls + 1


def test_child_that_outlives_its_loop_in_a_pause_is_reaped(loop_factory: LoopFactory, no_checks: None) -> None:
    async def main(child: Held) -> None:
        PidfdWatcher().add_child_handler(child.pid, print)
        storm()

    with one_held() as child:
        run_on(loop_factory, main(child))
        child.end(0)
        while child.pid in children():  # nobody but the handler is there to reap it
            pass
    sigchld_backend.settle_abandoned()
    assert describe_sigchld() == "SIG_DFL"


async def test_fewer_signals_than_a_storm_leave_the_handler_where_it_is(no_checks: None) -> None:
    with one_held() as child:
        (task,) = await watch(child)
        for _ in range(3):
            for _ in range(STORM - 1):
                os.kill(os.getpid(), signal.SIGCHLD)
            assert describe_sigchld() == "ours"
            check_now()
        child.end(1)
        assert (await task).returncode == 1


async def test_children_that_a_handler_before_ours_has_reaped_are_told_of_at_once(no_checks: None, handlers: Any) -> None:
    """It calls ours, which cannot know whom the signal has named."""
    with held(2) as (one, two):
        tasks = await watch(one, two)
        handlers.install_handler(1)
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        for child in (one, two):
            child.end_unreaped(1)
            os.waitpid(child.pid, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert [task.result().source for task in tasks] == ["lost", "lost"]


# What the handler leaves as it was


async def test_handler_leaves_errno_as_it_was(handlers: Any, no_checks: None) -> None:
    """Whatever it interrupts may be about to read it. A child that is no longer there to be reaped sets it to ECHILD."""
    with held(2) as (watched, reaped):
        (task,) = await watch(watched)
        reaped.end_unreaped(0)
        os.waitpid(reaped.pid, 0)
        assert syscalls.abandon_to_sigchld(reaped.pid)
        assert handlers.errno_after_signal(77) == 77
        assert syscalls.reap_abandoned() == 0
        watched.end(1)
        assert (await task).returncode == 1


# Who has reaped


@pytest.mark.parametrize(
    ("present", "recent", "expected"),
    [
        ("SIG_IGN", "", "SIGCHLD is ignored"),
        ("a handler in /x/lib.so with SA_NOCLDWAIT", "", "SIGCHLD is set with SA_NOCLDWAIT"),
        ("a handler in /x/lib.so", "SIG_IGN", "SIGCHLD is ignored, or was a moment ago"),
        (
            "ours, and behind it a handler in /x/lib.so",
            "SIG_DFL with SA_NOCLDWAIT",
            "SIGCHLD is set with SA_NOCLDWAIT, or was",
        ),
        ("ours, and behind it SIG_IGN", "a handler in /x/lib.so", "SIGCHLD was ignored before aiopidfd"),
        ("ours, and behind it a handler in /x/lib.so with SA_NOCLDWAIT", "", "SIGCHLD was set with SA_NOCLDWAIT before"),
        ("ours, and behind it a handler in /x/lib.so", "", "the SIGCHLD handler in /x/lib.so"),
        ("ours", "a handler in /x/lib.so", "the SIGCHLD handler in /x/lib.so"),
        ("ours", "", "another thread"),
    ],
)
def test_warning_of_a_lost_status_looks_everywhere_for_what_has_the_kernel_reap(
    present: str, recent: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syscalls, "describe_sigchld", lambda: present)
    monkeypatch.setattr(sigchld_backend, "recent_replacement", lambda: recent)
    assert lost_status.find_thief().startswith(expected)


@pytest.mark.parametrize("set_up", [ignore, discard, handle_in_c_and_discard])
async def test_what_had_the_kernel_reap_is_found_behind_ours(
    no_checks: None, handlers: Any, set_up: Callable[[Any], None]
) -> None:
    with held(2) as (one, two):
        tasks = await watch(one)
        set_up(handlers)
        one.end(1)
        with pytest.raises(ChildProcessError):
            os.waitpid(one.pid, 0)  # the kernel has reaped it
        tasks += await watch(two)  # puts ours back in front
        assert describe_sigchld().startswith("ours")
        assert "so that the kernel reaps children itself" in lost_status.find_thief()
        sigchld_backend._replaced = (0.0, "")  # as if that were long ago
        assert "before aiopidfd handled it" in lost_status.find_thief()
        check_now()
        assert (await tasks[0]).source == "lost"
        two.end(2)
        assert (await tasks[1]).returncode == 2


# The measurements


def test_measurements_of_what_bystanders_cost_run(loop_factory: LoopFactory) -> None:
    command = [
        sys.executable,
        "-m",
        "bench.bystanders",
        "--pending",
        "2",
        "--times",
        "1",
        "--gap-ms",
        "1",
        "--storm-s",
        "0.1",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.count("2 pending") == 5
