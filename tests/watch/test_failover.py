"""A reaper that fails: that is reported once, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
import time
from typing import Any

import pytest

from aiopidfd import PidfdWatcher, afork, wait
from aiopidfd._kernel import syscalls
from aiopidfd._kernel.reaper import Reaper
from aiopidfd._watch import collector
from aiopidfd._watch.registries import registry_of
from tests.conftest import LoopFactory
from tests.helpers.children import held, one_held
from tests.watch.test_context import plugged


class Errors(list[dict[str, Any]]):
    """What the exception handler of the running loop is called with."""

    def __init__(self) -> None:
        super().__init__()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.append(context))


async def lose_reaper(number_is_used: bool) -> socket.socket | None:
    """Close the reaper's descriptor, as somebody else would, once the loop has seen it; its number may be another's then."""
    reaper = registry_of(asyncio.get_running_loop())._reaper
    await asyncio.sleep(0.01)
    if not number_is_used:
        os.close(reaper.fd)
        return None
    with socket.socket(socket.AF_UNIX) as made:
        os.dup2(made.fileno(), reaper.fd)
    return socket.socket(fileno=reaper.fd)


@pytest.mark.parametrize("number_is_used", [False, True])
async def test_children_of_a_closed_reaper_are_reported(number_is_used: bool, backend: str) -> None:
    errors = Errors()
    with held(2) as (child, other):
        waiting = asyncio.ensure_future(wait(child.pid))
        await asyncio.sleep(0)
        stranger = await lose_reaper(number_is_used)
        waiting_too = asyncio.ensure_future(wait(other.pid))  # which notices
        await asyncio.sleep(0)
        other.end(6)
        child.end(5)
        assert (await asyncio.wait_for(waiting, 10)).returncode == 5
        assert (await asyncio.wait_for(waiting_too, 10)).returncode == 6
        if stranger is not None:
            stranger.getsockname()  # it was not closed
            stranger.close()
    assert len(errors) == 1, errors
    assert "cannot reap children with its epoll descriptor" in errors[0]["message"]


async def test_everything_works_after_the_reaper_was_closed() -> None:
    errors = Errors()
    watcher = plugged(asyncio.get_running_loop())
    for _ in range(2):
        with one_held() as child:
            child.end(3)
            assert (await wait(child.pid)).returncode == 3
        process = await asyncio.create_subprocess_exec("sh", "-c", "exit 4")
        assert await process.wait() == 4
        async with await afork(lambda: 5) as forked:
            assert await forked.wait() == 5
        if not errors:
            await lose_reaper(False)
    assert len(errors) <= 1
    watcher.close()


async def test_afork_and_programs_notice_a_closed_reaper() -> None:
    watcher = plugged(asyncio.get_running_loop())
    Errors()
    await wait_once()
    await lose_reaper(False)
    async with await afork(lambda: 5) as forked:
        assert await forked.wait() == 5
    await lose_reaper(False)
    await asyncio.sleep(collector.TRIAL_S)
    process = await asyncio.create_subprocess_exec("sh", "-c", "exit 4")
    assert await process.wait() == 4
    watcher.close()


async def wait_once() -> None:
    with one_held() as child:
        child.end(3)
        assert (await wait(child.pid)).returncode == 3


async def test_error_that_stays_is_reported_once_and_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a seccomp filter that was put in place since."""

    refused: list[int] = []

    def refuse(self: Reaper) -> Any:
        refused.append(self.fd)
        raise syscalls.error(errno.ENOMEM, "epoll_wait()")

    errors = Errors()
    with held(2) as (child, other):
        reported = asyncio.get_running_loop().create_future()
        PidfdWatcher().add_child_handler(child.pid, lambda _, returncode: reported.set_result(returncode))
        monkeypatch.setattr(Reaper, "reap", refuse)
        waiting = asyncio.ensure_future(wait(other.pid))
        await asyncio.sleep(0)
        other.end(6)
        child.end(5)
        began = time.thread_time()
        assert await asyncio.wait_for(reported, 10) == 5
        assert (await asyncio.wait_for(waiting, 10)).returncode == 6
        assert time.thread_time() - began < 0.5
        assert 1 <= len(refused) <= 4
    assert len(errors) == 1
    with one_held() as child:
        child.end(3)
        assert (await asyncio.wait_for(wait(child.pid), 10)).returncode == 3


async def test_error_of_the_check_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise PermissionError(errno.EACCES, "as of a /proc that cannot be read")

    monkeypatch.setattr("aiopidfd._watch.collector.CHECK_INTERVAL_S", 0.01)
    errors = Errors()
    with one_held() as child:
        PidfdWatcher(backend="sigchld").add_child_handler(child.pid, print)
        monkeypatch.setattr("aiopidfd._backends.sigchld_backend.SigchldBackend.check", fail)
        await asyncio.sleep(0.1)
        PidfdWatcher.remove_child_handler(PidfdWatcher(), child.pid)
        registry_of(asyncio.get_running_loop()).close()
    assert len(errors) == 1


def test_interrupted_batch_is_closed_with_the_registry(loop_factory: LoopFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        registry = registry_of(asyncio.get_running_loop())
        for child in children:
            PidfdWatcher().add_child_handler(child.pid, print)
            child.end_unreaped(0)

        note = registry._take_records

        def interrupt(records: Any) -> None:
            note(records)
            raise KeyboardInterrupt

        monkeypatch.setattr(registry, "_take_records", interrupt)
        with pytest.raises(KeyboardInterrupt):
            registry._reap()  # collect() would have the loop call it again
        monkeypatch.undo()

    before = set(os.listdir("/proc/self/fd"))
    with held(3) as children:
        loop = loop_factory()
        loop.run_until_complete(main())
        loop.close()
        pipes = {str(child.pipe) for child in children}
        assert set(os.listdir("/proc/self/fd")) - pipes == before


def test_timers_are_set_in_the_loops_thread(loop_factory: LoopFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it is another thread that watches a child, or finds out that a stranger's zombie is pending."""
    loop = loop_factory()
    threads = set()
    call_later = loop.call_later

    def note(*args: Any, **kwargs: Any) -> Any:
        threads.add(threading.get_ident())
        return call_later(*args, **kwargs)

    monkeypatch.setattr(loop, "call_later", note)
    watcher = PidfdWatcher(backend="sigchld")
    watcher.attach_loop(loop)
    with one_held() as child:
        reported = []
        thread = threading.Thread(target=watcher.add_child_handler, args=(child.pid, lambda *args: reported.append(args)))
        thread.start()  # before the loop runs
        thread.join()
        child.end(3)

        async def main() -> None:
            while not reported:
                await asyncio.sleep(0.01)

        loop.run_until_complete(asyncio.wait_for(main(), 10))
    loop.close()
    watcher.close()
    assert threads == {threading.get_ident()}
