"""The handle of a child: what can be seen and done by it, from any thread and to the end."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from aiopidfd import AbstractChildProcess, PidfdChildProcess, PosixChildProcess, afork, notify_ready
from aiopidfd._backends.backend import probe_pidfd
from aiopidfd._kernel import syscalls
from aiopidfd._kernel.syscalls import open_pidfd

from ..conftest import LoopFactory, children, run_on
from ..helpers.children import one_held
from ..helpers.workers import wait_for_signal

pytestmark = pytest.mark.core


def deaf() -> None:
    """In a child: ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    notify_ready()
    wait_for_signal()


async def test_handle_of_a_running_child() -> None:
    async with await afork(wait_for_signal) as child:
        assert isinstance(child, AbstractChildProcess)
        assert child.pid in children()
        assert child.returncode is None
        assert child.exit_status is None
        assert repr(child) == f"<{type(child).__name__} pid={child.pid} running>"
        if isinstance(child, PidfdChildProcess):
            with open(f"/proc/self/fdinfo/{child.fileno()}", encoding="ascii") as fdinfo:
                assert f"Pid:\t{child.pid}\n" in fdinfo.read()
    assert child.returncode == -signal.SIGTERM
    assert child.fileno() == -1
    assert repr(child) == f"<{type(child).__name__} pid={child.pid} returncode=-15>"


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
async def test_signal_sent_as_soon_as_afork_returns_ends_the_child(sig: signal.Signals) -> None:
    child = await afork(wait_for_signal)
    child.send_signal(sig)
    assert await child.wait() == -sig


async def test_terminate_and_kill() -> None:
    for method, sig in (("terminate", signal.SIGTERM), ("kill", signal.SIGKILL)):
        child = await afork(wait_for_signal)
        getattr(child, method)()
        assert await child.wait() == -sig


async def test_sigkill_is_logged_for_a_child_that_was_asked_to_end(caplog: pytest.LogCaptureFixture) -> None:
    child = await afork(wait_for_signal)
    child.kill()
    await child.wait()
    assert not caplog.records
    child = await afork(deaf, ready="manual")
    child.terminate()
    child.kill()
    child.kill()
    await child.wait()
    assert [record.getMessage() for record in caplog.records] == [f"Force-killed hanging child: {child.pid}"]


async def test_signal_after_the_end_is_logged_and_not_sent(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = await afork(lambda: 0)
    await child.wait()
    for name in ("kill", "killpg"):
        monkeypatch.setattr(os, name, lambda *args: pytest.fail("a signal was sent by number"))
    child.send_signal(signal.SIGTERM)
    child.kill()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"signal {sig} not sent: child process {child.pid} has ended" for sig in (15, 9)]


async def test_signal_after_somebody_else_reaped_reaches_no_stranger(caplog: pytest.LogCaptureFixture) -> None:
    """The instant in which the child is gone and we have not heard of it yet."""
    child = await afork(wait_for_signal)
    os.kill(child.pid, signal.SIGKILL)
    os.waitpid(child.pid, 0)
    child.send_signal(signal.SIGTERM)
    assert "has ended" in caplog.text
    await child.wait()


async def test_signal_goes_by_pid_where_a_later_filter_forbids_it_by_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EPERM, "refused")

    child = await afork(wait_for_signal)
    monkeypatch.setattr(syscalls, "send_signal", refuse)
    child.terminate()
    assert await child.wait() == -signal.SIGTERM


async def test_invalid_signal_is_an_error() -> None:
    async with await afork(wait_for_signal) as child:
        with pytest.raises(OSError, match="signal 99") as caught:
            child.send_signal(99)
        assert caught.value.errno == errno.EINVAL


