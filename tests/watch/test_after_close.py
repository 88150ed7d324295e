"""Children that outlive their loop: they can still be signalled, and nobody else is hit."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import aiopidfd
from aiopidfd import PidfdWatcher
from aiopidfd._backends import orphans, sigchld_backend
from aiopidfd._kernel import identity, syscalls
from aiopidfd._watch import registries
from tests.conftest import BACKENDS, LoopFactory, children
from tests.helpers.children import Held, few_descriptors, one_held
from tests.helpers.workers import wait_for_signal


def run(loop_factory: LoopFactory, function: Callable[[], Any]) -> Any:
    """Return what `function` returns, on a loop that is closed then."""
    loop = loop_factory()
    watcher = PidfdWatcher()
    watcher.attach_loop(loop)
    try:
        return loop.run_until_complete(function())
    finally:
        loop.close()


async def start_program() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec("sleep", "60", stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def start_child() -> aiopidfd.AbstractChildProcess:
    child = await aiopidfd.afork(wait_for_signal, start_new_session=True)
    child.detach()
    return child


async def start_child_in_a_group() -> aiopidfd.AbstractChildProcess:
    child = await aiopidfd.afork(wait_for_signal, process_group=0)
    child.detach()
    return child


def await_end(pid: int) -> None:
    """Return once the child has ended and the handler has reaped it."""
    deadline = time.monotonic() + 10
    while pid in children():
        assert time.monotonic() < deadline, "it lives"
        time.sleep(0.002)


@pytest.mark.parametrize("how", ["terminate", "kill", "send_signal", "close"])
def test_program_is_ended_after_its_loop_was_closed(
    loop_factory: LoopFactory, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    process = run(loop_factory, start_program)
    if how == "close":
        process._transport.close()
    elif how == "send_signal":
        process.send_signal(signal.SIGINT)
    else:
        getattr(process, how)()
    await_end(process.pid)
    assert not caplog.records
    if how != "close":
        process._transport.close()


@pytest.mark.parametrize("start", [start_child, start_child_in_a_group])
@pytest.mark.parametrize("how", ["terminate", "kill", "signal_group"])
def test_child_is_ended_after_its_loop_was_closed(
    loop_factory: LoopFactory, how: str, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    child = run(loop_factory, start)
    if how == "signal_group":
        child.signal_group(signal.SIGHUP)
    else:
        getattr(child, how)()
    await_end(child.pid)
    assert not caplog.records
    child.terminate()
    assert caplog.messages == [f"signal 15 not sent: child process {child.pid} has ended"]


def test_no_pidfd_is_left_open(loop_factory: LoopFactory) -> None:
    process = run(loop_factory, start_program)
    before = set(os.listdir("/proc/self/fd"))
    process.send_signal(0)
    assert set(os.listdir("/proc/self/fd")) == before
    process._transport.close()
    await_end(process.pid)


@pytest.mark.parametrize("known_by", ["inode", "start", "nothing"])
def test_signal_goes_to_no_other_process_with_the_number(
    loop_factory: LoopFactory, known_by: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The child that is there is another one than at the time of the closing, as far as its identity says."""
    if known_by != "inode":
        monkeypatch.setattr(identity, "inode_of", lambda *_: None)
    if known_by == "nothing":
        monkeypatch.setattr(identity, "read_start_time", lambda *_: None)
    child = run(loop_factory, start_child)
    monkeypatch.setattr(orphans, "inode_of", lambda *_: 1)
    monkeypatch.setattr(orphans, "read_start_time", lambda *_: b"1")
    child.kill()
    child.signal_group(signal.SIGKILL)
    assert child.pid in children()
    if known_by == "nothing":
        assert all("may be another one by now" in message for message in caplog.messages)
    else:
        assert caplog.messages == [f"signal 9 not sent: child process {child.pid} has ended"] * 2
    os.kill(child.pid, signal.SIGKILL)
    await_end(child.pid)


def test_signal_that_needs_a_descriptor_says_so(loop_factory: LoopFactory, backend: str) -> None:
    child = run(loop_factory, start_child)
    if identity.inode_of(os.getpid()) is None:
        pytest.skip("pidfds have no inodes of their own here (Linux before 6.9)")
    with few_descriptors(0), pytest.raises(OSError, match="out of descriptors"):
        child.kill()
    assert child.pid in children()
    child.kill()
    await_end(child.pid)


