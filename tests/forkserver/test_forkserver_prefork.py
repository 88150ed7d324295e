"""Fork servers: workers that are forked before a request, many requests, and their cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time

import pytest

from aiopidfd import ForkServer, PidfdChildProcess
from aiopidfd._forkserver import request

from ..conftest import children
from ..helpers.workers import exit_with, fork_server, kill_server, notify_ready_after_read, others, wait_for_signal

pytestmark = pytest.mark.usefixtures("one_thread")


async def test_idle_worker_is_forked_before_it_is_requested(pidfds: None) -> None:
    async with ForkServer() as server:
        assert server._link is not None
        for code in range(3):
            ahead = await server._link.prefork().outcome
            assert isinstance(ahead, PidfdChildProcess)
            worker = await server.afork(exit_with, code)
            assert worker is ahead
            assert await worker.wait() == code


async def test_signals_to_an_idle_worker_are_discarded(pidfds: None) -> None:
    """As a Ctrl-C at the terminal does, which goes to all of its processes."""
    async with ForkServer() as server:
        assert server._link is not None
        ahead = await server._link.prefork().outcome
        assert isinstance(ahead, PidfdChildProcess)
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
            os.kill(ahead.pid, sig)
        worker = await server.afork(exit_with, 5)
        assert worker is ahead
        assert await worker.wait() == 5


async def test_idle_worker_that_was_killed_is_replaced(pidfds: None) -> None:
    async with ForkServer() as server:
        assert server._link is not None
        ahead = await server._link.prefork().outcome
        assert isinstance(ahead, PidfdChildProcess)
        os.kill(ahead.pid, signal.SIGKILL)
        await ahead.wait()
        worker = await server.afork(exit_with, 6)
        assert worker is not ahead
        assert await worker.wait() == 6


async def test_idle_worker_whose_exit_is_not_reported_yet_is_replaced(pidfds: None) -> None:
    """The end of its socket is read before its exit is reported."""
    async with ForkServer() as server:
        assert server._link is not None
        idle = server._link.prefork()
        ahead = await idle.outcome
        assert isinstance(ahead, PidfdChildProcess)
        os.kill(ahead.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not idle.ready.done():
            assert time.monotonic() < deadline
            idle.on_readable()
        assert ahead.returncode is None
        worker = await server.afork(exit_with, 7)
        assert worker is not ahead
        assert await worker.wait() == 7
        await ahead.wait()


async def test_idle_worker_exits_with_its_server(pidfds: None) -> None:
    async with ForkServer() as server:
        before = await others(server) - {server.pid}
        await kill_server(server)
    assert children() == before


async def test_many_requests_at_once() -> None:
    async with fork_server() as server:
        codes = [number % 256 for number in range(200)]
        made = await asyncio.gather(*[server.afork(exit_with, code) for code in codes])
        assert [await child.wait() for child in made] == codes
        assert len({child.pid for child in made}) == 200


async def test_cancellation_ends_and_reaps_the_worker() -> None:
    read, write = os.pipe()
    async with fork_server() as server:
        before = await others(server)
        starting = asyncio.ensure_future(server.afork(notify_ready_after_read, read, 0, ready="manual", pass_fds=[read]))
        while await others(server) == before:
            await asyncio.sleep(0)
        starting.cancel()
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert await others(server) == before
    os.close(read)
    os.close(write)


async def test_cancellation_at_any_moment_leaves_nothing(pidfds: None) -> None:
    async with ForkServer() as server:
        before = await others(server)
        for rounds in range(60):
            starting = asyncio.ensure_future(server.afork(wait_for_signal))
            for _ in range(rounds % 6):
                await asyncio.sleep(0)
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await (await starting).stop()
        assert await others(server) == before


async def test_timeout_around_afork() -> None:
    async with fork_server() as server:
        before = await others(server)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(server.afork(wait_for_signal, ready="manual"), 0.05)
        assert await others(server) == before


async def test_cancellation_while_the_server_is_stopped_does_not_hang(pidfds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "REPLY_TIMEOUT_S", 0.05)
    async with ForkServer() as server:
        before = await others(server)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        assert await (await server.afork(exit_with, 2)).wait() == 2  # by the idle worker
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(server.afork(wait_for_signal), 0.05)
        os.kill(server.pid, signal.SIGCONT)
        assert await (await server.afork(exit_with, 3)).wait() == 3  # and the other one was made before it
        while await others(server) != before:
            await asyncio.sleep(0.01)
