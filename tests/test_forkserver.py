"""ForkServer: workers that another process forks and that are our children all the same."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import aiopidfd
from aiopidfd import (
    AbstractChildProcess,
    ChildStartError,
    ForkServer,
    PidfdChildProcess,
    PosixChildProcess,
    _fork,
    _forkserver_request,
    _linux,
    _pickling,
    notify_ready,
)
from aiopidfd._backend import probe_pidfd

from .children import undebugged_environment
from .conftest import children, open_descriptors, run_on

needs_pidfds = pytest.mark.skipif(probe_pidfd() is not None, reason="pidfds are forbidden here, and so is a fork server")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Be alone: a fork server is made in another way beside threads."""
    deadline = time.monotonic() + 10
    while _linux.count_threads() > 1:  # those that an earlier test has joined are gone a moment later
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def pidfds(backend: str) -> None:
    """Skip where there can be no fork server."""
    if backend != "pidfd":
        pytest.skip("a fork server needs pidfds; its fallback is tested elsewhere")


def wait_for_signal() -> None:
    """What a worker does that is to be ended by a signal.

    Python sees SIGINT between two steps only: one that comes just before a pause() without end would not end it.
    """
    while True:
        time.sleep(0.02)


def exit_with(code: int) -> int:
    return code


def say_ready_after_read(fd: int, code: int) -> int:
    os.read(fd, 1)
    notify_ready()
    return code


def raise_value_error(text: str) -> None:
    raise ValueError(text)


def interrupt() -> None:
    raise KeyboardInterrupt


def ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    notify_ready()
    wait_for_signal()


def tell(pid: int, number: int, what: str) -> None:
    """Write what a worker sees of itself into the pipe that the process `pid` has under that number."""
    fd = os.open(f"/proc/{pid}/fd/{number}", os.O_WRONLY)
    os.write(fd, json.dumps(LOOKS[what](fd)).encode())


def tell_descriptors(fd: int) -> list[str]:
    return sorted(target for number, target in open_descriptors().items() if number > 2 and number != fd)


