"""PidfdWatcher: which callback is called for an exit, when, and how often."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from aiopidfd import PidfdWatcher, wait

from ..helpers.calls import Calls, drain
from ..helpers.children import await_zombie, held, one_held

pytestmark = pytest.mark.core


async def test_callback_gets_pid_returncode_and_arguments() -> None:
    with one_held() as child:
        calls = Calls()
        PidfdWatcher().add_child_handler(child.pid, calls, "a", 2)
        child.end(7)
        assert await calls.all() == [(child.pid, 7, "a", 2)]
        assert calls.threads == {threading.get_ident()}


async def test_returncode_is_negative_signal_number_of_killed_child() -> None:
    with one_held() as child:
        calls = Calls()
        PidfdWatcher().add_child_handler(child.pid, calls)
        os.kill(child.pid, signal.SIGKILL)
        assert await calls.all() == [(child.pid, -signal.SIGKILL)]


async def test_child_that_was_dead_before_registration_is_reported() -> None:
    with one_held() as child:
        child.end_unreaped(3)
        calls = Calls()
        PidfdWatcher().add_child_handler(child.pid, calls)
        assert calls.calls == []  # not during the call itself
        assert await calls.all() == [(child.pid, 3)]


async def test_500_children_ending_at_once_are_each_reported_once() -> None:
    watcher, calls = PidfdWatcher(), Calls(500)
    # All of them read the same pipe. When it is closed, they exit at the same time.
    read, write = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, read, 0)]
    pids = [os.posix_spawn("/bin/sh", ["sh", "-c", "read x; exit 9"], {}, file_actions=actions) for _ in range(500)]
    os.close(read)
    for pid in pids:
        watcher.add_child_handler(pid, calls)
    os.close(write)
    await calls.all()
    await drain()
    assert sorted(calls.calls) == sorted((pid, 9) for pid in pids)


async def test_second_registration_replaces_the_first() -> None:
    with one_held() as child:
        watcher, first, second = PidfdWatcher(), Calls(), Calls()
        watcher.add_child_handler(child.pid, first)
        watcher.add_child_handler(child.pid, second)
        child.end(1)
        await second.all()
        await drain()
        assert first.calls == []


async def test_removed_handler_is_not_called_and_the_child_not_reaped() -> None:
    with one_held() as child:
        watcher, calls = PidfdWatcher(), Calls()
        watcher.add_child_handler(child.pid, calls)
        assert watcher.remove_child_handler(child.pid) is True
        assert watcher.remove_child_handler(child.pid) is False
        child.end_unreaped(4)
        await drain()
        assert calls.calls == []
        assert os.waitpid(child.pid, 0)[1] == 4 << 8


async def test_handler_of_an_ended_child_cannot_be_removed() -> None:
    with one_held() as child:
        watcher, calls = PidfdWatcher(), Calls()
        watcher.add_child_handler(child.pid, calls)
        child.end(0)
        await calls.all()
        assert watcher.remove_child_handler(child.pid) is False


async def test_every_observer_of_a_child_is_notified_once() -> None:
    with one_held() as child:
        first, second = Calls(), Calls()
        PidfdWatcher().add_child_handler(child.pid, first)
        PidfdWatcher().add_child_handler(child.pid, second)
        waits = [asyncio.ensure_future(wait(child.pid, reap=reap)) for reap in (True, False)]
        await asyncio.sleep(0)
        child.end_unreaped(6)
        await drain()
        assert [waiting.done() and waiting.result().returncode for waiting in waits] == [6, 6]
        assert first.calls == second.calls == [(child.pid, 6)]


async def test_loop_gets_one_reader_whatever_the_number_of_children(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    readers: list[Any] = []
    add_reader = loop.add_reader

    def count(fd: int, *args: Any) -> None:
        readers.append(fd)
        add_reader(fd, *args)

    monkeypatch.setattr(loop, "add_reader", count)
    calls = Calls(40)
    with held(40) as children:
        for child in children:
            PidfdWatcher().add_child_handler(child.pid, calls)
            child.end(0)
        await calls.all()
    assert len(set(readers)) == 1


async def test_callback_may_register_the_next_child() -> None:
    watcher = PidfdWatcher()
    with held(2) as (one, two):
        two.end_unreaped(2)
        calls = Calls()
        watcher.add_child_handler(one.pid, lambda pid, code: watcher.add_child_handler(two.pid, calls))
        one.end(1)
        assert await calls.all() == [(two.pid, 2)]


@pytest.mark.parametrize(
    ("pid", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (2**31, ValueError),
        ("1", TypeError),
        (1.0, TypeError),
        (True, TypeError),
        (None, TypeError),
        (1, ChildProcessError),
        pytest.param(os.getpid(), ChildProcessError, id="own"),
    ],
)
async def test_pid_that_cannot_be_watched_is_refused_at_the_call(pid: Any, error: type[Exception]) -> None:
    calls = Calls()
    with pytest.raises(error, match=str(pid) if error is not TypeError else "int"):
        PidfdWatcher().add_child_handler(pid, calls)
    assert PidfdWatcher().remove_child_handler(pid) is False


async def test_reaped_child_is_refused_at_the_call() -> None:
    with one_held() as child:
        child.end(0)
        os.waitpid(child.pid, 0)
        with pytest.raises(ProcessLookupError, match=f"pid {child.pid}.*reaped"):
            PidfdWatcher().add_child_handler(child.pid, Calls())


async def test_callback_that_cannot_be_called_is_refused() -> None:
    with one_held() as child, pytest.raises(TypeError, match="callable"):
        PidfdWatcher().add_child_handler(child.pid, "no function")  # type: ignore[arg-type] # the point of the test


async def test_repr_shows_the_state() -> None:
    watcher = PidfdWatcher()
    assert "active" in repr(watcher)
    watcher.close()
    assert "closed" in repr(watcher)


def test_importing_and_subclassing_warn_of_nothing() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", "import aiopidfd; aiopidfd.PidfdWatcher()"], check=True)


async def test_zombie_helper_leaves_the_child_unreaped() -> None:
    """The tests above need this."""
    with one_held() as child:
        child.end(0)
        await_zombie(child.pid)
        assert os.waitpid(child.pid, 0)[0] == child.pid
