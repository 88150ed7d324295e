"""The SIGCHLD backend beside other children: they cost little, and delay no exit of ours for longer than a check."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import types
from typing import Any

import pytest

from aiopidfd._backends import sigchld_backend
from aiopidfd._kernel import reaper, syscalls

from ..conftest import LoopFactory
from ..helpers.children import held, one_held
from ..helpers.sigchld import backend_of_this_loop, drain, handlers, no_checks, sigchld_at_default, watch

__all__ = ["handlers", "no_checks", "sigchld_at_default"]  # fixtures

BACKENDS = ["sigchld"]  # for conftest


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many children each full scan has found."""
    found: list[int] = []
    reap_all = reaper.Pids.reap_all

    def counted(self: reaper.Pids) -> Any:
        count, records = reap_all(self)
        found.append(count)
        return count, records

    monkeypatch.setattr(reaper.Pids, "reap_all", counted)
    return found


# Exits of other children


async def test_exit_of_somebody_else_s_child_has_none_of_ours_asked_for(
    no_checks: None, scans: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(2) as ours, held(20) as foreign:
        tasks = await watch(*ours)
        looks: list[bool] = []
        begin_scan = sigchld_backend.SigchldBackend.begin_scan

        def note(self: sigchld_backend.SigchldBackend, number: float) -> bool:
            looks.append(begin_scan(self, number))
            return looks[-1]

        monkeypatch.setattr(sigchld_backend.SigchldBackend, "begin_scan", note)
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
    monkeypatch.setattr(sigchld_backend, "_SCAN_DELAY_S", 3600.0)
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
        assert (await task).returncode == 1  # its scan comes first


async def test_exit_that_a_signal_has_named_is_reported_at_once_though_no_scan_is_due(no_checks: None) -> None:
    """A foreign zombie hides it, and there were too many scans."""
    with held(2) as (foreign, ours):
        (task,) = await watch(ours)
        foreign.end_unreaped(9)
        backend_of_this_loop()._scan_after = float("inf")
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
    """A scan takes 20 ms by its clock. Then it pauses for a second. Children that a signal has named are still reported."""
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


async def test_children_that_a_handler_before_ours_has_reaped_are_reported_at_once(no_checks: None, handlers: Any) -> None:
    """It calls our handler, which cannot know which child the signal has named."""
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


# errno


async def test_handler_leaves_errno_as_it_was(handlers: Any, no_checks: None) -> None:
    """The interrupted code may read errno next. waitid() for a reaped child sets it to ECHILD."""
    with held(2) as (watched, reaped):
        (task,) = await watch(watched)
        reaped.end_unreaped(0)
        os.waitpid(reaped.pid, 0)
        assert syscalls.abandon_to_sigchld(reaped.pid)
        assert handlers.errno_after_signal(77) == 77
        assert syscalls.reap_abandoned() == 0
        watched.end(1)
        assert (await task).returncode == 1


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
