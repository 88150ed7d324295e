"""ForkServer: how the server starts, dies and is closed, and what happens to its workers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from aiopidfd import AbstractChildProcess, ForkServer, PosixChildProcess
from aiopidfd._backends.backend import probe_pidfd

from ..conftest import children, run_on
from ..helpers.workers import exit_with, fork_server, ignore_sigterm, kill_server, others, server_child, wait_for_signal

needs_pidfds = pytest.mark.skipif(probe_pidfd() is not None, reason="pidfds are forbidden here, and so is a fork server")


pytestmark = pytest.mark.usefixtures("one_thread")


async def test_workers_survive_their_server_and_are_still_watched(pidfds: None) -> None:
    async with ForkServer() as server:
        child = await server.afork(wait_for_signal)
        await kill_server(server)
        with pytest.raises(ConnectionResetError, match=r"fork server has exited: <ExitStatus pid=.* returncode=-9"):
            await server.afork(exit_with, 0)
        child.terminate()
        assert await child.wait() == -signal.SIGTERM


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_killed_server_is_restarted_if_restart_is_true(pidfds: None, method: Any) -> None:
    async with ForkServer(restart=True, start_method=method) as server:
        first = server.pid
        await kill_server(server)
        made = await asyncio.gather(*[server.afork(exit_with, code) for code in range(5)])
        assert [await child.wait() for child in made] == list(range(5))
        assert server.pid not in (None, first)


async def test_server_killed_amid_many_requests_loses_no_worker(pidfds: None) -> None:
    """Each request gives a child that is watched, or an error; and there is no zombie."""
    for served in (0, 1, 3, 10):
        async with ForkServer() as server:
            before = await others(server) - {server.pid}
            assert server.pid is not None
            starting = [asyncio.ensure_future(server.afork(exit_with, number)) for number in range(served)]
            await asyncio.gather(*starting)
            # The loop goes through its queue in order: however fast the server is, there are requests that come too late.
            starting += [asyncio.ensure_future(server.afork(exit_with, number)) for number in range(served, 100)]
            asyncio.get_running_loop().call_soon(os.kill, server.pid, signal.SIGKILL)
            starting += [asyncio.ensure_future(server.afork(exit_with, number)) for number in range(100, 200)]
            results = await asyncio.gather(*starting, return_exceptions=True)
            for number, result in enumerate(results):
                if isinstance(result, AbstractChildProcess):
                    assert await result.wait() == number
                else:
                    assert isinstance(result, ConnectionResetError), result
            assert any(isinstance(result, ConnectionResetError) for result in results)
        assert children() == before


async def test_worker_whose_server_died_before_it_could_reply_is_found(
    pidfds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply is lost. The worker exists, and its message shows its pid."""
    async with ForkServer() as server:
        assert server._link is not None
        control = server._link._control
        replies: list[object] = []

        def swallow(*args: Any) -> Any:
            reply = socket_recv_fds(*args)
            if reply[0]:
                replies.append(reply)
                for fd in reply[1]:
                    os.close(fd)
                raise BlockingIOError
            return reply

        socket_recv_fds = socket.recv_fds
        monkeypatch.setattr(socket, "recv_fds", swallow)
        assert await (await server.afork(exit_with, 10)).wait() == 10  # the idle worker since the start
        starting = asyncio.ensure_future(server.afork(exit_with, 11))
        manual = asyncio.ensure_future(server.afork(ignore_sigterm, ready="manual"))
        while len(replies) < 3:  # the third is of the idle worker
            await asyncio.sleep(0.01)
        assert control.fileno() >= 0
        assert not starting.done()
        await kill_server(server)
        assert await (await starting).wait() == 11
        child = await manual
        child.kill()
        assert await child.wait() == -signal.SIGKILL