async def test_many_tasks_wait_and_one_may_be_cancelled() -> None:
    child = await afork(wait_for_signal)
    waits = [asyncio.ensure_future(child.wait()) for _ in range(10)]
    await asyncio.sleep(0)
    waits[0].cancel()
    child.terminate()
    results = await asyncio.gather(*waits, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [-15] * 9
    assert await child.wait() == -15


async def test_wait_from_another_loop_is_an_error(loop_factory: LoopFactory) -> None:
    async with await afork(wait_for_signal) as child:

        def elsewhere() -> None:
            async def main() -> None:
                with pytest.raises(RuntimeError, match="another event loop"):
                    await child.wait()
                with pytest.raises(RuntimeError, match="another event loop"):
                    await child.stop()

            run_on(loop_factory, main())

        await asyncio.get_running_loop().run_in_executor(None, elsewhere)


async def test_signals_may_be_sent_from_any_thread() -> None:
    child = await afork(wait_for_signal)
    await asyncio.get_running_loop().run_in_executor(None, child.terminate)
    assert await child.wait() == -15


async def test_stop_asks_first_and_kills_after_the_grace(caplog: pytest.LogCaptureFixture) -> None:
    child = await afork(deaf, ready="manual")
    began = time.monotonic()
    assert await child.stop(grace=0.1) == -signal.SIGKILL
    assert time.monotonic() - began >= 0.1
    assert [record.getMessage() for record in caplog.records] == [f"Force-killed hanging child: {child.pid}"]

    child = await afork(wait_for_signal)
    assert await child.stop(grace=60) == -signal.SIGTERM
    assert await child.stop() == -signal.SIGTERM


async def test_async_with_ends_the_child_also_when_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    pids: list[AbstractChildProcess] = []

    async def use() -> None:
        async with await afork(deaf, ready="manual") as child:
            pids.append(child)
            await asyncio.sleep(0)

    using = asyncio.ensure_future(use())
    while not pids:
        await asyncio.sleep(0)
    for _ in range(3):
        await asyncio.sleep(0)  # in stop(), waiting for a child that ignores SIGTERM
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using
    try:
        assert await asyncio.wait_for(pids[0].wait(), 10) == -signal.SIGKILL
    finally:
        if pids[0].returncode is None:
            pids[0].kill()
    assert not caplog.records


async def test_dropped_handle_warns_and_its_child_is_reaped_not_killed() -> None:
    read, write = os.pipe()
    child = await afork(lambda: os.read(read, 1)[0])
    pid = child.pid
    with pytest.warns(ResourceWarning, match=f"pid={pid} running.*detach"):
        del child
        gc.collect()
    assert pid in children()
    os.write(write, b"\x05")
    while pid in children():
        await asyncio.sleep(0.01)
    os.close(read)
    os.close(write)


async def test_detached_handle_may_be_dropped() -> None:
    read, write = os.pipe()
    child = await afork(lambda: os.read(read, 1)[0])
    pid = child.pid
    child.detach()
    del child
    gc.collect()
    os.write(write, b"\x05")
    while pid in children():
        await asyncio.sleep(0.01)
    os.close(read)
    os.close(write)


async def test_group_is_signalled_as_a_whole() -> None:
    read, write = os.pipe()

    def family() -> None:
        if os.fork() == 0:
            os.close(read)
            wait_for_signal()
        os.close(write)
        notify_ready()
        wait_for_signal()

    for options in ({"start_new_session": True}, {"process_group": 0}):
        child = await afork(family, ready="manual", **options)
        assert os.getpgid(child.pid) == child.pid
        assert (os.getsid(child.pid) == child.pid) is ("start_new_session" in options)
        child.signal_group(signal.SIGTERM)
        assert await child.wait() == -signal.SIGTERM
    # The grandchildren hold the write end: its end of file is theirs.
    os.close(write)
    assert await asyncio.get_running_loop().run_in_executor(None, os.read, read, 1) == b""
    os.close(read)


async def test_group_after_the_end_is_not_signalled(caplog: pytest.LogCaptureFixture) -> None:
    """Its number may be another group's by then. Here it is a grandchild's, which must not be hit."""
    orders, order = os.pipe()
    said, say = os.pipe()

    def family() -> None:
        if os.fork() == 0:
            os.write(say, os.read(orders, 1))
            os._exit(0)

    child = await afork(family, process_group=0)
    os.close(say)
    await child.wait()
    child.signal_group(signal.SIGTERM)
    assert "has ended" in caplog.text
    os.write(order, b"x")
    assert os.read(said, 1) == b"x"
    assert os.read(said, 1) == b""  # the grandchild has ended
    for fd in (orders, order, said):
        os.close(fd)


async def test_group_of_another_child_can_be_joined() -> None:
    async with (
        await afork(wait_for_signal, process_group=0) as leader,
        await afork(wait_for_signal, process_group=leader.pid) as member,
    ):
        assert os.getpgid(member.pid) == leader.pid
        member.signal_group(signal.SIGUSR1)
        assert [await leader.wait(), await member.wait()] == [-signal.SIGUSR1] * 2


async def test_signal_group_without_a_group_is_an_error() -> None:
    async with await afork(wait_for_signal) as child:
        with pytest.raises(RuntimeError, match="start_new_session"):
            child.signal_group(signal.SIGTERM)


async def test_existing_child_is_adopted() -> None:
    if probe_pidfd() is None:
        with one_held() as one:
            pidfd = open_pidfd(one.pid)
            child = PidfdChildProcess(one.pid, pidfd)
            assert child.fileno() == pidfd
            one.end(3)
            assert await child.wait() == 3
    with one_held() as two:
        posix = PosixChildProcess(two.pid)
        assert posix.fileno() == -1
        posix.terminate()
        assert await posix.wait() == -15


async def test_adopting_what_is_no_child_is_refused() -> None:
    with pytest.raises(ValueError, match="not a pidfd"):
        PidfdChildProcess(1, 0)
    with pytest.raises(TypeError):
        PidfdChildProcess(1, "x")  # type: ignore[arg-type] # the point of the test
    with pytest.raises(ChildProcessError):
        PosixChildProcess(1)
    with pytest.raises(ValueError, match="positive"):
        PosixChildProcess(-1)


@pytest.mark.skipif(probe_pidfd() is not None, reason="pidfds are forbidden here")
async def test_adopting_by_the_pidfd_of_another_process_is_refused() -> None:
    pidfd = open_pidfd(os.getpid())
    with pytest.raises(ValueError, match="not a pidfd of process 1"):
        PidfdChildProcess(1, pidfd)
    with pytest.raises(ChildProcessError):
        PidfdChildProcess(os.getpid(), pidfd)
    os.close(pidfd)


async def test_at_interpreter_exit_a_running_child_causes_no_noise() -> None:
    code = (
        "import asyncio, aiopidfd, signal\n"
        "async def main():\n"
        "    global child\n"
        "    asyncio.get_running_loop().slow_callback_duration = 60\n"  # a slow machine is not the noise that is meant
        "    child = await aiopidfd.afork(signal.pause)\n"
        "    print(child.pid, flush=True)\n"
        "    child.detach()\n"
        "asyncio.run(main())\n"
    )
    ran = subprocess.Popen(
        [sys.executable, "-X", "dev", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert ran.stdout is not None
    pid = int(ran.stdout.readline())
    assert ran.wait() == 0
    os.kill(pid, signal.SIGKILL)  # init's child now; it holds the other end of our pipes
    assert ran.communicate()[1] == ""
