"""Another process has the pid of a child that another waitpid() reaped: signals and statuses are not mixed up."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pytest

from aiopidfd import ExitStatus, afork
from aiopidfd._kernel.syscalls import can_recover_exit
from aiopidfd._watch.registries import registry_of

from ..helpers.children import held, one_held
from ..helpers.lost_status import drain, other_reaper, quick_checks, recycle, watched

__all__ = ["other_reaper", "quick_checks", "recycle"]  # fixtures


async def test_signal_does_not_reach_the_next_process_of_that_number(
    backend: str, caplog: pytest.LogCaptureFixture, recycle: Callable[[int], int]
) -> None:
    """Neither before the exit is reported, nor after."""
    if backend != "pidfd":
        pytest.skip("by pid the two cannot be told apart")
    child = await afork(signal.pause, pdeathsig=signal.SIGKILL)
    os.kill(child.pid, signal.SIGKILL)
    os.waitpid(child.pid, 0)
    order = recycle(child.pid)
    child.send_signal(signal.SIGTERM)
    child.kill()
    await child.wait()
    child.kill()
    warned = [record.getMessage() for record in caplog.records if "not sent" in record.getMessage()]
    assert warned == [f"signal {sig} not sent: child process {child.pid} has ended" for sig in (15, 9, 9)]
    os.write(order, b"3\n")
    assert os.waitpid(child.pid, 0)[1] == 3 << 8


@pytest.mark.parametrize("spawned", [False, True])
async def test_next_child_of_the_same_number_is_not_mistaken_for_the_last(
    spawned: bool, backend: str, recycle: Callable[[int], int]
) -> None:
    """Another waitpid() reaped the first, which is not reported yet when the second is watched."""
    if backend != "pidfd" or not can_recover_exit():
        pytest.skip("by pid the two cannot be told apart")
    registry = registry_of(asyncio.get_running_loop())
    reported: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
    with held(100) as others, one_held() as first:
        waiting, *also_waiting = [await watched(child.pid) for child in (first, *others)]
        for child in others:  # so that the first is not in the first batch
            child.end_unreaped(1)
        first.end(5)
        assert os.waitpid(first.pid, 0) == (first.pid, 5 << 8)
        order = recycle(first.pid)
        if spawned:
            pidfd = registry._reaper.add(first.pid, 0)
            registry.observe(first.pid, reported, reported.set_result, pidfd=pidfd, is_held=True, is_new=True)
        else:
            registry.observe(first.pid, reported, reported.set_result)
        assert (await waiting).returncode == 5
        await drain()
        assert not reported.done()
        os.write(order, b"6\n")
        assert (await reported).returncode == 6
        assert [(await one).returncode for one in also_waiting] == [1] * 100
