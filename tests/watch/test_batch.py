"""Between the reaping of a batch and the closing of its pidfds: what a signal handler of Python's may do there."""

from __future__ import annotations

import asyncio
import os

import pytest

from aiopidfd import PidfdWatcher
from aiopidfd._kernel.reaper import Reaper
from aiopidfd._watch.registries import registry_of

from ..conftest import BACKENDS as WORKING
from ..helpers.children import one_held

BACKENDS = ["pidfd"]  # for conftest: the other one has no descriptors

pytestmark = [pytest.mark.core, pytest.mark.skipif("pidfd" not in WORKING, reason="pidfds are forbidden here")]


async def test_pidfd_of_a_child_that_is_dropped_amid_its_batch_is_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another descriptor's a moment later."""
    registry, watcher = registry_of(asyncio.get_running_loop()), PidfdWatcher()
    reap = Reaper.reap
    somebodys: list[int] = []

    def reap_and_drop(reaper: Reaper) -> object:
        batch = reap(reaper)
        if batch[0] and not somebodys:
            pidfd = registry._children[child.pid].pidfd
            assert watcher.remove_child_handler(child.pid)
            somebodys.append(os.dup(0))
            assert somebodys == [pidfd]
        return batch

    with one_held() as child, one_held() as other:
        reported = asyncio.get_running_loop().create_future()
        watcher.add_child_handler(child.pid, lambda *_: reported.set_exception(AssertionError("it was dropped")))
        monkeypatch.setattr(Reaper, "reap", reap_and_drop)
        child.end_unreaped(1)
        while not somebodys:
            await asyncio.sleep(0)
        watcher.add_child_handler(other.pid, lambda pid, code: reported.set_result(code))
        other.end(2)
        assert await reported == 2
        os.close(somebodys[0])  # EBADF if we have closed it