def tell_signals(fd: int) -> dict[str, Any]:
    with open("/proc/self/status", encoding="ascii") as status:
        fields = dict(line.split(":", 1) for line in status)
    masks = {name: int(fields[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")}
    return {**masks, "wakeup": signal.set_wakeup_fd(-1)}


def tell_asyncio(fd: int) -> list[bool]:
    try:
        asyncio.current_task()
    except RuntimeError:
        return [asyncio._get_running_loop() is None, True]
    return [asyncio._get_running_loop() is None, False]


def tell_thread_id(fd: int) -> list[int]:
    """The ID of this only thread: the kernel's, Python's, and the one that the C library caches and encodes in a clock."""
    clock = time.pthread_getcpuclockid(threading.get_ident())
    return [os.getpid(), threading.get_native_id(), ~(clock >> 3)]


LOOKS: dict[str, Callable[[int], Any]] = {
    "descriptors": tell_descriptors,
    "signals": tell_signals,
    "asyncio": tell_asyncio,
    "pid": tell_thread_id,
    "parent": lambda fd: os.getppid(),
    "bench": lambda fd: "bench.forked" in sys.modules,
}


async def ask(server: ForkServer, what: str) -> Any:
    """Return what a worker of the server says of itself."""
    read, write = os.pipe()
    try:
        async with await server.afork(tell, os.getpid(), write, what):
            return json.loads(await asyncio.get_running_loop().run_in_executor(None, os.read, read, 65536))
    finally:
        os.close(read)
        os.close(write)


@contextlib.asynccontextmanager
async def fork_server(**options: Any) -> AsyncIterator[ForkServer]:
    """A server; where there can be none, what stands in for it."""
    async with ForkServer(fallback=True, **options) as server:
        yield server


async def others(server: ForkServer) -> set[int]:
    """The children of this process, without the worker that waits for an order."""
    spare = None if server._link is None else server._link.spare
    if spare is None:
        return children()
    worker = await asyncio.shield(spare.outcome)
    assert isinstance(worker, AbstractChildProcess)
    return children() - {worker.pid}


def server_child(server: ForkServer) -> AbstractChildProcess:
    assert server._server is not None
    return server._server


async def kill_server(server: ForkServer) -> None:
    """Kill the server, and return when that is known."""
    child = server_child(server)
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()


async def test_returncode_is_what_child_func_returned() -> None:
    async with fork_server() as server:
        child = await server.afork(exit_with, 7)
        assert await child.wait() == 7
        assert child.exit_status is not None
        assert child.exit_status.source == "reaped"
        assert child.exit_status.rusage is not None


async def test_worker_is_a_child_of_this_process_and_a_handle_like_any_other(pidfds: None) -> None:
    async with ForkServer() as server, await server.afork(wait_for_signal) as child:
        assert isinstance(child, PidfdChildProcess)
        assert {child.pid, server.pid} <= children()
        assert await ask(server, "parent") == os.getpid()
    assert child.returncode == -signal.SIGTERM


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_server_says_how_it_was_made(pidfds: None, method: Any) -> None:
    async with ForkServer(start_method=method) as server:
        assert server.features.made_by == {"fork": "clone", "spawn": "spawn"}[method]
        assert server.features.sigchld is (method == "spawn")
        assert f"pid={server.pid} " in repr(server)
    assert server.pid is None
    assert "closed" in repr(server)


async def test_server_beside_threads_is_made_by_fork(pidfds: None) -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with contextlib.ExitStack() as stack:
            if sys.version_info >= (3, 12):
                warned = stack.enter_context(pytest.warns(DeprecationWarning, match="multi-threaded"))
            async with ForkServer() as server:
                assert (server.features.made_by, server.features.sigchld) == ("os.fork", True)
                assert await (await server.afork(exit_with, 3)).wait() == 3
        if sys.version_info >= (3, 12):
            assert [warning.filename for warning in warned] == [__file__]
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("function", "args", "returncode", "stderr"),
    [
        (exit_with, (None,), 0, ""),
        (exit_with, (256,), 1, "TypeError"),
        (exit_with, ("text",), 1, "TypeError"),
        (sys.exit, (3,), 3, ""),
        (sys.exit, ("goodbye",), 1, "goodbye\n"),
        (raise_value_error, ("why",), 1, "ValueError: why"),
        (interrupt, (), -signal.SIGINT, ""),
        (os.abort, (), -signal.SIGABRT, ""),
    ],
)
async def test_end_of_the_worker_is_told_as_it_was(
    function: Any, args: Any, returncode: int, stderr: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async with fork_server() as server:
        child = await server.afork(function, *args)
        assert await child.wait() == returncode
        printed = capfd.readouterr().err
        assert stderr in printed
        assert ("Traceback" in printed) is (stderr not in ("", "goodbye\n"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_worker_starts_clean(pidfds: None, method: Any) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lambda: None)
    try:
        async with ForkServer(start_method=method) as server:
            first = await server.afork(wait_for_signal)
            masks = await ask(server, "signals")
            glibcs_own = 1 << 31 | 1 << 32
            assert masks["SigCgt"] & ~glibcs_own == 1 << signal.SIGINT - 1
            assert masks["SigBlk"] == 0
            assert not masks["SigIgn"] & 1 << signal.SIGTERM - 1
            assert masks["wakeup"] == -1
            assert await ask(server, "asyncio") == [True, True]
            assert not [
                what
                for what in await ask(server, "descriptors")
                if what.startswith(("pidfd:", "anon_inode:[pidfd]")) or "eventpoll" in what
            ]
            assert len(set(await ask(server, "pid"))) == 1
            await first.stop()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def test_worker_holds_no_socket_of_a_server_or_of_another_worker(pidfds: None) -> None:
    read, write = os.pipe()
    async with ForkServer() as other, ForkServer() as server:
        starting = asyncio.ensure_future(server.afork(say_ready_after_read, read, 0, ready="manual", pass_fds=[read]))
        await asyncio.sleep(0.05)
        ours = {f"socket:[{os.fstat(gate.fileno()).st_ino}]" for gate in _fork._gates}
        seen = await ask(server, "descriptors")
        os.write(write, b"x")
        assert await (await starting).wait() == 0
        assert len(ours) == 5  # two wires, the gates of the workers ahead, and one more
        assert not ours & set(seen)
        assert other.pid != server.pid
    os.close(read)
    os.close(write)


def run_a_loop() -> int:
    async def main() -> int:
        child = await aiopidfd.afork(lambda: 40)
        process = await asyncio.create_subprocess_exec("/bin/true")
        done: list[int] = []
        thread = threading.Thread(target=lambda: done.append(2))
        thread.start()
        thread.join()
        async with ForkServer(fallback=True) as inner:
            grandchild = await inner.afork(exit_with, 1)
            return await child.wait() + await process.wait() + sum(done) + await grandchild.wait()

    code: int = aiopidfd.run(main())
    return code


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_loops_threads_subprocesses_and_fork_servers_work_inside(method: Any) -> None:
    async with fork_server(start_method=method) as server:
        assert await (await server.afork(run_a_loop)).wait() == 43


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_signal_sent_as_soon_as_afork_returns_ends_the_worker(sig: signal.Signals) -> None:
    async with fork_server() as server:
        for _ in range(10):
            child = await server.afork(wait_for_signal)
            child.send_signal(sig)
            assert await child.wait() == -sig


async def test_options_are_those_of_afork() -> None:
    async with fork_server() as server:
        async with await server.afork(wait_for_signal, start_new_session=True) as child:
            assert os.getsid(child.pid) == child.pid
            child.signal_group(signal.SIGUSR1)
            assert await child.wait() == -signal.SIGUSR1
        async with await server.afork(wait_for_signal, process_group=0) as leader:
            member = await server.afork(wait_for_signal, process_group=leader.pid)
            assert os.getpgid(member.pid) == leader.pid
            await member.stop()


@pytest.mark.parametrize(
    ("function", "options", "error"),
    [
        (3, {}, TypeError),
        (asyncio.sleep, {}, TypeError),
        (exit_with, {"ready": "sometimes"}, ValueError),
        (exit_with, {"pdeathsig": 1000}, ValueError),
        (exit_with, {"pass_fds": [-1]}, ValueError),
        (exit_with, {"pass_fds": [1, 1]}, ValueError),
        (exit_with, {"pass_fds": range(1000, 1253)}, ValueError),
        (exit_with, {"pass_fds": ["x"]}, TypeError),
        (exit_with, {"pass_fds": [999_999]}, OSError),
    ],
)
async def test_bad_arguments_are_refused(
    pidfds: None, function: Any, options: dict[str, Any], error: type[Exception]
) -> None:
    async with ForkServer() as server:
        before = children()
        with pytest.raises(error):
            await server.afork(function, **options)
        assert children() == before
        assert await (await server.afork(exit_with, 4)).wait() == 4


async def test_bad_options_of_the_server_are_refused() -> None:
    with pytest.raises(TypeError, match="preload"):
        ForkServer(preload="os")
    with pytest.raises(ValueError, match="start_method"):
        ForkServer(start_method="forkserver")  # type: ignore[arg-type] # the point of the test


async def test_manual_readiness_and_a_slow_start_that_holds_nobody_up() -> None:
    read, write = os.pipe()
    async with fork_server() as server:
        slow = asyncio.ensure_future(server.afork(say_ready_after_read, read, 5, ready="manual", pass_fds=[read]))
        for code in range(5):
            assert await (await server.afork(exit_with, code)).wait() == code
        assert not slow.done()
        os.write(write, b"x")
        assert await (await slow).wait() == 5
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(("function", "args"), [(os._exit, (9,)), (exit_with, (9,)), (sys.exit, (9,))])
async def test_worker_that_ends_before_it_is_ready_is_an_error_with_its_status(function: Any, args: Any) -> None:
    async with fork_server() as server:
        with pytest.raises(ChildStartError, match="before it was ready") as caught:
            await server.afork(function, *args, ready="manual")
        assert caught.value.exit_status.returncode == 9


async def test_exception_before_readiness_is_told_with_its_traceback(
    pidfds: None, capfd: pytest.CaptureFixture[str]
) -> None:
    async with ForkServer() as server:
        with pytest.raises(ChildStartError, match="ValueError: why") as caught:
            await server.afork(raise_value_error, "why", ready="manual")
        assert "in raise_value_error" in str(caught.value)
        assert caught.value.exit_status.returncode == 1
    assert capfd.readouterr().err == ""


class Explosive:
    """Explodes where it is unpickled."""

    def __reduce__(self) -> Any:
        return raise_value_error, ("cannot be unpickled",)


@pytest.mark.parametrize("ready", ["auto", "manual"])
async def test_what_cannot_be_unpickled_is_told_with_its_traceback(pidfds: None, ready: Any) -> None:
    async with ForkServer() as server:
        with pytest.raises(ChildStartError, match="ValueError: cannot be unpickled") as caught:
            await server.afork(exit_with, Explosive(), ready=ready)
        assert caught.value.exit_status.returncode == 1


async def test_impossible_group_is_a_start_error(pidfds: None) -> None:
    async with ForkServer() as server:
        with pytest.raises(ChildStartError, match="PermissionError"):
            await server.afork(exit_with, 0, process_group=1)


async def test_what_cannot_be_pickled_fails_before_anything_is_sent(pidfds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    async with ForkServer() as server:
        before = children()
        with pytest.raises(pickle.PicklingError, match="cloudpickle"):
            await server.afork(lambda: 3)
        with pytest.raises(pickle.PicklingError, match="cannot be pickled"):
            await server.afork(exit_with, threading.Lock())
        assert children() == before


async def test_cloudpickle_pickles_the_rest() -> None:
    pytest.importorskip("cloudpickle")
    base = 30
    async with fork_server() as server:
        assert await (await server.afork(lambda more: base + more, 3)).wait() == 33


async def test_what_not_even_cloudpickle_can_pickle(pidfds: None) -> None:
    pytest.importorskip("cloudpickle")
    async with ForkServer() as server:
        with pytest.raises(pickle.PicklingError, match="by cloudpickle either"):
            await server.afork(exit_with, threading.Lock())


def count_bytes(data: bytes) -> int:
    return len(data) >> 20


async def test_arguments_may_be_bigger_than_any_socket_buffer() -> None:
    data = b"x" * (40 << 20)
    async with fork_server() as server:
        children_ = await asyncio.gather(*[server.afork(count_bytes, data) for _ in range(3)])
        assert [await child.wait() for child in children_] == [40] * 3


def accept_one(number: int) -> int:
    with socket.socket(fileno=number) as listener:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"%d" % os.getpid())
    return 0


async def test_listening_socket_is_passed_with_its_number() -> None:
    loop = asyncio.get_running_loop()
    async with fork_server() as server:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            child = await server.afork(accept_one, listener.fileno(), pass_fds=[listener.fileno()])
            # By hand: to look up an address, libuv would start threads that never end.
            with socket.create_connection(listener.getsockname()) as connection:
                assert int(await loop.run_in_executor(None, connection.recv, 20)) == child.pid
            assert await child.wait() == 0


def check_numbers(expected: dict[int, int]) -> int:
    return int(all(os.fstat(fd).st_ino == inode and not os.get_inheritable(fd) for fd, inode in expected.items()))


async def test_passed_descriptors_keep_their_numbers_whatever_those_are_in_the_server(pidfds: None) -> None:
    """Numbers that are taken in the server, by its own sockets among others, and numbers that overlap."""
    async with ForkServer() as server:
        pipes = [os.pipe() for _ in range(40)]
        fds = [fd for pipe in pipes for fd in pipe]
        expected = {fd: os.fstat(fd).st_ino for fd in fds}
        assert await (await server.afork(check_numbers, expected, pass_fds=fds)).wait() == 1
        assert await (await server.afork(check_numbers, expected, pass_fds=fds[::-1])).wait() == 1
        for fd in fds:
            os.close(fd)


async def test_worker_is_forked_before_anybody_asks_for_it(pidfds: None) -> None:
    async with ForkServer() as server:
        assert server._link is not None
        for code in range(3):
            ahead = await server._link.stock().outcome
            assert isinstance(ahead, PidfdChildProcess)
            worker = await server.afork(exit_with, code)
            assert worker is ahead
            assert await worker.wait() == code


async def test_worker_is_not_disturbed_by_what_came_before_its_order(pidfds: None) -> None:
    """As a Ctrl-C at the terminal does, which goes to all of its processes."""
    async with ForkServer() as server:
        assert server._link is not None
        ahead = await server._link.stock().outcome
        assert isinstance(ahead, PidfdChildProcess)
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
            os.kill(ahead.pid, sig)
        worker = await server.afork(exit_with, 5)
        assert worker is ahead
        assert await worker.wait() == 5


async def test_worker_that_was_killed_before_its_order_is_replaced(pidfds: None) -> None:
    async with ForkServer() as server:
        assert server._link is not None
        ahead = await server._link.stock().outcome
        assert isinstance(ahead, PidfdChildProcess)
        os.kill(ahead.pid, signal.SIGKILL)
        await ahead.wait()
        worker = await server.afork(exit_with, 6)
        assert worker is not ahead
        assert await worker.wait() == 6


async def test_worker_that_is_being_killed_before_its_order_is_replaced(pidfds: None) -> None:
    """Its gate is heard before its end is."""
    async with ForkServer() as server:
        assert server._link is not None
        spare = server._link.stock()
        ahead = await spare.outcome
        assert isinstance(ahead, PidfdChildProcess)
        os.kill(ahead.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not spare.ready.done():
            assert time.monotonic() < deadline
            spare.read()
        assert ahead.returncode is None
        worker = await server.afork(exit_with, 7)
        assert worker is not ahead
        assert await worker.wait() == 7
        await ahead.wait()


async def test_worker_without_an_order_ends_with_its_server(pidfds: None) -> None:
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
        starting = asyncio.ensure_future(server.afork(say_ready_after_read, read, 0, ready="manual", pass_fds=[read]))
        await asyncio.sleep(0.05)
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
    monkeypatch.setattr(_forkserver_request, "REPLY_S", 0.05)
    async with ForkServer() as server:
        before = await others(server)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        assert await (await server.afork(exit_with, 2)).wait() == 2  # by the worker that is there already
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(server.afork(wait_for_signal), 0.05)
        os.kill(server.pid, signal.SIGCONT)
        assert await (await server.afork(exit_with, 3)).wait() == 3  # and the other one was made before it
        while await others(server) != before:
            await asyncio.sleep(0.01)


async def test_workers_survive_their_server_and_are_still_watched(pidfds: None) -> None:
    async with ForkServer() as server:
        child = await server.afork(wait_for_signal)
        await kill_server(server)
        with pytest.raises(ConnectionResetError, match=r"fork server has ended: <ExitStatus pid=.* returncode=-9"):
            await server.afork(exit_with, 0)
        child.terminate()
        assert await child.wait() == -signal.SIGTERM


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_killed_server_is_started_anew_where_that_was_asked_for(pidfds: None, method: Any) -> None:
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
    """The reply is lost, the worker is there: it says so by its gate."""
    async with ForkServer() as server:
        assert server._link is not None
        wire = server._link._wire
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
        assert await (await server.afork(exit_with, 10)).wait() == 10  # of whom we know since the start
        starting = asyncio.ensure_future(server.afork(exit_with, 11))
        manual = asyncio.ensure_future(server.afork(ignore_sigterm, ready="manual"))
        while len(replies) < 3:  # the third is of a worker without an order
            await asyncio.sleep(0.01)
        assert wire.fileno() >= 0
        assert not starting.done()
        await kill_server(server)
        assert await (await starting).wait() == 11
        child = await manual
        child.kill()
        assert await child.wait() == -signal.SIGKILL


async def test_reply_without_a_pidfd_gives_a_worker_all_the_same(pidfds: None, caplog: pytest.LogCaptureFixture) -> None:
    """At the limit of descriptors the kernel drops the pidfd on its way (MSG_CTRUNC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with ForkServer() as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        await (await server.afork(exit_with, 0)).wait()  # by the worker that is there already
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
        assert "want of descriptors" in caplog.text


async def test_no_descriptor_for_a_request_is_an_error_and_harms_no_other(pidfds: None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with ForkServer() as server:
        await (await server.afork(exit_with, 0)).wait()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            await (await server.afork(exit_with, 0)).wait()  # by the worker that is there already
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
        await (await server.afork(exit_with, 0)).wait()  # by the worker that is there already
        with pytest.raises(OSError, match="descriptors") as caught:
            await server.afork(exit_with, 0)
        assert caught.value.errno == errno.EMFILE
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


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_modules_are_preloaded(pidfds: None, method: Any) -> None:
    sys.modules.pop("bench.forked", None)
    async with ForkServer(preload=["tests.children", "bench.forked"], start_method=method) as server:
        assert await ask(server, "bench")


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_module_that_cannot_be_preloaded_is_an_error(pidfds: None, method: Any) -> None:
    with pytest.raises(ChildStartError, match="No module named 'no_such_module'"):
        async with ForkServer(preload=["no_such_module"], start_method=method):
            pass


async def test_preloaded_module_that_starts_threads_is_an_error(pidfds: None, tmp_path: Path) -> None:
    tmp_path.joinpath("with_thread.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n", encoding="utf-8"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ChildStartError, match="has started threads"):
            async with ForkServer(preload=["with_thread"]):
                pass
    finally:
        sys.path.remove(str(tmp_path))


MAIN = """
import asyncio, aiopidfd, pickle, sys

def work(code):
    return code

async def main():
    sys.modules["cloudpickle"] = None
    async with aiopidfd.ForkServer(start_method=sys.argv[1], preload=sys.argv[2:]) as server:
        try:
            print(await (await server.afork(work, 5)).wait())
        except pickle.PicklingError as exc:
            print(exc)

if __name__ == "__main__":
    asyncio.run(main())
"""


@needs_pidfds
@pytest.mark.parametrize(
    ("arguments", "output"), [(["fork"], "5\n"), (["spawn", "__main__"], "5\n"), (["spawn"], "preload '__main__'")]
)
def test_functions_of_the_main_module(tmp_path: Path, arguments: list[str], output: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(MAIN, encoding="utf-8")
    command, environment = [sys.executable, str(program), *arguments], undebugged_environment()
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert output in ran.stdout


def test_main_is_found_only_where_it_is_looked_up() -> None:
    assert not _pickling._refers_to_main(pickle.dumps(exit_with))
    assert not _pickling._refers_to_main(pickle.dumps("in __main__ there is"))


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
    """Whether a process is there and no zombie, which it may stay for long if nobody adopts it who reaps."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_nobody_can_steal_the_workers_of_a_server_without_exit_signal(pidfds: None) -> None:
    stolen: list[int] = []
    done = threading.Event()

    def steal() -> None:
        while not done.wait(0.0001):
            with contextlib.suppress(ChildProcessError):
                pid, _ = os.waitpid(-1, os.WNOHANG)
                if pid:
                    stolen.append(pid)

    async with ForkServer() as server:
        thread = threading.Thread(target=steal)
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


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.ENOTSUP])
@pytest.mark.parametrize("where", ["parent", "server"])
async def test_where_clone_is_refused_there_is_a_clear_error_or_the_fallback(
    pidfds: None, monkeypatch: pytest.MonkeyPatch, code: int, where: str
) -> None:
    fork = _linux.fork

    def refuse(flags: int = 0) -> Any:
        if where == "parent" or flags:
            raise _linux.error(code, "clone(CLONE_PIDFD)")
        return fork(flags)

    monkeypatch.setattr(_linux, "fork", refuse)
    before = children()
    with pytest.raises(OSError, match="clone") as caught:
        async with ForkServer():
            pass
    assert caught.value.errno == code
    assert children() == before
    async with ForkServer(fallback=True) as server:
        assert server.features.made_by == "none"
        assert "clone" in server.features.reason
        assert server.pid is None
        assert await (await server.afork(exit_with, 6)).wait() == 6


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM])
async def test_clone_that_fails_for_the_moment_is_no_reason_to_fall_back(
    pidfds: None, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(flags: int = 0) -> Any:
        raise _linux.error(code, "clone")

    monkeypatch.setattr(_linux, "fork", fail)
    with pytest.raises(OSError, match="clone") as caught:
        async with ForkServer(fallback=True):
            pass
    assert caught.value.errno == code


async def test_without_pidfds_there_is_no_fork_server(backend: str) -> None:
    if backend == "pidfd":
        pytest.skip("pidfds can be used")
    with pytest.raises(OSError, match="pidfd") as caught:
        async with ForkServer():
            pass
    assert caught.value.errno in _linux.FORBIDDEN | {errno.EINVAL}
    async with ForkServer(fallback=True) as server:
        assert server.features.made_by == "none"
        child = await server.afork(exit_with, 8)
        assert isinstance(child, PosixChildProcess)
        assert await child.wait() == 8


async def test_interpreter_that_is_not_known_cannot_be_spawned(pidfds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(RuntimeError, match="executable"):
        async with ForkServer(start_method="spawn"):
            pass


async def test_interpreter_that_ends_at_once_is_a_start_error(pidfds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ChildStartError) as caught:
        async with ForkServer(start_method="spawn"):
            pass
    assert caught.value.exit_status.returncode == 1
