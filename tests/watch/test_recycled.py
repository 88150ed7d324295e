"""A pid that is used again while its previous owner, which somebody else has reaped, was not reported yet."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from aiopidfd import ExitStatus, PidfdChildProcess, PidfdWatcher, PosixChildProcess, wait
from aiopidfd._backends.backend import Choice
from aiopidfd._fork.handle import watch_forked
from aiopidfd._kernel.identity import inode_of
from aiopidfd._kernel.syscalls import can_recover_exit
from aiopidfd._watch import collector
from aiopidfd._watch.registries import registry_of
from aiopidfd._watch.registry import claim_pid
from tests.conftest import BACKENDS as AVAILABLE
from tests.conftest import LoopFactory, run_on
from tests.helpers.children import Held, one_held
from tests.helpers.lost_status import drain, other_reaper, recycle

__all__ = ["other_reaper", "recycle"]  # fixtures

BACKENDS = ["pidfd"] if "pidfd" in AVAILABLE else []  # of the loop; of each child, its own

Recycle = Callable[[int], int]
PAIRS = [("pidfd", "pidfd"), ("pidfd", "sigchld"), ("sigchld", "pidfd"), ("sigchld", "sigchld")]


@pytest.fixture(autouse=True)
def distinguishable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip where nothing tells the two apart; put off the check, which would report the first in any case."""
    if inode_of(os.getpid()) is None or not can_recover_exit():
        pytest.skip("needs pidfds with inodes and PIDFD_INFO_EXIT (Linux 6.15)")
    monkeypatch.setattr(collector, "CHECK_INTERVAL_S", 3600.0)


def reap_first(child: Held, code: int) -> None:
    """End the child and reap it, as somebody else would."""
    child.end(code)
    assert os.waitpid(child.pid, 0) == (child.pid, code << 8)


def observe(pid: int, backend: Choice, how: str) -> asyncio.Future[int]:
    """Observe a child by this backend; return its returncode to be."""
    reported: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def note(pid: int, returncode: int) -> None:
        reported.set_result(returncode)

    def note_status(status: ExitStatus) -> None:
        reported.set_result(-1 if status.returncode is None else status.returncode)

    registry = registry_of(asyncio.get_running_loop())
    if how == "handler":
        PidfdWatcher(backend=backend).add_child_handler(pid, note)
    elif how == "peeking":
        registry.observe(pid, reported, note_status, reap=False, backend=backend)
    elif how == "spawned" and backend == "pidfd":
        registry.observe(pid, reported, note_status, pidfd=registry._reaper.add(pid, 0), is_held=True, is_new=True)
    elif how in ("forked", "spawned"):
        registry.observe(pid, reported, note_status, check=False, backend=backend, is_new=True)
    else:
        registry.observe(pid, reported, note_status, backend=backend)
    return reported


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("by", ["handler", "peeking", "wait"])
@pytest.mark.parametrize("then_by", ["handler", "spawned", "forked", "wait"])
async def test_both_owners_of_a_number_are_reported(
    first: Choice, second: Choice, by: str, then_by: str, recycle: Recycle
) -> None:
    with one_held() as child:
        old = observe(child.pid, first, by)
        await drain()
        reap_first(child, 5)
        order = recycle(child.pid)
        new = observe(child.pid, second, then_by)
        assert await asyncio.wait_for(old, 10) == (5 if first == "pidfd" else 255)
        await drain()
        assert not new.done()
        os.write(order, b"6\n")
        if second == "sigchld":
            os.kill(os.getpid(), signal.SIGCHLD)  # what has made it has its end signalled to nobody
        assert await asyncio.wait_for(new, 10) == 6


@pytest.mark.parametrize("first", ["pidfd", "sigchld"])
async def test_handle_of_a_new_child_is_not_that_of_the_last(first: Choice, recycle: Recycle) -> None:
    with one_held() as child:
        old = PosixChildProcess(child.pid) if first == "sigchld" else PidfdChildProcess(child.pid, os.pidfd_open(child.pid))
        reap_first(child, 5)
        order = recycle(child.pid)
        new = watch_forked(child.pid, pgid=None)
        assert await asyncio.wait_for(old.wait(), 10) == (5 if first == "pidfd" else 255)
        os.write(order, b"6\n")
        assert await asyncio.wait_for(new.wait(), 10) == 6


async def test_number_of_a_child_of_another_loop_is_not_confused(loop_factory: LoopFactory, recycle: Recycle) -> None:
    """The other loop knows it by pid alone, and would reap the new child of this one."""
    watching, is_recycled, noticed, go_on = (threading.Event() for _ in range(4))
    reported: list[int] = []

    async def watch_elsewhere() -> None:
        old = observe(child.pid, "sigchld", "handler")
        watching.set()
        is_recycled.wait(10)  # or that loop would report the child before
        reported.append(await asyncio.wait_for(old, 10))
        noticed.set()
        go_on.wait(10)

    with one_held() as child:
        thread = threading.Thread(target=lambda: run_on(loop_factory, watch_elsewhere()))
        thread.start()
        watching.wait(10)
        reap_first(child, 5)
        order = recycle(child.pid)
        new = observe(child.pid, "pidfd", "spawned")
        is_recycled.set()
        os.write(order, b"6\n")
        noticed.wait(10)  # this loop would be the first to reap it
        assert await asyncio.wait_for(new, 10) == 6
        go_on.set()
        thread.join()
        assert reported == [255]


def test_number_of_a_child_that_outlived_its_loop_is_not_confused(loop_factory: LoopFactory, recycle: Recycle) -> None:
    async def abandon() -> None:
        observe(child.pid, "pidfd", "handler")

    async def use() -> None:
        claim_pid(child.pid)
        os.write(order, b"6\n")
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        os.kill(os.getpid(), signal.SIGCHLD)
        assert (await wait(child.pid)).source == "reaped"

    with one_held() as child:
        run_on(loop_factory, abandon())
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # or the handler would be first
        try:
            reap_first(child, 5)
            order = recycle(child.pid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        run_on(loop_factory, use())


async def test_signal_does_not_reach_the_next_child_of_that_number(recycle: Recycle, caplog: Any) -> None:
    with one_held() as child:
        handle = PosixChildProcess(child.pid)
        reap_first(child, 5)
        order = recycle(child.pid)
        handle.kill()
        assert f"signal 9 not sent: child process {child.pid} has ended" in caplog.messages
        assert await asyncio.wait_for(handle.wait(), 10) == 255
        os.write(order, b"6\n")
        assert os.waitpid(child.pid, 0) == (child.pid, 6 << 8)
