"""ForkServer: workers that another process forks and that are our children all the same."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import sys
import threading
from typing import Any

import pytest

import aiopidfd
from aiopidfd import ChildStartError, ForkServer, PidfdChildProcess
from aiopidfd._fork import afork

from ..conftest import children
from ..fork.test_child import bit
from ..helpers.workers import (
    ask,
    exit_with,
    fork_server,
    interrupt,
    notify_ready_after_read,
    raise_value_error,
    wait_for_signal,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
        assert not os.get_inheritable(child.fileno())
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
async def test_exit_status_of_the_worker_is_reported(
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
            assert masks["SigCgt"] & (bit(signal.SIGINT) | bit(signal.SIGTERM)) == bit(signal.SIGINT)
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
        starting = asyncio.ensure_future(server.afork(notify_ready_after_read, read, 0, ready="manual", pass_fds=[read]))
        while len(afork._parent_sockets) < 5:
            await asyncio.sleep(0)
        ours = {f"socket:[{os.fstat(gate.fileno()).st_ino}]" for gate in afork._parent_sockets}
        seen = await ask(server, "descriptors")
        os.write(write, b"x")
        assert await (await starting).wait() == 0
        assert len(ours) == 5  # two control sockets, the sockets of the idle workers, and one more
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
        slow = asyncio.ensure_future(server.afork(notify_ready_after_read, read, 5, ready="manual", pass_fds=[read]))
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


async def test_exception_before_readiness_is_reported_with_its_traceback(
    pidfds: None, capfd: pytest.CaptureFixture[str]
) -> None:
    async with ForkServer() as server:
        with pytest.raises(ChildStartError, match="ValueError: why") as caught:
            await server.afork(raise_value_error, "why", ready="manual")
        assert "in raise_value_error" in str(caught.value)
        assert caught.value.exit_status.returncode == 1
    assert capfd.readouterr().err == ""


class Explosive:
    """Raises an exception when it is unpickled."""

    def __reduce__(self) -> Any:
        return raise_value_error, ("cannot be unpickled",)


@pytest.mark.parametrize("ready", ["auto", "manual"])
async def test_what_cannot_be_unpickled_is_reported_with_its_traceback(pidfds: None, ready: Any) -> None:
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
