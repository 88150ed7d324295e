"""Other code reaps our children: each exit is reported once, with its status if the kernel has it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from typing import Any

import pytest

from aiopidfd import ExitStatus, PidfdWatcher, afork, wait
from aiopidfd._kernel.syscalls import can_recover_exit

from ..conftest import LoopFactory, run_on
from ..helpers.children import await_zombie, held, one_held
from ..helpers.lost_status import (
    IGNORE,
    NOCLDWAIT,
    REAP_ALL,
    CheckReported,
    assert_reported,
    drain,
    end_reaped_at_once,
    end_reaped_by_other,
    lost_warnings,
    other_reaper,
    quick_checks,
    watched,
)

__all__ = ["assert_reported", "other_reaper", "quick_checks"]  # fixtures

CULPRITS = {IGNORE: "SIGCHLD is ignored", NOCLDWAIT: "SA_NOCLDWAIT"}


async def test_thread_that_reaps_everything(assert_reported: CheckReported) -> None:
    with one_held() as child:
        waiting = await watched(child.pid)
        end_reaped_by_other(child, 42)
        assert_reported(await waiting, child.pid, 42, "another thread or library")


async def test_signal_that_killed_a_child_that_others_reaped_is_reported(assert_reported: CheckReported) -> None:
    with one_held() as child:
        waiting = await watched(child.pid)
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        assert_reported(await waiting, child.pid, -signal.SIGKILL, "another thread or library")


@pytest.mark.parametrize("when", ["before", "after"])
async def test_python_handler_that_reaps_everything(
    when: str, other_reaper: ctypes.CDLL, assert_reported: CheckReported
) -> None:
    reaped: list[int] = []

    def reap_everything(number: int, frame: Any) -> None:
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                reaped.append(pid)

    with one_held() as child:
        if when == "before":
            signal.signal(signal.SIGCHLD, reap_everything)
        waiting = await watched(child.pid)
        if when == "after":
            signal.signal(signal.SIGCHLD, reap_everything)
        end_reaped_at_once(child, 7)
        assert reaped == [child.pid]
        assert_reported(await waiting, child.pid, 7, "the SIGCHLD handler <function test_python_handler")


@pytest.mark.parametrize("when", ["before", "after"])
async def test_c_handler_that_reaps_everything(
    when: str, other_reaper: ctypes.CDLL, backend: str, assert_reported: CheckReported
) -> None:
    with one_held() as child:
        if when == "before":
            other_reaper.other_set_sigchld(REAP_ALL)
        waiting = await watched(child.pid)
        if when == "after":
            other_reaper.other_set_sigchld(REAP_ALL)
        end_reaped_at_once(child, 8)
        assert_reported(await waiting, child.pid, 8, f"the SIGCHLD handler in {other_reaper._name}")


@pytest.mark.parametrize("how", [IGNORE, NOCLDWAIT])
async def test_kernel_that_reaps_since_before_the_child(
    how: int, other_reaper: ctypes.CDLL, backend: str, caplog: pytest.LogCaptureFixture, assert_reported: CheckReported
) -> None:
    other_reaper.other_set_sigchld(how)
    with one_held() as child:
        waiting = await watched(child.pid)
        if backend == "sigchld":  # our handler has replaced that setting, and has logged it
            child.end(9)
            status = await waiting
            assert (status.returncode, status.source) == (9, "reaped")
            assert "other children of this process must be waited for" in caplog.text
        else:
            end_reaped_at_once(child, 9)
            assert_reported(await waiting, child.pid, 9, CULPRITS[how])


@pytest.mark.parametrize("how", [IGNORE, NOCLDWAIT])
async def test_kernel_that_reaps_since_the_child_is_watched(
    how: int, other_reaper: ctypes.CDLL, assert_reported: CheckReported
) -> None:
    with one_held() as child:
        waiting = await watched(child.pid)
        other_reaper.other_set_sigchld(how)
        end_reaped_at_once(child, 10)
        assert_reported(await waiting, child.pid, 10, CULPRITS[how])


async def test_sigchld_ignored_from_python(other_reaper: ctypes.CDLL, assert_reported: CheckReported) -> None:
    with one_held() as child:
        waiting = await watched(child.pid)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        end_reaped_at_once(child, 11)
        assert_reported(await waiting, child.pid, 11, "SIGCHLD is ignored")


async def test_popen_that_polls_its_own_child(assert_reported: CheckReported) -> None:
    process = subprocess.Popen(["/bin/sh", "-c", "read code; exit $code"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    waiting = await watched(process.pid)
    process.stdin.write(b"12\n")
    process.stdin.close()
    await_zombie(process.pid)
    assert process.poll() == 12
    assert_reported(await waiting, process.pid, 12, "another thread or library")


def test_watchers_of_two_loops_in_two_threads(
    loop_factory: LoopFactory, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One of them reaps, and both are notified. By pid, the other one only sees that it was too late."""
    watching = threading.Barrier(3, timeout=30)
    reported: list[ExitStatus] = []

    async def watch(pid: int) -> None:
        waiting = await watched(pid)
        watching.wait()
        reported.append(await waiting)

    with one_held() as child:
        threads = [threading.Thread(target=run_on, args=(loop_factory, watch(child.pid))) for _ in range(2)]
        for thread in threads:
            thread.start()
        watching.wait()
        child.end(13)
        for thread in threads:
            thread.join()
    sources = sorted(status.source for status in reported)
    if backend == "pidfd" and can_recover_exit():
        assert [status.returncode for status in reported] == [13, 13]
        assert sources == ["reaped", "recovered"]
    else:
        assert sorted(status.returncode or 0 for status in reported) == [13, 255]
        assert sources == ["lost", "reaped"]
        assert len(lost_warnings(caplog)) == 1


async def test_every_kind_of_observer_is_notified_once_of_an_exit_that_others_reaped(assert_reported: CheckReported) -> None:
    calls: list[int] = []
    child = await afork(signal.pause, pdeathsig=signal.SIGKILL)
    PidfdWatcher().add_child_handler(child.pid, lambda pid, code: calls.append(code))
    waiting, peeking = await watched(child.pid), asyncio.ensure_future(wait(child.pid, reap=False))
    await asyncio.sleep(0)
    child.terminate()
    os.waitpid(child.pid, 0)
    code = await child.wait()
    await drain()
    assert calls == [code]
    status = child.exit_status
    assert status is await waiting is await peeking
    assert status is not None
    assert_reported(status, child.pid, -signal.SIGTERM, "another thread or library")


async def test_half_of_many_children_are_reaped_by_others(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    """More than one batch, in one round of the loop."""
    with held(150) as all_of_them:
        waiting = [await watched(child.pid) for child in all_of_them]
        for number, child in enumerate(all_of_them):
            child.end_unreaped(number)
            if number % 2:
                os.waitpid(child.pid, 0)
        statuses = await asyncio.gather(*waiting)
    recovers = backend == "pidfd" and can_recover_exit()
    expected = [number if recovers or not number % 2 else 255 for number in range(150)]
    assert [status.returncode for status in statuses] == expected
    assert len(lost_warnings(caplog)) == (0 if recovers else 75)
