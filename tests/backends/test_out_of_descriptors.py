"""Out of descriptors: children are watched and forked."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
from collections.abc import Iterator

import pytest

from aiopidfd import PidfdWatcher, afork
from aiopidfd._backends.pidfd_backend import PidfdBackend
from aiopidfd._kernel.syscalls import error
from aiopidfd._watch.registries import registry_of

from ..conftest import BACKENDS, children
from ..helpers.children import held
from ..helpers.lost_status import quick_checks, watched

__all__ = ["quick_checks"]  # fixtures


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[int]:
    """Lower RLIMIT_NOFILE so that exactly `count` more descriptors can be opened. Yield the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(count + 1)]
    for fd in free:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], hard))
    try:
        yield free[count]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_children_without_a_descriptor_are_watched_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AIOPIDFD_BACKEND", "auto")
    with held(6) as all_of_them:
        waiting = [await watched(all_of_them[0].pid)]
        with descriptors_left(0) as limit:
            waiting += [await watched(child.pid) for child in all_of_them[1:3]]
            registry = registry_of(asyncio.get_running_loop())
            assert [registry._children[child.pid].backend.name for child in all_of_them[:3]] in (
                ["pidfd", "sigchld", "sigchld"],
                ["sigchld"] * 3,
            )
            all_of_them[1].end(1)
            assert (await waiting[1]).returncode == 1
        waiting += [await watched(child.pid) for child in all_of_them[3:]]
        for number, child in enumerate(all_of_them):
            if number != 1:
                child.end(number)
        assert [(await one).returncode for one in waiting] == list(range(6))
    if BACKENDS[0] == "pidfd":
        (message,) = (record.getMessage() for record in caplog.records)
        assert "RLIMIT_NOFILE" in message
        assert f"(soft limit {limit})" in message


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
async def test_shortage_concerns_one_child_only(
    code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if BACKENDS[0] != "pidfd":
        pytest.skip("pidfds are forbidden here")
    monkeypatch.setenv("AIOPIDFD_BACKEND", "auto")

    def fail(self: PidfdBackend, pid: int, flags: int) -> int:
        raise error(code, f"cannot watch pid {pid}")

    with held(2) as (one, two):
        with monkeypatch.context() as patched:
            patched.setattr(PidfdBackend, "add", fail)
            waiting = [await watched(one.pid)]
        waiting.append(await watched(two.pid))
        registry = registry_of(asyncio.get_running_loop())
        assert [registry._children[child.pid].backend.name for child in (one, two)] == ["sigchld", "pidfd"]
        one.end(1)
        two.end(2)
        assert [(await one).returncode for one in waiting] == [1, 2]
    assert "out of descriptors" in caplog.text
    assert ("RLIMIT_NOFILE" if code == errno.EMFILE else "fs.file-max") in caplog.text


@pytest.mark.parametrize("left", [0, 1])
async def test_afork_without_descriptors_fails_before_the_fork(left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    registry_of(asyncio.get_running_loop())
    before = children()
    with descriptors_left(left), monkeypatch.context() as patched:
        patched.setattr(os, "fork", lambda: pytest.fail("forked"))
        with pytest.raises(OSError, match="RLIMIT_NOFILE"):
            await afork(signal.pause, pdeathsig=signal.SIGKILL)
    assert children() == before
    async with await afork(signal.pause, pdeathsig=signal.SIGKILL) as child:  # nothing is broken
        assert child.returncode is None


async def test_afork_with_the_last_descriptors_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for the start gate, none for a pidfd."""
    monkeypatch.setenv("AIOPIDFD_BACKEND", "auto")
    registry_of(asyncio.get_running_loop())
    with descriptors_left(2):
        child = await afork(lambda: 15)
        assert await child.wait() == 15


async def test_subprocess_without_a_descriptor_for_its_pidfd_is_watched() -> None:
    """On any loop, by our subprocess_exec."""
    watcher = PidfdWatcher()
    watcher.attach_loop(asyncio.get_running_loop())
    registry_of(asyncio.get_running_loop())
    try:
        with open(os.devnull, "r+b") as null:
            for left in range(12):  # some of these are enough to start it, but not for its pidfd
                with descriptors_left(left):
                    try:
                        process = await asyncio.create_subprocess_exec(
                            "/bin/sh", "-c", "exit 16", stdin=null, stdout=null, stderr=null
                        )
                    except OSError as exc:
                        assert os.strerror(errno.EMFILE) in str(exc) or "RLIMIT_NOFILE" in str(exc)  # noqa: PT017 - some succeed
                    else:
                        assert await process.wait() == 16
    finally:
        watcher.close()
