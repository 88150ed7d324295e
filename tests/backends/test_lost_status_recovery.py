"""A status that another waitpid() took: it is recovered if the kernel reports it, otherwise it is lost at once."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import select

import pytest

from aiopidfd import ExitStatus
from aiopidfd._kernel import syscalls
from aiopidfd._kernel.syscalls import can_recover_exit
from aiopidfd._watch import collector
from aiopidfd._watch.registries import registry_of

from ..conftest import BACKENDS, LoopFactory
from ..helpers.children import Stranger, one_held, state_of, traced
from ..helpers.lost_status import CheckReported, assert_reported, drain, end_reaped_by_other, on_loop, quick_checks, watched
from ..helpers.seccomp import compile_c, python_under_filter

__all__ = ["assert_reported", "quick_checks"]  # fixtures

_REAPED_BY_OTHER = """
import asyncio, logging, os, sys
import aiopidfd
logging.basicConfig(stream=sys.stdout, format="%(message)s")
async def main():
    read, write = os.pipe()
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "read x; exit 7"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
    calls = []
    aiopidfd.PidfdWatcher().add_child_handler(pid, lambda pid, code: calls.append(code))
    waiting = asyncio.ensure_future(aiopidfd.wait(pid))
    await asyncio.sleep(0)
    os.write(write, b"\\n")
    os.waitpid(pid, 0)
    status = await asyncio.wait_for(waiting, 10)
    for _ in range(5):
        await asyncio.sleep(0)
    print(status.returncode, status.source, calls, pid)
LOOP
loop.run_until_complete(main())
loop.close()
"""


_WITHOUT_WAITID = """
import asyncio, os
from aiopidfd._watch.registries import registry_of
async def main():
    loop = asyncio.get_running_loop()
    read, write = os.pipe()
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "read x; exit 7"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
    reported = loop.create_future()
    child = registry_of(loop).observe(pid, reported, reported.set_result, check=False)
    os.write(write, b"\\n")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not reported.done() and child.result is None  # it is not reaped yet, so its status is unknown
    os.waitpid(pid, 0)
    status = await asyncio.wait_for(reported, 10)
    print(status.returncode, status.source)
LOOP
loop.run_until_complete(main())
loop.close()
"""


@pytest.mark.parametrize("answer", ["ENOTTY", "EINVAL", "ESRCH"])  # before Linux 6.11, 6.13, 6.15
def test_older_kernel_loses_a_status_that_others_took_at_once_and_warns(
    answer: str, loop_factory: LoopFactory, backend: str
) -> None:
    if backend != "pidfd":
        pytest.skip("the filter is over a call on pidfds")
    output = python_under_filter(f"pidfd_get_info={answer}", on_loop(_REAPED_BY_OTHER, loop_factory))
    warning, reported = output.splitlines()
    returncode, source, calls, pid = reported.split()
    assert (returncode, source, calls) == ("255", "lost", "[255]")
    assert warning.startswith(f"child process pid {pid}: ")
    assert "another thread or library" in warning


def test_status_that_is_not_published_yet_is_waited_for(loop_factory: LoopFactory, backend: str) -> None:
    """The instant between a reap and its report, extended: waitid() fails with ECHILD, the kernel reports nothing."""
    if backend != "pidfd" or not can_recover_exit():
        pytest.skip("there is nothing to wait for here")
    output = python_under_filter(f"waitid_pidfd={errno.ECHILD}", on_loop(_WITHOUT_WAITID, loop_factory))
    assert output == "7 recovered\n"


@pytest.mark.parametrize(("early", "result"), [(0, 1), (1, 1), (100, -errno.ESRCH)])
def test_status_that_the_kernel_is_about_to_publish_is_asked_for_again(early: int, result: int) -> None:
    """ESRCH means an older kernel, or a reap during the call. A second call distinguishes them."""
    if BACKENDS[0] != "pidfd" or not can_recover_exit():
        pytest.skip("there is nothing to recover here")
    library = ctypes.CDLL(str(compile_c("early.c", "-shared", "-fPIC")))
    status = ctypes.c_int(-1)
    with one_held() as child:
        pidfd = syscalls.open_pidfd(child.pid)
        child.end_unreaped(18)
        assert library.ap_pidfd_get_exit(pidfd, ctypes.byref(status)) == 0
        os.waitpid(child.pid, 0)
        ctypes.c_int.in_dll(library, "too_early").value = early
        assert library.ap_pidfd_get_exit(pidfd, ctypes.byref(status)) == result
        os.close(pidfd)
    assert status.value == (18 << 8 if result == 1 else -1)


async def test_stranger_s_status_is_reported_when_its_zombie_is_reaped(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "pidfd" or not can_recover_exit():
        pytest.skip("a stranger's status cannot be known here")
    monkeypatch.setattr(collector, "STRANGER_GRACE_S", 60.0)
    with Stranger() as stranger:
        waiting = await watched(stranger.pid)
        pidfd = os.pidfd_open(stranger.pid)
        stranger.send("end")
        select.select([pidfd], [], [])
        os.close(pidfd)
        await drain()
        assert not waiting.done()
        stranger.send("reap")
        status = await waiting
    assert (status.returncode, status.source) == (11, "recovered")


async def test_child_that_others_reaped_can_be_observed_until_it_is_reported(assert_reported: CheckReported) -> None:
    """Its pid is not used again yet."""
    reported: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
    with one_held() as child:
        waiting = await watched(child.pid)
        end_reaped_by_other(child, 5)
        registry_of(asyncio.get_running_loop()).observe(child.pid, reported, reported.set_result)
        assert await waiting is await reported
        assert_reported(await reported, child.pid, 5, "another thread or library")


async def test_traced_child_is_reported_when_the_tracer_ends() -> None:
    """Its pidfd is readable, but it cannot be reaped. The loop neither blocks nor spins."""
    with one_held() as child, traced(child.pid) as tracer:
        waiting = await watched(child.pid)
        child.end(14)
        while state_of(child.pid) != "Z":
            await asyncio.sleep(0)
        await drain()
        poll = select.poll()
        poll.register(registry_of(asyncio.get_running_loop())._reaper.fd, select.POLLIN)
        assert poll.poll(0) == []  # otherwise the loop would spin
        assert not waiting.done()
        tracer.release()
        status = await waiting
        assert (status.returncode, status.source) == (14, "reaped")
