"""The SIGCHLD backend reaps its children and no others, whatever SIGCHLD is set to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from aiopidfd import afork, wait
from aiopidfd._backends import sigchld_backend
from aiopidfd._fork.handle import PosixChildProcess
from aiopidfd._kernel.syscalls import describe_sigchld

from ..helpers.children import await_zombie, held, one_held
from ..helpers.sigchld import FOUND_BY_CHECK_S, handlers, no_checks, sigchld_at_default, watch, watch_one

__all__ = ["handlers", "no_checks", "sigchld_at_default"]  # fixtures

BACKENDS = ["sigchld"]  # for conftest


async def test_foreign_zombie_in_the_way_is_left_and_ours_are_reaped(no_checks: None) -> None:
    with held(3) as (foreign, one, two):
        foreign.end_unreaped(9)  # it is older than ours, so waitid() finds it first
        tasks = await watch(one, two)
        one.end(1)
        assert (await tasks[0]).returncode == 1
        two.end(2)
        assert (await tasks[1]).returncode == 2
        assert os.waitpid(foreign.pid, 0)[1] == 9 << 8


@pytest.mark.parametrize("foreign", [False, True])
async def test_more_children_than_a_batch_holds_end_at_once(no_checks: None, foreign: bool) -> None:
    with one_held() as zombie:
        if foreign:
            zombie.end_unreaped(0)
        read, write = os.pipe()
        actions = [(os.POSIX_SPAWN_DUP2, read, 0)]
        pids = [os.posix_spawn("/bin/sh", ["sh", "-c", "read x; exit 9"], {}, file_actions=actions) for _ in range(200)]
        os.close(read)
        tasks = [asyncio.ensure_future(wait(pid)) for pid in pids]
        await asyncio.sleep(0)
        os.close(write)
        for pid in pids:
            await_zombie(pid)
        assert [(s.pid, s.returncode, s.source) for s in await asyncio.gather(*tasks)] == [
            (pid, 9, "reaped") for pid in pids
        ]


async def test_signals_of_many_children_that_merge_into_one_are_enough(no_checks: None) -> None:
    with held(20) as children:
        tasks = await watch(*children)
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        for code, child in enumerate(children[1:], 1):
            child.end_unreaped(code)
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        assert [(await task).returncode for task in tasks[1:]] == list(range(1, 20))
        assert not tasks[0].done()
        children[0].end(0)
        await tasks[0]


async def test_afork_gives_a_posix_child_process(no_checks: None) -> None:
    child = await afork(lambda: 7)
    assert type(child) is PosixChildProcess
    assert child.fileno() == -1
    assert await child.wait() == 7


async def test_signal_to_a_child_that_somebody_else_has_reaped_is_not_sent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed: list[tuple[int, int]] = []
    with one_held() as held_child:
        child = PosixChildProcess(held_child.pid)
        held_child.end(0)
        os.waitpid(child.pid, 0)  # from now on another process may have the pid
        with monkeypatch.context() as patched:
            patched.setattr(os, "kill", lambda *args: killed.append(args))
            child.terminate()
        assert killed == []
        assert f"signal 15 not sent: child process {child.pid} has ended" in caplog.text
        assert await child.wait() == 255
        assert child.exit_status is not None
        assert child.exit_status.source == "lost"


def reap_everything() -> int:
    """Reap all children, as the SIGCHLD handler of gunicorn does. Return how many there were."""
    count = 0
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            count += 1
    return count


@pytest.mark.parametrize("order", ["before", "after"])
async def test_status_that_a_reaping_handler_takes_is_lost_at_once(no_checks: None, order: str) -> None:
    read, write = os.pipe()

    def reap_first(number: int, frame: object) -> None:
        os.write(write, b"x" * reap_everything())

    with held(2) as (one, two):
        if order == "before":
            signal.signal(signal.SIGCHLD, reap_first)
        waiting = await watch_one(one)
        if order == "after":
            signal.signal(signal.SIGCHLD, reap_first)
            await watch_one(two)  # each registration installs our handler again
        one.end(3)
        assert os.read(read, 1) == b"x"  # reaped, before the loop has run
        status = await asyncio.wait_for(waiting, 10)
        assert (status.returncode, status.source) == (255, "lost")
    os.close(read)
    os.close(write)


async def test_reaping_handler_that_replaced_ours_delays_by_one_check() -> None:
    read, write = os.pipe()
    with one_held() as one:
        waiting = await watch_one(one)
        signal.signal(signal.SIGCHLD, lambda number, frame: os.write(write, b"x" * reap_everything()))
        one.end(3)
        assert os.read(read, 1) == b"x"
        status = await asyncio.wait_for(waiting, FOUND_BY_CHECK_S)
        assert (status.returncode, status.source) == (255, "lost")
    os.close(read)
    os.close(write)


# SIGCHLD ignored


def ignore_in_python(handlers: Any) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def discard_in_c(handlers: Any) -> None:
    """As a C program may do. SA_SIGINFO has no meaning with SIG_DFL."""
    assert handlers.set_default(0x2 | 0x4) == 0  # SA_NOCLDWAIT, SA_SIGINFO


@pytest.mark.parametrize(
    ("ignore", "said"), [(ignore_in_python, "SIGCHLD is ignored"), (discard_in_c, "SIGCHLD is handled with SA_NOCLDWAIT")]
)
async def test_ignored_sigchld_costs_no_status_and_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    handlers: Any,
    ignore: Callable[[Any], None],
    said: str,
) -> None:
    monkeypatch.setattr(sigchld_backend, "_warned_of_ignored", False)
    ignore(handlers)
    before = describe_sigchld()
    for code in (3, 4):
        with one_held() as child:
            waiting = await watch_one(child)
            child.end(code)
            status = await waiting
            assert (status.returncode, status.source) == (code, "reaped")
            assert describe_sigchld() == before
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith(said)
    assert "other children of this process must be waited for" in record.getMessage()


async def test_sigchld_ignored_later_loses_what_ends_before_the_check_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sigchld_backend, "_warned_of_ignored", False)
    with held(2) as (one, two):
        tasks = await watch(one, two)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        one.end(1)
        with pytest.raises(ChildProcessError):
            os.waitpid(one.pid, 0)  # the kernel has reaped it
        status = await asyncio.wait_for(tasks[0], FOUND_BY_CHECK_S)
        assert (status.returncode, status.source) == (255, "lost")
        assert "SIGCHLD is ignored" in caplog.text
        two.end(2)
        assert (await tasks[1]).returncode == 2


async def test_blocked_sigchld_delays_by_one_check() -> None:
    with one_held() as child:
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        try:
            waiting = await watch_one(child)
            child.end(1)
            assert (await asyncio.wait_for(waiting, FOUND_BY_CHECK_S)).returncode == 1
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
