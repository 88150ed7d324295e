"""Subprocess transports and protocols: which methods are called, in which order, and signals."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import warnings
from typing import Any

import pytest

from ..conftest import LoopFactory, run_on
from ..helpers.subprocesses import (
    PIPE,
    Raiser,
    Recorder,
    assert_in_order,
    assert_reaped,
    await_end,
    drain,
    gate,
    needs_root,
    plug,  # noqa: F401 - pytest looks for it in this module
    pytest_generate_tests,  # noqa: F401 - pytest looks for it in this module
    reading,
    shell_output,
)

# Each test runs on loops of our classes, and on other loops with a watcher: see `plug`.
pytestmark = pytest.mark.usefixtures("plug")


async def test_protocol_is_called_once_for_each_event_and_in_order() -> None:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.subprocess_shell(Recorder, "echo out; echo err >&2")
    assert transport.get_protocol() is protocol
    assert protocol.events[0] == ("connection_made",)
    await protocol.end
    assert_in_order(protocol.events)
    assert transport.get_protocol() is None  # as with asyncio's


async def test_protocol_that_raises_is_called_for_the_rest_and_the_loop_gets_the_exception() -> None:
    loop = asyncio.get_running_loop()
    contexts: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: contexts.append(context))
    transport, protocol = await loop.subprocess_shell(Raiser, "echo out; echo err >&2; exit 3")
    await protocol.end
    await drain()
    assert_in_order(protocol.events)
    assert sorted(str(context["exception"]) for context in contexts) == sorted(event[0] for event in protocol.events)
    assert {context["transport"] for context in contexts} == {transport}
    assert transport.get_returncode() == 3


async def test_wait_returns_though_the_protocol_raises_at_the_exit() -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: None)
    transport, protocol = await loop.subprocess_shell(Raiser, "read x", stdout=None, stderr=None)
    waiting = asyncio.ensure_future(transport._wait())  # type: ignore[attr-defined] # Process.wait() calls it
    await drain()
    transport.kill()
    assert await waiting == -signal.SIGKILL
    await protocol.end


class Pauser(Recorder):
    """It pauses the reading at once."""

    def connection_made(self, transport: Any) -> None:
        self.pipe = transport.get_pipe_transport(1)
        self.pipe.pause_reading()


async def test_reading_can_be_paused_from_the_start() -> None:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.subprocess_exec(Pauser, "/bin/echo", stdin=None, stderr=None)
    await transport._wait()  # type: ignore[attr-defined] # Process.wait() calls it
    await drain()
    assert protocol.events == [("exited",)]
    protocol.pipe.resume_reading()
    await protocol.end
    assert protocol.events == [("exited",), ("data", 1, b"\n"), ("pipe_lost", 1), ("connection_lost",)]


async def test_protocol_can_be_replaced_by_anything_that_has_its_methods() -> None:
    loop = asyncio.get_running_loop()
    transport, first = await loop.subprocess_exec(Recorder, "/bin/cat", stdout=None, stderr=None)
    second = Recorder()

    class Proxy:
        def __getattr__(self, name: str) -> Any:
            return getattr(second, name)

    transport.set_protocol(Proxy())  # type: ignore[arg-type] # asyncio's transports ask for no class either
    transport.get_pipe_transport(0).close()  # type: ignore[union-attr] # it is a pipe
    await second.end
    assert first.events == [("connection_made",)]
    assert sorted(second.events) == [("connection_lost",), ("exited",), ("pipe_lost", 0)]


async def test_signals_go_by_pidfd_and_never_by_pid(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    def refuse(pid: int, number: int) -> None:
        pytest.fail(f"kill({pid}, {number})")

    if backend != "pidfd":
        pytest.skip("the SIGCHLD backend has no pidfds")
    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(os, "killpg", refuse)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL):
        process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE)
        if number == signal.SIGTERM:
            process.terminate()
        elif number == signal.SIGKILL:
            process.kill()
        else:
            process.send_signal(number)
        assert await process.wait() == -number
    transport, _ = await asyncio.get_running_loop().subprocess_exec(asyncio.SubprocessProtocol, "/bin/cat")
    transport.close()
    assert await transport._wait() == -signal.SIGKILL  # type: ignore[attr-defined] # Process.wait() calls it


async def test_signal_after_the_end_raises_as_asyncio_does() -> None:
    process = await asyncio.create_subprocess_exec("/bin/true")
    await process.wait()
    await drain()
    for send in (process.terminate, process.kill, lambda: process.send_signal(signal.SIGUSR1)):
        with pytest.raises(ProcessLookupError):
            send()


async def test_signal_to_an_ended_process_whose_pipe_is_open_is_logged_and_not_sent(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gate() as (held, release):
        process = await asyncio.create_subprocess_shell(f"{reading(held)} & exit 4", stdout=PIPE, pass_fds=(held,))
        assert await process.wait() == 4
        monkeypatch.setattr(os, "kill", lambda *args: pytest.fail(f"kill{args}"))
        process.kill()
        assert caplog.messages == [f"signal 9 not sent: process {process.pid} has ended"]
        release()
        await process.communicate()


async def test_bad_signal_raises_what_os_kill_raises() -> None:
    process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE)
    with pytest.raises(OSError, match="Invalid argument"):
        process.send_signal(1000)
    with pytest.raises(TypeError):
        process.send_signal("TERM")  # type: ignore[arg-type] # the point of the test
    await process.communicate(b"")


@needs_root
async def test_process_of_another_user_can_be_signalled_by_root() -> None:
    process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, user=1)
    process.terminate()
    assert await process.wait() == -signal.SIGTERM


async def test_close_kills_the_process_and_it_is_reaped() -> None:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.subprocess_exec(Recorder, "/bin/cat")
    assert not transport.is_closing()
    transport.close()
    transport.close()
    assert transport.is_closing()
    await protocol.end
    assert transport.get_returncode() == -signal.SIGKILL
    assert_reaped(transport.get_pid())
    transport.close()


async def test_close_does_not_signal_a_process_that_somebody_else_has_reaped(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.subprocess_exec(Recorder, "/bin/cat")
    popen = transport.get_extra_info("subprocess")
    popen.kill()
    popen.wait()
    monkeypatch.setattr(os, "kill", lambda *args: pytest.fail(f"kill{args}"))
    transport.close()
    await protocol.end
    assert transport.get_returncode() == popen.returncode == -signal.SIGKILL


async def test_repr_shows_the_state() -> None:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.subprocess_exec(Recorder, "/bin/cat")
    assert f"pid={transport.get_pid()} running" in repr(transport)
    assert "stdin=<" in repr(transport)
    transport.close()
    await protocol.end
    assert "closed" in repr(transport)
    assert "returncode=-9" in repr(transport)


async def test_debug_mode_logs_the_creation(caplog: pytest.LogCaptureFixture) -> None:
    asyncio.get_running_loop().set_debug(True)
    with caplog.at_level(logging.DEBUG, "aiopidfd"):
        process = await asyncio.create_subprocess_exec("/bin/true")
        await process.wait()
    assert any(f"pid={process.pid}" in message for message in caplog.messages)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # of the pipes
def test_transport_that_is_dropped_unclosed_warns(loop_factory: LoopFactory) -> None:
    loop = loop_factory()
    transport, _ = loop.run_until_complete(loop.subprocess_exec(asyncio.SubprocessProtocol, "/bin/cat"))
    pid = transport.get_pid()
    transport.kill()
    await_end(pid)
    loop.close()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del transport, _
        gc.collect()
    assert [w for w in caught if f"unclosed transport <SubprocessTransport pid={pid}" in str(w.message)]
    run_on(loop_factory, shell_output("echo"))
    assert_reaped(pid)


@pytest.mark.parametrize(
    ("asked", "limits"),
    [
        ({}, (16384, 65536)),
        ({"high": 1000}, (250, 1000)),
        ({"low": 1000}, (1000, 4000)),
        ({"high": 5000, "low": 5000}, (5000, 5000)),
        ({"high": 0}, (0, 0)),
    ],
)
async def test_write_buffer_limits_follow_from_each_other_as_in_asyncio(
    asked: dict[str, int], limits: tuple[int, int]
) -> None:
    process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE)
    assert process.stdin is not None
    transport: Any = process.stdin.transport
    transport.set_write_buffer_limits(**asked)
    found = transport.get_write_buffer_limits()
    with pytest.raises(ValueError, match="must be >= low"):
        transport.set_write_buffer_limits(high=1, low=2)
    process.stdin.close()
    await process.wait()
    assert found == limits
