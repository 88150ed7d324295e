"""afork(): how a child is made, and what its parent hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import aiopidfd
from aiopidfd import (
    AbstractChildProcess,
    ChildStartError,
    PidfdChildProcess,
    PosixChildProcess,
    _fork,
    _linux,
    afork,
    notify_ready,
)
from aiopidfd._backend import probe_pidfd
from aiopidfd._linux import open_pidfd, set_signal_mask
from aiopidfd._registries import registry_of
from aiopidfd._registry import Registry

from .children import await_zombie, held, one_held
from .conftest import LoopFactory, children, run_on


def block() -> None:
    """What a child does that waits for a signal."""
    while True:
        signal.pause()


async def test_returncode_is_what_child_func_returned() -> None:
    child = await afork(lambda: 7)
    assert await child.wait() == 7
    assert child.returncode == 7
    assert child.exit_status is not None
    assert child.exit_status.source == "reaped"
    assert child.exit_status.rusage is not None


async def test_closures_work_and_memory_is_the_parents() -> None:
    loaded = {"answer": 42}
    assert await (await afork(lambda: loaded["answer"])).wait() == 42


async def test_handle_of_a_running_child() -> None:
    async with await afork(block) as child:
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
    child = await afork(block)
    child.send_signal(sig)
    assert await child.wait() == -sig


async def test_terminate_and_kill() -> None:
    for method, sig in (("terminate", signal.SIGTERM), ("kill", signal.SIGKILL)):
        child = await afork(block)
        getattr(child, method)()
        assert await child.wait() == -sig


async def test_sigkill_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    child = await afork(block)
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
    child = await afork(block)
    os.kill(child.pid, signal.SIGKILL)
    os.waitpid(child.pid, 0)
    child.send_signal(signal.SIGTERM)
    assert "has ended" in caplog.text
    await child.wait()


async def test_signal_goes_by_pid_where_a_filter_has_come_to_forbid_it_by_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EPERM, "refused")

    child = await afork(block)
    monkeypatch.setattr(_linux, "send_signal", refuse)
    child.terminate()
    assert await child.wait() == -signal.SIGTERM


async def test_invalid_signal_is_an_error() -> None:
    async with await afork(block) as child:
        with pytest.raises(OSError, match="signal 99") as caught:
            child.send_signal(99)
        assert caught.value.errno == errno.EINVAL


async def test_child_that_dies_before_it_is_ready_is_an_error_with_its_status() -> None:
    with pytest.raises(ChildStartError, match="before it was ready") as caught:
        await afork(lambda: os._exit(9), ready="manual")
    assert caught.value.exit_status.returncode == 9


async def test_child_that_returns_without_saying_ready_is_an_error_with_its_status() -> None:
    with pytest.raises(ChildStartError) as caught:
        await afork(lambda: 4, ready="manual")
    assert caught.value.exit_status.returncode == 4


async def test_child_killed_by_a_signal_before_it_is_ready() -> None:
    with pytest.raises(ChildStartError) as caught:
        await afork(lambda: os.kill(os.getpid(), signal.SIGSEGV), ready="manual")
    assert caught.value.exit_status.returncode == -signal.SIGSEGV


async def test_child_that_gives_up_its_readiness_but_lives_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fork, "_SILENCE_S", 0.05)

    def exec_away() -> None:
        os.execv("/bin/sleep", ["sleep", "60"])

    with pytest.raises(ChildStartError) as caught:
        await afork(exec_away, ready="manual")
    assert caught.value.exit_status.returncode == -signal.SIGKILL


async def test_manual_readiness_waits_for_notify_ready() -> None:
    read, write = os.pipe()

    def worker() -> int:
        os.read(read, 1)
        notify_ready()
        notify_ready()  # a second one is nothing
        return os.read(read, 1)[0]

    starting = asyncio.ensure_future(afork(worker, ready="manual"))
    await asyncio.sleep(0.05)
    assert not starting.done()
    os.write(write, b"x")
    child = await starting
    os.write(write, b"\x0c")
    assert await child.wait() == 12
    os.close(read)
    os.close(write)


def test_notify_ready_outside_an_aforked_child_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="afork"):
        notify_ready()


@pytest.mark.parametrize(
    ("child_func", "options", "error"),
    [
        (3, {}, TypeError),
        (asyncio.sleep, {}, TypeError),
        (held, {"ready": "sometimes"}, ValueError),
        (lambda: (yield), {}, TypeError),
        (block, {"process_group": "x"}, TypeError),
        (block, {"process_group": -1}, ValueError),
        (block, {"process_group": 0, "start_new_session": True}, ValueError),
        (block, {"pdeathsig": 1000}, ValueError),
    ],
)
async def test_bad_arguments_are_refused_before_anything_is_made(
    child_func: Any, options: dict[str, Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    with pytest.raises(error):
        await afork(child_func, **options)


def test_afork_outside_a_loop_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    coroutine = afork(block)
    with pytest.raises(RuntimeError, match="no running event loop"):
        coroutine.send(None)


async def test_failing_fork_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise OSError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(os, "fork", fail)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    registry_of(asyncio.get_running_loop())  # which has descriptors of its own
    open_before = os.listdir("/proc/self/fd")
    with pytest.raises(BlockingIOError):
        await afork(block)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert os.listdir("/proc/self/fd") == open_before


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM])
async def test_child_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*args: object, **kwargs: object) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Registry, "let_out", lambda *args: False)  # what it does not do, the slow way is there for
    monkeypatch.setattr(_fork, "watch_expected", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        await afork(block)


async def test_interrupt_when_signals_come_in_again_ends_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has waited for that: the child is out of its gate by then, and nobody has its handle."""
    gates: list[int] = []

    def set_mask(mask: int) -> int:
        old = set_signal_mask(mask)
        if mask != _linux.ALL_SIGNALS and children():  # in the parent, after the fork
            gates.extend(gate.fd for gate in registry_of(asyncio.get_running_loop()).gates._gates.values())
            raise KeyboardInterrupt
        return old

    with monkeypatch.context() as patched:
        patched.setattr(_linux, "set_signal_mask", set_mask)
        with pytest.raises(KeyboardInterrupt):
            await afork(block)
    (gate,) = gates
    low = os.pipe()
    read, write = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 200) for fd in low]
    for fd in low:
        os.close(fd)
    os.dup2(read, gate, inheritable=False)  # the number is somebody else's now
    os.set_blocking(gate, False)
    os.write(write, b"x")
    for _ in range(500):
        if children():
            await asyncio.sleep(0.01)
    await asyncio.sleep(0)
    try:
        assert children() == set()
        assert os.read(gate, 1) == b"x"
    finally:
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        for fd in (read, write, gate):
            os.close(fd)


