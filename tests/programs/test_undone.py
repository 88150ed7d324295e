"""Subprocesses whose start is cancelled or fails, or whose status or loop is gone: nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import aiopidfd
from aiopidfd._programs import transport as transports
from aiopidfd._programs.transport import SubprocessTransport
from aiopidfd._watch.registry import Registry

from ..conftest import LoopFactory, open_descriptors, run_on
from ..helpers.subprocesses import (
    BY_POPEN,
    PIPE,
    assert_reaped,
    await_end,
    drain,
    gate,
    plug,  # noqa: F401 - pytest looks for it in this module
    pytest_generate_tests,  # noqa: F401 - pytest looks for it in this module
    reading,
    shell_output,
    talk,
)

# Each test runs on loops of our classes, and on other loops with a watcher: see `plug`.
pytestmark = pytest.mark.usefixtures("plug")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pids of the processes that transports were made for."""
    pids: list[int] = []
    init = SubprocessTransport.__init__

    def note(self: Any, loop: Any, registry: Any, protocol: Any, process: Any, *args: Any) -> None:
        pids.append(process.pid)
        init(self, loop, registry, protocol, process, *args)

    monkeypatch.setattr(SubprocessTransport, "__init__", note)
    return pids


async def test_cancellation_before_the_process_is_handed_over_ends_it_first(started: list[int]) -> None:
    creation = asyncio.ensure_future(asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE, stderr=PIPE))
    await asyncio.sleep(0)
    for _ in range(3):
        creation.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creation
    assert_reaped(started[0])


@pytest.mark.parametrize("rounds", range(3))
async def test_creation_cancelled_after_any_number_of_rounds_leaves_no_process(started: list[int], rounds: int) -> None:
    creation = asyncio.ensure_future(asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE, stderr=PIPE))
    for _ in range(rounds):
        await asyncio.sleep(0)
    if creation.cancel():
        with pytest.raises(asyncio.CancelledError):
            await creation
        for pid in started:
            assert_reaped(pid)
    else:
        await creation.result().communicate(b"")


@pytest.mark.parametrize("transport", ["WritePipeTransport", "ReadPipeTransport"])
async def test_pipe_that_cannot_be_connected_ends_the_process(
    started: list[int], transport: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, "pipe")

    monkeypatch.setattr(transports, transport, fail)
    before = open_descriptors()
    with pytest.raises(OSError, match="pipe"):
        await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    await drain()
    after = {fd for fd, what in open_descriptors().items() if what.startswith("pipe") and before.get(fd) != what}
    assert not after
    assert_reaped(started[0])
    assert caplog.messages == []  # we have reaped it ourselves: nothing is lost


async def test_process_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch, started: list[int]) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise OSError(errno.EMFILE, "too many")

    await shell_output("echo")  # the loop's own descriptors
    before = open_descriptors()
    monkeypatch.setattr(Registry, "observe", fail)
    with pytest.raises(OSError, match="too many"):
        await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE, stderr=PIPE, **BY_POPEN)
    assert_reaped(started[1])
    assert {fd for fd, what in open_descriptors().items() if what.startswith("pipe") and before.get(fd) != what} == set()


