"""wait(): the exit of any process."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

from aiopidfd import ExitStatus, wait
from aiopidfd._kernel.syscalls import can_recover_exit

from ..helpers.children import Stranger, held, one_held

pytestmark = pytest.mark.core


async def test_exit_status_is_that_of_the_child() -> None:
    with one_held() as child:
        ended = asyncio.ensure_future(wait(child.pid))
        child.end(42)
        status = await ended
    assert (status.pid, status.returncode, status.core_dumped, status.source) == (child.pid, 42, False, "reaped")
    assert isinstance(status.rusage, resource.struct_rusage)
    assert status.rusage.ru_maxrss > 0
    assert "returncode=42" in repr(status)


async def test_rusage_is_that_of_the_child() -> None:
    burn = "import time\nwhile time.process_time() < 0.2: pass"
    process = subprocess.Popen(["/usr/bin/env", "python3", "-c", burn])
    status = await wait(process.pid, reap=False)
    assert status.rusage is not None
    assert status.rusage.ru_utime + status.rusage.ru_stime >= 0.2
    process.wait()


@pytest.fixture
def cores() -> Iterator[None]:
    """Let children dump core, to where core_pattern says. The tests do not read the dumps."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard == 0:
        pytest.skip("RLIMIT_CORE forbids cores here, and cannot be raised")
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


async def test_core_dump_is_reported_as_by_waitpid(cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """core_pattern decides, too, whether a core is dumped. The expected answer is that of os.waitpid()."""
    monkeypatch.chdir(tmp_path)
    for number in (signal.SIGABRT, signal.SIGKILL):
        with held(2) as (ours, oracle):
            ended = asyncio.ensure_future(wait(ours.pid))
            await asyncio.sleep(0)
            os.kill(ours.pid, number)
            status = await ended
            assert status.returncode == -number
            os.kill(oracle.pid, number)  # one after the other: if both dump into the same file, one of them may fail
            dumped = os.WCOREDUMP(os.waitpid(oracle.pid, 0)[1])
            assert status.core_dumped is dumped
            if number == signal.SIGABRT and not dumped and is_dumped_to_a_file():
                pytest.fail("no core is dumped although it may be: this test has shown nothing")


def is_dumped_to_a_file() -> bool:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text(encoding="ascii").strip()
    return pattern == "core"


async def test_many_tasks_wait_for_one_child() -> None:
    with one_held() as child:
        waits = [asyncio.ensure_future(wait(child.pid)) for _ in range(20)]
        await asyncio.sleep(0)
        child.end(1)
        statuses = await asyncio.gather(*waits)
    assert all(status is statuses[0] for status in statuses)


async def test_cancelled_wait_leaves_the_child_alone() -> None:
    with one_held() as child:
        waiting = asyncio.ensure_future(wait(child.pid))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        child.end_unreaped(8)
        assert os.waitpid(child.pid, 0)[1] == 8 << 8


async def test_cancelled_wait_does_not_disturb_another() -> None:
    with one_held() as child:
        one, other = (asyncio.ensure_future(wait(child.pid)) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        child.end(2)
        assert (await other).returncode == 2


async def test_status_is_left_for_the_owner_of_a_popen() -> None:
    process = subprocess.Popen(["/bin/sh", "-c", "exit 5"])
    status = await wait(process.pid, reap=False)
    assert (status.returncode, status.source) == (5, "peeked")
    assert process.wait() == 5


async def test_status_is_left_for_the_owner_of_a_multiprocessing_process() -> None:
    process = multiprocessing.get_context("spawn").Process(target=os._exit, args=(6,))
    process.start()
    assert process.pid is not None
    assert (await wait(process.pid, reap=False)).returncode == 6
    process.join()
    assert process.exitcode == 6
    process.close()
    # The spawn context has started the resource tracker, and does not end it.
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


async def test_one_observer_that_reaps_outvotes_those_that_do_not() -> None:
    with one_held() as child:
        gentle = asyncio.ensure_future(wait(child.pid, reap=False))
        await asyncio.sleep(0)
        reaping = asyncio.ensure_future(wait(child.pid))
        await asyncio.sleep(0)
        child.end(1)
        assert (await gentle).source == (await reaping).source == "reaped"
        with pytest.raises(ChildProcessError):
            os.waitpid(child.pid, 0)


async def test_when_the_observer_that_reaps_leaves_the_status_is_left_again() -> None:
    with one_held() as child:
        gentle = asyncio.ensure_future(wait(child.pid, reap=False))
        reaping = asyncio.ensure_future(wait(child.pid))
        await asyncio.sleep(0)
        reaping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reaping
        child.end(1)
        assert (await gentle).source == "peeked"
        assert os.waitpid(child.pid, 0)[1] == 1 << 8


async def test_zombie_is_reported_even_if_first_seen_as_one() -> None:
    with one_held() as child:
        child.end_unreaped(3)
        assert (await wait(child.pid)).returncode == 3


@pytest.mark.parametrize(("pid", "error"), [(0, ValueError), (-5, ValueError), ("7", TypeError), (2.0, TypeError)])
async def test_bad_pid_is_refused(pid: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        await wait(pid)


async def test_reaped_process_is_refused() -> None:
    with one_held() as child:
        child.end(0)
        os.waitpid(child.pid, 0)
        with pytest.raises(ProcessLookupError, match=str(child.pid)):
            await wait(child.pid)


async def test_stranger_is_waited_for_and_its_status_reported_when_its_parent_reaps(backend: str) -> None:
    with Stranger() as stranger:
        waiting = asyncio.ensure_future(wait(stranger.pid))
        await asyncio.sleep(0)
        stranger.send("end")
        stranger.send("reap")
        status = await waiting
    assert status.pid == stranger.pid
    if backend == "pidfd" and can_recover_exit():
        assert (status.returncode, status.source) == (11, "recovered")
    else:
        assert (status.returncode, status.source) == (None, "not-child")


async def test_stranger_that_stays_a_zombie_is_reported_without_a_status() -> None:
    with Stranger() as stranger:
        waiting = asyncio.ensure_future(wait(stranger.pid))
        await asyncio.sleep(0)
        stranger.send("end")
        status = await waiting
        assert (status.returncode, status.source) == (None, "not-child")


def test_exit_statuses_compare_by_value() -> None:
    assert ExitStatus(1, 0, "reaped") == ExitStatus(1, 0, "reaped")
    assert ExitStatus(1, 0, "reaped") != ExitStatus(1, 1 << 8, "reaped")
    assert ExitStatus(1, 0, "reaped") != 1
    assert len({ExitStatus(1, 0, "reaped"), ExitStatus(1, 0, "reaped")}) == 1
    assert ExitStatus(1, 0x8B, "recovered").core_dumped
    assert ExitStatus(1, 0x8B, "recovered").returncode == -11
    assert ExitStatus(1, 0x2A00, "recovered").returncode == 42
    assert ExitStatus(1, 0, "lost").returncode == 255
    assert ExitStatus(1, 0, "not-child").returncode is None