async def test_cancellation_ends_and_reaps_the_child() -> None:
    starting = asyncio.ensure_future(afork(block, ready="manual"))
    await asyncio.sleep(0.02)
    (pid,) = children()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert pid not in children()


async def test_second_cancellation_does_not_cut_the_reaping_short() -> None:
    starting = asyncio.ensure_future(afork(block, ready="manual"))
    await asyncio.sleep(0.02)
    starting.cancel()
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert children() == set()


async def test_child_that_has_ended_when_it_is_heard_to_be_ready_was_ready() -> None:
    starting = asyncio.ensure_future(afork(lambda: 4))
    await asyncio.sleep(0)
    (pid,) = children()
    await_zombie(pid)  # the loop stands still: it will learn of both at once
    assert await (await starting).wait() == 4


async def test_child_that_has_ended_without_a_word_was_not_ready() -> None:
    starting = asyncio.ensure_future(afork(lambda: 4, ready="manual"))
    await asyncio.sleep(0)
    (pid,) = children()
    await_zombie(pid)
    with pytest.raises(ChildStartError) as raised:
        await starting
    assert raised.value.exit_status.returncode == 4


async def test_timeout_around_afork() -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(afork(block, ready="manual"), 0.05)
    assert children() == set()


async def test_many_tasks_wait_and_one_may_be_cancelled() -> None:
    child = await afork(block)
    waits = [asyncio.ensure_future(child.wait()) for _ in range(10)]
    await asyncio.sleep(0)
    waits[0].cancel()
    child.terminate()
    results = await asyncio.gather(*waits, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [-15] * 9
    assert await child.wait() == -15


async def test_wait_from_another_loop_is_an_error(loop_factory: LoopFactory) -> None:
    async with await afork(block) as child:

        def elsewhere() -> None:
            async def main() -> None:
                with pytest.raises(RuntimeError, match="another event loop"):
                    await child.wait()
                with pytest.raises(RuntimeError, match="another event loop"):
                    await child.stop()

            run_on(loop_factory, main())

        await asyncio.get_running_loop().run_in_executor(None, elsewhere)


async def test_signals_may_be_sent_from_any_thread() -> None:
    child = await afork(block)
    await asyncio.get_running_loop().run_in_executor(None, child.terminate)
    assert await child.wait() == -15


async def test_stop_asks_first_and_kills_after_the_grace() -> None:
    read, write = os.pipe()

    def deaf() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        notify_ready()
        block()

    child = await afork(deaf, ready="manual")
    began = time.monotonic()
    assert await child.stop(grace=0.1) == -signal.SIGKILL
    assert time.monotonic() - began >= 0.1

    child = await afork(block)
    assert await child.stop(grace=60) == -signal.SIGTERM
    assert await child.stop() == -signal.SIGTERM
    os.close(read)
    os.close(write)


async def test_async_with_ends_the_child_also_when_cancelled() -> None:
    def deaf() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        notify_ready()
        block()

    pids: list[AbstractChildProcess] = []

    async def use() -> None:
        async with await afork(deaf, ready="manual") as child:
            pids.append(child)
            await asyncio.sleep(0)

    using = asyncio.ensure_future(use())
    while not pids:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.02)  # in stop(), waiting for a child that ignores SIGTERM
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using
    assert await pids[0].wait() == -signal.SIGKILL


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
            block()
        os.close(write)
        notify_ready()
        block()

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
    child = await afork(lambda: 0, process_group=0)
    await child.wait()
    child.signal_group(signal.SIGTERM)
    assert "has ended" in caplog.text