async def test_cancellation_does_not_wait_for_a_process_that_may_not_be_killed(
    monkeypatch: pytest.MonkeyPatch, started: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """It may run as another user by now. It stays watched."""

    def refuse(*args: Any) -> bool:
        raise PermissionError(errno.EPERM, "not allowed")

    with gate() as (held, release):
        creation = asyncio.ensure_future(asyncio.create_subprocess_shell(reading(held), pass_fds=(held,)))
        await asyncio.sleep(0)
        monkeypatch.setattr(Registry, "send_signal", refuse)
        creation.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creation
        (pid,) = started
        assert caplog.messages == [f"cannot kill process {pid}: it runs as another user"]
        ended = asyncio.ensure_future(aiopidfd.wait(pid))
        await drain()
        assert not ended.done()
        release()
        assert (await ended).source == "reaped"


@pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning")  # of a Popen that is dropped while its process runs
async def test_failed_creation_does_not_wait_for_a_process_that_may_not_be_killed(
    monkeypatch: pytest.MonkeyPatch, started: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise OSError(errno.EMFILE, "too many")

    def refuse(process: Any) -> None:
        raise PermissionError(errno.EPERM, "not allowed")

    with gate() as (held, release):
        monkeypatch.setattr(Registry, "observe", fail)
        monkeypatch.setattr(subprocess.Popen, "kill", refuse)
        with pytest.raises(OSError, match="too many"):
            await asyncio.create_subprocess_shell(reading(held), stdin=PIPE, pass_fds=(held,), **BY_POPEN)
        (pid,) = started
        assert caplog.messages == [f"cannot kill process {pid}: it runs as another user"]
        monkeypatch.undo()
        gc.collect()
        release()
        await_end(pid)
        subprocess.run(["/bin/true"], check=True)  # Popen reaps old children when it starts another one
        assert_reaped(pid)


@pytest.mark.parametrize("free", range(14))
async def test_shortage_of_descriptors_leaves_no_process_and_no_descriptor(
    started: list[int], free: int, backend: str
) -> None:
    """Whichever step fails: either the process runs, or there is none."""
    if backend == "sigchld" and sys.version_info < (3, 11, 4):
        pytest.skip("Popen itself leaves pipes open before Python 3.11.4: python/cpython#87474")
    await shell_output("echo")  # the loop's own descriptors
    started.clear()
    before = open_descriptors()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    filler: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 40, limits[1]))
        with contextlib.suppress(OSError):  # EMFILE
            while True:
                filler.append(os.open("/dev/null", os.O_RDONLY))
        for fd in filler[len(filler) - free :]:
            os.close(fd)
        del filler[len(filler) - free :]
        process = None
        try:
            process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE, stderr=PIPE)
        except OSError as exc:
            assert exc.errno == errno.EMFILE  # noqa: PT017 - it may succeed, too
    finally:
        for fd in filler:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    if process is not None:
        assert await talk(process, b"x") == (b"x", b"")
    await drain()
    for pid in started:
        assert_reaped(pid)
    assert {fd for fd, what in open_descriptors().items() if what.startswith("pipe") and before.get(fd) != what} == set()


@pytest.fixture
def other_reaper(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], object]], None]:
    """End each process and reap it, before Popen returns it."""
    real = subprocess.Popen

    def install(reap_first: Callable[[Any], object]) -> None:
        def popen(*args: Any, **keywords: Any) -> Any:
            process = real(*args, **keywords)
            reap_first(process)
            return process

        monkeypatch.setattr(subprocess, "Popen", popen)

    return install


async def test_status_taken_before_we_have_a_pidfd_is_255_at_once(
    other_reaper: Any, caplog: pytest.LogCaptureFixture
) -> None:
    other_reaper(lambda process: os.waitpid(process.pid, 0))
    process = await asyncio.create_subprocess_shell("echo x; exit 3", stdout=PIPE, **BY_POPEN)
    assert await talk(process) == (b"x\n", None)
    assert process.returncode == 255
    assert len(caplog.messages) == 1
    assert f"{process.pid}" in caplog.messages[0]
    assert "255" in caplog.messages[0]


async def test_status_that_popen_itself_has_taken_is_not_lost(other_reaper: Any, caplog: pytest.LogCaptureFixture) -> None:
    other_reaper(lambda process: process.wait())
    process = await asyncio.create_subprocess_shell("exit 3", **BY_POPEN)
    assert await process.wait() == 3
    assert caplog.messages == []


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_closed_loop_leaves_no_pidfd_and_later_no_zombie(loop_factory: LoopFactory) -> None:
    with gate() as (held, release):
        loop = loop_factory()
        process = loop.run_until_complete(asyncio_create(loop, reading(held), stdin=PIPE, stdout=PIPE, pass_fds=(held,)))
        pid = process.pid
        loop.close()
        assert not [what for what in open_descriptors().values() if what.startswith(("pidfd:", "anon_inode:[pidfd]"))]
        del process, loop
        gc.collect()
        os.kill(pid, 0)  # it runs
        release()
        await_end(pid)
        run_on(loop_factory, shell_output("echo"))
        assert_reaped(pid)


async def asyncio_create(loop: asyncio.AbstractEventLoop, script: str, **keywords: Any) -> asyncio.subprocess.Process:
    assert asyncio.get_running_loop() is loop
    return await asyncio.create_subprocess_shell(script, **keywords)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_transport_can_be_closed_after_its_loop(loop_factory: LoopFactory) -> None:
    """asyncio's own transport raised "Event loop is closed" until Python 3.14."""
    loop = loop_factory()
    transport, _ = loop.run_until_complete(loop.subprocess_exec(asyncio.SubprocessProtocol, "/bin/cat"))
    pid = transport.get_pid()
    loop.close()
    transport.close()
    assert transport.is_closing()
    del transport, _, loop
    gc.collect()  # closes its stdin, so cat exits
    await_end(pid)
    run_on(loop_factory, shell_output("echo"))
    assert_reaped(pid)
