"""afork(): how a child is made, and what its parent hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import aiopidfd
from aiopidfd import ChildStartError, afork, notify_ready
from aiopidfd._fork import afork as forking
from aiopidfd._kernel.threads import count_threads
from aiopidfd._watch.registries import registry_of
from aiopidfd._watch.registry import Registry
from aiopidfd._watch.start_gate import READY

from ..conftest import LoopFactory, children, run_on
from ..helpers.children import await_zombie, held
from ..helpers.workers import wait_for_signal


@pytest.mark.core
async def test_returncode_is_what_child_func_returned() -> None:
    child = await afork(lambda: 7)
    assert await child.wait() == 7
    assert child.returncode == 7
    assert child.exit_status is not None
    assert child.exit_status.source == "reaped"
    assert child.exit_status.rusage is not None


@pytest.mark.core
async def test_closures_work_and_memory_is_the_parents() -> None:
    loaded = {"answer": 42}
    assert await (await afork(lambda: loaded["answer"])).wait() == 42


@pytest.mark.core
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
    monkeypatch.setattr(forking, "_EXIT_TIMEOUT_S", 0.05)

    def exec_away() -> None:
        os.execv("/bin/sleep", ["sleep", "60"])

    with pytest.raises(ChildStartError) as caught:
        await afork(exec_away, ready="manual")
    assert caught.value.exit_status.returncode == -signal.SIGKILL


@pytest.mark.core
async def test_manual_readiness_waits_for_notify_ready() -> None:
    read, write = os.pipe()
    here_read, here = os.pipe()

    def worker() -> int:
        os.write(here, b"x")  # what says that it is ready by itself has said so by now
        os.read(read, 1)
        notify_ready()
        notify_ready()  # a second one is nothing
        return os.read(read, 1)[0]

    starting = asyncio.ensure_future(afork(worker, ready="manual"))
    await asyncio.sleep(0)
    os.read(here_read, 1)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not starting.done()
    os.write(write, b"x")
    child = await starting
    os.write(write, b"\x0c")
    assert await child.wait() == 12
    for fd in (read, write, here_read, here):
        os.close(fd)


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
        (wait_for_signal, {"process_group": "x"}, TypeError),
        (wait_for_signal, {"process_group": -1}, ValueError),
        (wait_for_signal, {"process_group": 0, "start_new_session": True}, ValueError),
        (wait_for_signal, {"pdeathsig": 1000}, ValueError),
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
    coroutine = afork(wait_for_signal)
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
        await afork(wait_for_signal)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert os.listdir("/proc/self/fd") == open_before


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM])
async def test_child_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*args: object, **kwargs: object) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Registry, "release", lambda *args: False)  # what it does not do, the slow way is there for
    monkeypatch.setattr(forking, "watch_prepared", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        await afork(wait_for_signal)


@pytest.mark.core
async def test_cancellation_ends_and_reaps_the_child() -> None:
    starting = asyncio.ensure_future(afork(wait_for_signal, ready="manual"))
    await asyncio.sleep(0)
    (pid,) = children()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert pid not in children()


async def test_second_cancellation_does_not_cut_the_reaping_short() -> None:
    starting = asyncio.ensure_future(afork(wait_for_signal, ready="manual"))
    await asyncio.sleep(0)
    (_,) = children()
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


async def test_word_that_is_unread_at_the_end_of_the_child_counts() -> None:
    """It comes before the end, but the loop may have looked at the gate before both, and at the child after both."""
    loop = asyncio.get_running_loop()
    gates = registry_of(loop).gates
    for word in (READY, b""):
        gate = gates.make(loop)
        ours, childs = socket.socketpair()
        ours.setblocking(False)
        gate.struct.gate = ours.detach()
        with childs:
            childs.send(word)
        gate.on_exit(None)
        assert gate.ready.result() is bool(word)
        gates.close(gate)


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
        await asyncio.wait_for(afork(wait_for_signal, ready="manual"), 0.05)
    assert children() == set()


async def test_impossible_group_is_a_start_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ChildStartError) as caught:
        await afork(wait_for_signal, process_group=1)
    assert caught.value.exit_status.returncode == 1
    assert "PermissionError" in capfd.readouterr().err


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
    """libuv changes its epoll through io_uring, which uses a worker thread if a lock is not free at once."""
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
            assert count_threads() == 1
            child = await afork(lambda: 3)  # with no warning, which would be an error here
            assert await child.wait() == 3
            assert any(name.startswith("iou-wrk-") for name in names_of_threads())

    run_on(uvloop.new_event_loop, fork_beside_worker())


async def test_gate_has_one_holder_on_either_side() -> None:
    """While one child is not ready, another one is forked: it must not hold the first one's gate."""
    starting = asyncio.ensure_future(afork(wait_for_signal, ready="manual"))
    await asyncio.sleep(0)
    (gate,) = registry_of(asyncio.get_running_loop()).gates._gates.values()
    inode = os.fstat(gate.struct.gate).st_ino

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