async def test_reply_without_a_pidfd_gives_a_worker(pidfds: None, caplog: pytest.LogCaptureFixture) -> None:
    """At the limit of descriptors the kernel drops the pidfd on its way (MSG_CTRUNC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with ForkServer() as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        await (await server.afork(exit_with, 0)).wait()  # by the idle worker
        starting = asyncio.ensure_future(server.afork(exit_with, 21))
        await asyncio.sleep(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            os.kill(server.pid, signal.SIGCONT)
            child = await starting
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert isinstance(child, PosixChildProcess)
        assert await child.wait() == 21
        assert "out of descriptors" in caplog.text


async def test_no_descriptor_for_a_request_is_an_error_and_harms_no_other(pidfds: None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with ForkServer() as server:
        await (await server.afork(exit_with, 0)).wait()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            await (await server.afork(exit_with, 0)).wait()  # by the idle worker
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)) as caught:
                await server.afork(exit_with, 0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert caught.value.errno == errno.EMFILE
        assert await (await server.afork(exit_with, 2)).wait() == 2


async def test_server_without_room_for_descriptors_says_so(pidfds: None) -> None:
    async with ForkServer() as server:
        assert server.pid is not None
        soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (3, hard))
        await (await server.afork(exit_with, 0)).wait()  # by the idle worker
        with pytest.raises(OSError, match="descriptors") as caught:
            await server.afork(exit_with, 0)
        assert caught.value.errno == errno.EMFILE
        assert server._link is not None
        if server._link.idle is not None:  # it was requested at the limit, and must not be used by the next call
            await asyncio.wait([server._link.idle.outcome])
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert await (await server.afork(exit_with, 2)).wait() == 2


async def test_closing_serves_what_was_asked_for_and_leaves_workers_alone() -> None:
    server = ForkServer(fallback=True)
    async with server:
        child = await server.afork(wait_for_signal)
        starting = [asyncio.ensure_future(server.afork(exit_with, code)) for code in range(10)]
        await asyncio.sleep(0)
    assert [await (await start).wait() for start in starting] == list(range(10))
    assert child.returncode is None
    with pytest.raises(RuntimeError, match="closed"):
        await server.afork(exit_with, 0)
    await server.close()
    await child.stop()


async def test_closing_may_stop_the_workers() -> None:
    async with fork_server() as server:
        polite = await server.afork(wait_for_signal)
        deaf = await server.afork(ignore_sigterm, ready="manual")
        polite.detach()
        pid = polite.pid
        del polite
        await server.close(stop_workers=True, grace=0.1)
        assert deaf.returncode == -signal.SIGKILL
        assert pid not in children()


async def test_server_that_does_not_end_is_killed(pidfds: None) -> None:
    server = ForkServer()
    async with server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        await server.close(grace=0.05)
        assert server_child(server).returncode == -signal.SIGKILL


async def test_use_out_of_order_is_an_error() -> None:
    server = ForkServer(fallback=True)
    with pytest.raises(RuntimeError, match="not started"):
        await server.afork(exit_with, 0)
    with pytest.raises(RuntimeError, match="not started"):
        _ = server.features
    async with server:
        with pytest.raises(RuntimeError, match="once"):
            await server.__aenter__()

        def elsewhere() -> None:
            async def main() -> None:
                with pytest.raises(RuntimeError, match="another event loop"):
                    await server.afork(exit_with, 0)

            run_on(asyncio.SelectorEventLoop, main())

        await asyncio.get_running_loop().run_in_executor(None, elsewhere)


async def test_dropped_server_warns_and_ends(pidfds: None) -> None:
    server = ForkServer()
    await server.__aenter__()
    child = server_child(server)
    with pytest.warns(ResourceWarning, match=r"ForkServer pid=\d+ clone> was dropped"):
        del server
        gc.collect()
    assert await child.wait() == 0


PARENT = """
import asyncio, aiopidfd, signal, sys, os

async def main():
    server = await aiopidfd.ForkServer(start_method=sys.argv[1]).__aenter__()
    child = await server.afork(signal.pause, pdeathsig=signal.SIGTERM)
    child.detach()
    print(server.pid, child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@needs_pidfds
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_server_and_its_workers_with_pdeathsig_end_with_the_parent(method: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, method], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.stdout.read()  # ends when all of them have closed it
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie. If its new parent does not reap it, it stays a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_nobody_else_can_reap_the_workers_of_a_server_without_exit_signal(pidfds: None) -> None:
    stolen: list[int] = []
    done = threading.Event()

    def reap_all() -> None:
        while not done.wait(0.0001):
            with contextlib.suppress(ChildProcessError):
                pid, _ = os.waitpid(-1, os.WNOHANG)
                if pid:
                    stolen.append(pid)

    async with ForkServer() as server:
        thread = threading.Thread(target=reap_all)
        thread.start()
        old = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            made = await asyncio.gather(*[server.afork(exit_with, code) for code in range(50)])
            assert [await child.wait() for child in made] == list(range(50))
            assert {child.exit_status.source for child in made if child.exit_status} == {"reaped"}
        finally:
            signal.signal(signal.SIGCHLD, old)
            done.set()
            thread.join()
    assert stolen == []