async def test_group_of_another_child_can_be_joined() -> None:
    async with await afork(block, process_group=0) as leader, await afork(block, process_group=leader.pid) as member:
        assert os.getpgid(member.pid) == leader.pid
        member.signal_group(signal.SIGUSR1)
        assert [await leader.wait(), await member.wait()] == [-signal.SIGUSR1] * 2


async def test_signal_group_without_a_group_is_an_error() -> None:
    async with await afork(block) as child:
        with pytest.raises(RuntimeError, match="start_new_session"):
            child.signal_group(signal.SIGTERM)


async def test_impossible_group_is_a_start_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ChildStartError) as caught:
        await afork(block, process_group=1)
    assert caught.value.exit_status.returncode == 1
    assert "PermissionError" in capfd.readouterr().err


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


def test_forks_from_several_threads_take_turns(loop_factory: LoopFactory) -> None:
    results: list[list[int]] = []

    @contextlib.contextmanager
    def thread_warning() -> Iterator[None]:
        if sys.version_info >= (3, 12):
            with pytest.warns(DeprecationWarning, match="multi-threaded"):
                yield
        else:
            yield

    async def fork_some() -> None:
        handles = await asyncio.gather(*[afork(lambda code=code: code) for code in range(10)])  # type: ignore[misc] # lambda
        results.append([await handle.wait() for handle in handles])

    with thread_warning():
        threads = [threading.Thread(target=run_on, args=(loop_factory, fork_some())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [list(range(10))] * 4


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python warns of fork beside threads since 3.12")
async def test_fork_beside_threads_warns_once_from_the_callers_line() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    with pytest.warns(DeprecationWarning, match="multi-threaded") as caught:
        child = await afork(lambda: 0)
    await child.wait()
    done.set()
    thread.join()
    assert len(caught) == 1
    assert caught[0].filename == __file__


def names_of_threads() -> list[str]:
    names = []
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/self/task/{thread}/comm") as comm:
            names.append(comm.read())
    return names


def nest_epolls() -> None:
    """Hold, most of the time, the one lock that the kernel takes to put an epoll into an epoll."""
    wide, *narrow = [select.epoll() for _ in range(300)]
    for epoll in narrow:
        wide.register(epoll)
    top = select.epoll()
    while True:
        top.register(wide)
        top.unregister(wide)


def test_a_worker_of_io_uring_is_no_thread() -> None:
    """libuv changes its epoll by way of io_uring, which takes to a worker when a lock is not free at once."""
    uvloop = pytest.importorskip("uvloop")

    async def fork_beside_worker() -> None:
        loop = asyncio.get_running_loop()
        async with await afork(nest_epolls):
            with select.epoll() as epoll:
                deadline = loop.time() + 5
                while not any(name.startswith("iou-wrk-") for name in names_of_threads()):
                    if loop.time() > deadline:
                        pytest.skip("5 s of trying have not made this uvloop and this kernel use a worker of io_uring")
                    loop.add_reader(epoll.fileno(), print)
                    await asyncio.sleep(0)
                    loop.remove_reader(epoll.fileno())
                    await asyncio.sleep(0)
            assert _linux.count_threads() == 1
            child = await afork(lambda: 3)  # with no warning, which would be an error here
            assert await child.wait() == 3
            assert any(name.startswith("iou-wrk-") for name in names_of_threads())

    run_on(uvloop.new_event_loop, fork_beside_worker())


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


async def test_gate_has_one_holder_on_either_side() -> None:
    """While one child is not ready, another one is forked: it must not hold the first one's gate."""
    starting = asyncio.ensure_future(afork(block, ready="manual"))
    await asyncio.sleep(0.02)
    (gate,) = registry_of(asyncio.get_running_loop()).gates._gates.values()
    inode = os.fstat(gate.fd).st_ino

    def look() -> int:
        return any(os.fstat(int(fd)).st_ino == inode for fd in os.listdir("/proc/self/fd") if _is_open(int(fd)))

    assert await (await afork(look)).wait() == 0
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_public_names_are_exported() -> None:
    for name in aiopidfd.__all__:
        assert getattr(aiopidfd, name) is not None
