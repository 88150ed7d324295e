"""Whose contextvars context callbacks and protocols run in, and that nobody's is kept."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import weakref
from contextvars import ContextVar, copy_context
from typing import Any

import pytest

import aiopidfd
from aiopidfd import PidfdWatcher
from tests.conftest import LoopFactory
from tests.helpers.children import held, one_held

_user: ContextVar[User | None] = ContextVar("user", default=None)


class User:
    """Somebody whose context can be told from others', and seen to be gone."""

    def __init__(self, name: str) -> None:
        self.name = name


def name_of_user() -> str | None:
    """Who is the user of the current context."""
    user = _user.get()
    return None if user is None else user.name


class Recorder(asyncio.SubprocessProtocol):
    """Write down which method was called in whose context."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str | None]] = []
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def _note(self, name: str) -> None:
        self.calls.append((name, name_of_user()))
        _user.set(User("protocol"))  # which nobody else may see

    def connection_made(self, transport: Any) -> None:
        self._note("connection_made")

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._note("pipe_data_received")

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._note("pipe_connection_lost")

    def process_exited(self) -> None:
        self._note("process_exited")

    def connection_lost(self, exc: Exception | None) -> None:
        self._note("connection_lost")
        self.lost.set_result(None)

    def pause_writing(self) -> None:
        self._note("pause_writing")

    def resume_writing(self) -> None:
        self._note("resume_writing")


def plugged(loop: asyncio.AbstractEventLoop) -> PidfdWatcher:
    """Have the subprocesses of `loop` go through us as long as the result is there."""
    watcher = PidfdWatcher()
    watcher.attach_loop(loop)
    return watcher


async def as_user(name: str, function: Any, *args: Any) -> tuple[Any, weakref.ref[User]]:
    """Await `function` in a context of its own; return what it returns, and the user to be forgotten."""

    async def run() -> tuple[Any, weakref.ref[User]]:
        user = User(name)
        _user.set(user)
        return await function(*args), weakref.ref(user)

    result: tuple[Any, weakref.ref[User]] = await asyncio.get_running_loop().create_task(run())
    return result


async def forget(*refs: weakref.ref[User]) -> None:
    """Make sure that nobody keeps these users, a round of the loop later."""
    await asyncio.sleep(0)
    gc.collect()
    kept = [user for ref in refs if (user := ref()) is not None]
    assert not kept, [gc.get_referrers(user) for user in kept]


async def test_protocol_runs_in_the_context_of_who_started_the_process() -> None:
    loop = asyncio.get_running_loop()
    watcher = plugged(loop)

    async def start() -> Any:
        transport, protocol = await loop.subprocess_exec(Recorder, "sh", "-c", "read x; echo $x; cat >/dev/null")
        assert name_of_user() == name  # what the protocol has set in connection_made is not ours
        return transport, protocol

    async def use(transport: Any) -> None:
        writer = transport.get_pipe_transport(0)
        writer.set_write_buffer_limits(high=0)
        writer.write(b"x\n" + b"y" * 1_000_000)
        writer.close()

    refs = []
    for name in ("alice", "bob"):
        (transport, protocol), ref = await as_user(name, start)
        refs.append(ref)
        _, user = await as_user("eve", use, transport)
        refs.append(user)
        await protocol.lost
        assert {called for called, _ in protocol.calls} == {
            "connection_made",
            "pipe_data_received",
            "pipe_connection_lost",
            "process_exited",
            "connection_lost",
            "pause_writing",
            "resume_writing",
        }
        assert {user for _, user in protocol.calls} == {name}
        await forget(*refs)  # while the transport and its protocol are there
    watcher.close()


async def test_protocol_that_takes_the_place_of_streams_runs_in_the_context_of_who_has_set_it() -> None:
    watcher = plugged(asyncio.get_running_loop())

    async def set_protocol(process: Any) -> Recorder:
        protocol = Recorder()
        process._transport.set_protocol(protocol)
        return protocol

    process, starter = await as_user("alice", lambda: asyncio.create_subprocess_exec("cat", stdin=subprocess.PIPE))
    await forget(starter)  # asyncio's own protocol calls nobody
    protocol, user = await as_user("bob", set_protocol, process)
    process.stdin.close()
    await protocol.lost
    assert sorted(protocol.calls) == [("connection_lost", "bob"), ("pipe_connection_lost", "bob"), ("process_exited", "bob")]
    await forget(user)
    watcher.close()


async def test_each_of_many_observers_runs_in_its_own_context() -> None:
    seen: list[str | None] = []
    watchers = [PidfdWatcher() for _ in range(4)]
    reported = asyncio.get_running_loop().create_future()

    def note(pid: int, returncode: int, *args: object) -> None:
        seen.append(name_of_user())
        if len(seen) == len(watchers):
            reported.set_result(None)

    with one_held() as child:
        refs = []
        for number, watcher in enumerate(watchers):

            async def watch(watcher: PidfdWatcher = watcher) -> None:
                watcher.add_child_handler(child.pid, note, *(["argument"] if watcher is watchers[2] else []))

            refs.append((await as_user(f"user {number}", watch))[1])
        waiter = asyncio.ensure_future(aiopidfd.wait(child.pid))
        await asyncio.sleep(0)
        child.end(0)
        await reported
        await waiter
    assert seen == [f"user {number}" for number in range(len(watchers))]
    await forget(*refs)


async def test_handler_that_is_taken_back_or_replaced_keeps_no_context() -> None:
    watcher, other = PidfdWatcher(), PidfdWatcher()

    async def watch(watcher: PidfdWatcher) -> None:
        watcher.add_child_handler(child.pid, print)

    with one_held() as child:
        _, first = await as_user("first", watch, watcher)
        _, second = await as_user("second", watch, other)
        _, replaced = await as_user("third", watch, other)
        await forget(second)
        watcher.remove_child_handler(child.pid)
        other.remove_child_handler(child.pid)
        await forget(first, replaced)


async def test_cancelled_wait_keeps_no_context() -> None:
    async def wait() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(aiopidfd.wait(child.pid), 0.01)

    with one_held() as child:
        _, ref = await as_user("alice", wait)
        await forget(ref)


async def test_first_user_of_a_loop_is_not_kept_by_it() -> None:
    async def wait() -> None:
        with one_held() as child:
            child.end(3)
            assert (await aiopidfd.wait(child.pid)).returncode == 3

    async def fork() -> None:
        async with await aiopidfd.afork(int) as child:
            await child.wait()

    for use in (wait, fork):
        _, ref = await as_user("alice", use)
        await forget(ref)


async def test_live_handle_keeps_no_context() -> None:
    async def fork() -> Any:
        return await aiopidfd.afork(lambda: len(os.read(read, 1)) - 1)

    read, write = os.pipe()
    child, ref = await as_user("alice", fork)
    await forget(ref)
    os.write(write, b"x")
    await child.wait()
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("piped", [False, True])
def test_closed_loop_keeps_no_context(loop_factory: LoopFactory, piped: bool) -> None:
    stream = subprocess.PIPE if piped else None

    async def start() -> Any:
        process = await asyncio.create_subprocess_exec("cat", stdin=subprocess.PIPE, stdout=stream)
        PidfdWatcher().add_child_handler(child.pid, print)
        return process

    async def main() -> Any:
        watcher = plugged(asyncio.get_running_loop())
        result = await as_user("alice", start)
        return result, watcher

    with one_held() as child:
        loop = loop_factory()
        (process, ref), _ = loop.run_until_complete(main())
        loop.close()
        gc.collect()
        assert ref() is None
        process._transport.close()
        del process


async def test_context_costs_nothing_without_a_callback() -> None:
    """Observers of ours have none: futures bring their own."""
    context = copy_context()
    with held(3) as children:
        waiters = [asyncio.ensure_future(aiopidfd.wait(child.pid)) for child in children]
        await asyncio.sleep(0)
        for child in children:
            child.end(0)
        await asyncio.gather(*waiters)
    assert list(copy_context().items()) == list(context.items())