def test_without_pidfds_the_start_time_decides(loop_factory: LoopFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise syscalls.error(38, "pidfd_open")

    monkeypatch.setattr(identity, "inode_of", lambda *_: None)
    child = run(loop_factory, start_child)
    monkeypatch.setattr(syscalls, "open_pidfd", refuse)
    child.terminate()
    await_end(child.pid)


def test_forked_process_does_not_signal_its_parents_child(loop_factory: LoopFactory, capfd: Any) -> None:
    """The loop was closed before the fork, or is the parent's. Who is alive answers, and who was killed never will."""
    pipes: list[socket.socket] = []

    async def start_answering() -> aiopidfd.AbstractChildProcess:
        ours, theirs = socket.socketpair()
        pipes.append(ours)
        with theirs:

            def answer() -> None:
                theirs.send(theirs.recv(1))
                wait_for_signal()

            child = await aiopidfd.afork(answer, start_new_session=True)
        child.detach()
        return child

    loop = loop_factory()
    child = run(loop_factory, start_answering)
    other = loop.run_until_complete(start_answering())
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for handle in (child, other):
                handle.kill()
                handle.signal_group(signal.SIGKILL)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    for ours in pipes:
        with ours:
            ours.send(b"x")
            assert ours.recv(1) == b"x"
    loop.close()
    for handle in (child, other):
        handle.kill()
        await_end(handle.pid)


def test_child_whose_status_was_taken_before_the_closing_has_ended(
    loop_factory: LoopFactory, caplog: pytest.LogCaptureFixture
) -> None:
    loop = loop_factory()
    child = loop.run_until_complete(start_child())
    os.kill(child.pid, signal.SIGKILL)
    os.waitpid(child.pid, 0)
    loop.close()
    child.kill()
    assert caplog.messages == [f"signal 9 not sent: child process {child.pid} has ended"]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("pending", ["program", "child", "waiter", "handler"])
def test_loop_that_is_dropped_unclosed_is_collected(pending: str, backend: str) -> None:
    """asyncio's; uvloop keeps its loops that have run in the main thread and were not closed."""

    def drop() -> tuple[int, weakref.ref[Any]]:
        loop = asyncio.SelectorEventLoop()
        watcher.attach_loop(loop)

        async def main() -> int:
            if pending == "program":
                return (await start_program()).pid
            child = await start_child()
            if pending == "waiter":
                waiters.append(weakref.ref(asyncio.ensure_future(aiopidfd.wait(child.pid))))
                await asyncio.sleep(0)
            elif pending == "handler":
                watcher.add_child_handler(child.pid, lambda *_: loop)
            return child.pid

        return loop.run_until_complete(main()), weakref.ref(loop)

    watcher = PidfdWatcher()
    waiters: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        pid, ref = drop()
        gc.collect()
    assert ref() is None
    assert not registries._registries
    os.kill(pid, signal.SIGKILL)
    await_end(pid)


@pytest.mark.parametrize("stream", [None, subprocess.PIPE])
@pytest.mark.parametrize("preexec_fn", [None, int])  # by Popen
def test_one_leaked_program_gives_one_warning(loop_factory: LoopFactory, stream: Any, preexec_fn: Any) -> None:
    async def start() -> Any:
        return await asyncio.create_subprocess_exec("cat", stdin=subprocess.PIPE, stdout=stream, preexec_fn=preexec_fn)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        process = run(loop_factory, start)
        pid = process.pid
        del process
        gc.collect()
    assert [str(warning.message)[:18] for warning in caught if warning.category is ResourceWarning] == ["unclosed transport"]
    await_end(pid)  # its stdin is closed


def test_zombie_that_its_loop_has_not_seen_is_reaped_as_the_loop_is_closed(loop_factory: LoopFactory) -> None:
    """No SIGCHLD will come for it any more."""
    loop = loop_factory()

    async def watch(child: Held) -> None:
        PidfdWatcher().add_child_handler(child.pid, print)

    with one_held() as child:
        loop.run_until_complete(watch(child))
        child.end_unreaped(0)
        loop.close()
        assert child.pid not in children()


def test_signal_to_a_child_of_a_closed_loop_leaves_no_handler_behind(loop_factory: LoopFactory) -> None:
    """While the signal is sent the handler leaves the child alone, and counts it once then."""
    sigchld_backend.settle_abandoned()  # those of earlier tests
    before = syscalls.describe_sigchld()
    program = run(loop_factory, start_program)
    program.send_signal(signal.SIGCONT)
    program._transport.close()  # which kills it
    while children():
        time.sleep(0.001)
    sigchld_backend.settle_abandoned()
    assert syscalls.reap_abandoned() == 0
    assert syscalls.describe_sigchld() == before
