"""Subprocesses on loops of ours, and on other loops that a watcher is attached to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import inspect
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import aiopidfd
from aiopidfd import PidfdWatcher, _subprocess
from aiopidfd._registry import Registry
from aiopidfd._subprocess import SubprocessTransport

from . import conftest
from .children import await_zombie, undebugged_environment
from .conftest import LoopFactory, open_descriptors, run_on

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment] # tests on uvloop are skipped, with a reason

PIPE = subprocess.PIPE
# What only Popen can do, so that it is Popen that starts the process.
BY_POPEN: dict[str, Any] = {"preexec_fn": int}

needs_uvloop = pytest.mark.skipif(uvloop is None, reason="uvloop is not installed")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
needs_child_watchers = pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="asyncio.set_child_watcher is gone in Python 3.14"
)

# Each test runs on loops of our classes and on other loops that we plug into: see `plug`.
pytestmark = pytest.mark.usefixtures("plug")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Multiply what conftest makes of a test that runs on a loop by the two ways in which that loop is ours."""
    if inspect.iscoroutinefunction(metafunc.function) or "loop_factory" in metafunc.fixturenames:
        metafunc.parametrize("plug", ["class", "attached"], indirect=True)


@pytest.fixture
def plug(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have conftest run the test on a loop whose subprocesses are ours."""
    make_plain_loop = conftest._loop_factory

    def attached(kind: str) -> asyncio.AbstractEventLoop:
        loop = make_plain_loop(kind)()
        PidfdWatcher().attach_loop(loop)
        return loop

    def loop_factory(kind: str) -> LoopFactory:
        if request.param == "attached":
            return lambda: attached(kind)
        return aiopidfd.SelectorEventLoop if kind == "asyncio" else aiopidfd.UvloopEventLoop

    if hasattr(request, "param"):
        monkeypatch.setattr(conftest, "_loop_factory", loop_factory)


async def drain() -> None:
    """Let the loop see everything that is ready now: each round polls its descriptors once."""
    for _ in range(10):
        await asyncio.sleep(0)


async def output_of(*command: Any, **keywords: Any) -> str:
    """What a program that must succeed prints."""
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, **keywords)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode().rstrip()


async def talk(process: asyncio.subprocess.Process, data: bytes | None = None) -> tuple[bytes | None, bytes | None]:
    """What `communicate` returns: None for what is no pipe, of which its type does not know."""
    return await process.communicate(data)


async def shell_output(script: str, **keywords: Any) -> str:
    return await output_of("/bin/sh", "-c", script, **keywords)


def is_ours(process: asyncio.subprocess.Process) -> bool:
    """Whether its transport is one of ours."""
    return isinstance(process._transport, SubprocessTransport)  # type: ignore[attr-defined] # there is no public way


@contextlib.contextmanager
def gate() -> Iterator[tuple[int, Callable[[], None]]]:
    """A descriptor that a child reads from until the function is called."""
    read, write = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, read)
        opened = stack.enter_context(contextlib.ExitStack())
        opened.callback(os.close, write)
        yield read, opened.close


def reading(held: int) -> str:
    """The shell command that ends when the gate opens. (Debian's sh does not know descriptors of two digits.)"""
    return f"read x < /proc/self/fd/{held}"


def await_end(pid: int) -> None:
    """Return once the child has ended, whether or not somebody reaps it then."""
    with contextlib.suppress(ChildProcessError):
        await_zombie(pid)


def assert_reaped(pid: int) -> None:
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


async def test_subprocesses_are_ours() -> None:
    process = await asyncio.create_subprocess_exec("/bin/true")
    assert is_ours(process)
    assert await process.wait() == 0


async def test_program_and_shell_command_run_with_their_pipes() -> None:
    script = "read line; echo out $line; echo err >&2; exit 3"
    for creation in (
        asyncio.create_subprocess_exec("/bin/sh", "-c", script, stdin=PIPE, stdout=PIPE, stderr=PIPE),
        asyncio.create_subprocess_shell(script, stdin=PIPE, stdout=PIPE, stderr=PIPE),
        asyncio.create_subprocess_shell(script.encode(), stdin=PIPE, stdout=PIPE, stderr=PIPE),
    ):
        process = await creation
        assert process.returncode is None
        assert await talk(process, b"in\n") == (b"out in\n", b"err\n")
        assert process.returncode == await process.wait() == 3


async def test_returncode_is_negative_signal_number_of_killed_process() -> None:
    process = await asyncio.create_subprocess_exec("/bin/sh", "-c", "kill -SEGV $$")
    assert await process.wait() == -signal.SIGSEGV


async def test_streams_can_be_files_and_one_another(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        process = await asyncio.create_subprocess_shell(
            "cat; echo out; echo err >&2", stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        assert await process.wait() == 0
        assert (process.stdin, process.stdout, process.stderr) == (None, None, None)
    assert path.read_text() == "out\nerr\n"
    assert await shell_output("echo err >&2", stderr=subprocess.STDOUT) == "err"


KEYWORDS: list[Any] = [
    pytest.param("pwd", {"cwd": "/usr"}, "/usr", id="cwd"),
    pytest.param("pwd", {"cwd": Path("/usr")}, "/usr", id="cwd-path"),
    pytest.param("echo $A$B", {"env": {"A": "x", b"B": b"y"}}, "xy", id="env"),
    pytest.param("umask", {"umask": 0o027}, "0027", id="umask"),
    pytest.param("umask", {"preexec_fn": lambda: os.umask(0o031)}, "0031", id="preexec_fn"),
    pytest.param("id -u", {"user": 1}, "1", id="user", marks=needs_root),
    pytest.param("id -u", {"user": "daemon"}, "1", id="user-name", marks=needs_root),
    pytest.param("id -g", {"group": 1}, "1", id="group", marks=needs_root),
    pytest.param("id -g", {"group": "daemon"}, "1", id="group-name", marks=needs_root),
    pytest.param("id -G", {"extra_groups": [7, 9], "group": 7}, "7 9", id="extra_groups", marks=needs_root),
    pytest.param("grep SigIgn /proc/self/status | cut -c21-", {"restore_signals": True}, "0000", id="restore_signals"),
    # Python itself ignores SIGPIPE, number 13.
    pytest.param("grep SigIgn /proc/self/status | cut -c21-", {"restore_signals": False}, "1000", id="keep-signals"),
    pytest.param("echo", {"bufsize": 0, "shell": False, "text": False, "encoding": None}, "", id="what-asyncio-allows"),
]


@pytest.mark.parametrize(("script", "keywords", "expected"), KEYWORDS)
async def test_keyword_of_popen_works(script: str, keywords: dict[str, Any], expected: str) -> None:
    assert await shell_output(script, **keywords) == expected


async def test_executable_is_run_under_the_name_of_the_program() -> None:
    assert await output_of("a-name", "-c", "echo $0", executable="/bin/sh") == "a-name"
    process = await asyncio.create_subprocess_shell("echo $0", executable="/bin/sh", stdout=PIPE)
    assert await talk(process) == (b"/bin/sh\n", None)


async def group_and_session(**keywords: Any) -> tuple[int, int, int]:
    """The pid of a process, its process group and its session."""
    fields = (await shell_output('echo $$; read stat < /proc/$$/stat; echo "$stat"', **keywords)).split()
    return int(fields[0]), int(fields[5]), int(fields[6])


async def test_process_gets_a_session_of_its_own() -> None:
    assert (await group_and_session())[1:] == (os.getpgid(0), os.getsid(0))
    pid, group, session = await group_and_session(start_new_session=True)
    assert pid == group == session


@pytest.mark.skipif(sys.version_info < (3, 11), reason="process_group is new in Python 3.11")
async def test_process_gets_a_group_of_its_own() -> None:
    pid, group, session = await group_and_session(process_group=0)
    assert pid == group
    assert session == os.getsid(0)


@pytest.mark.skipif(sys.version_info < (3, 10), reason="pipesize is new in Python 3.10")
async def test_pipes_have_the_size_that_was_asked_for() -> None:
    process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE, pipesize=8192)
    popen = process._transport.get_extra_info("subprocess")  # type: ignore[attr-defined] # there is no public way
    f_getpipe_sz = 1032  # fcntl.F_GETPIPE_SZ, which Python knows since 3.10
    assert [fcntl.fcntl(pipe, f_getpipe_sz) for pipe in (popen.stdin, popen.stdout)] == [8192, 8192]
    await process.communicate(b"")


async def test_process_has_those_descriptors_that_it_was_passed() -> None:
    look = "for fd in %d %d; do [ -e /proc/self/fd/$fd ] && echo yes || echo no; done"
    with gate() as (one, _), gate() as (other, _):
        os.set_inheritable(other, True)
        assert (await shell_output(look % (one, other))).split() == ["no", "no"]
        assert (await shell_output(look % (one, other), pass_fds=(one,))).split() == ["yes", "no"]
        assert (await shell_output(look % (one, other), close_fds=False)).split() == ["no", "yes"]


def raise_in_child() -> None:
    raise ZeroDivisionError


BAD_CALLS: list[Any] = [
    *({name: value} for name, value in [("universal_newlines", True), ("text", True), ("bufsize", 1), ("shell", True)]),
    *({name: value} for name, value in [("encoding", "utf-8"), ("errors", "strict"), ("no_such_keyword", 1)]),
    {"creationflags": 1},
    {"startupinfo": object()},
    {"program": "/no/such/program"},
    {"program": "no-such-program-on-the-path"},
    {"program": "/"},
    {"program": "/etc/passwd"},
    {"program": "/bin/tr\0ue"},
    {"program": 1},
    {"program": None},
    {"cwd": "/no/such/folder"},
    {"cwd": "/etc/passwd"},
    {"env": {"A=B": "C"}},
    {"env": {"A": 1}},
    {"env": 1},
    {"pass_fds": (-1,)},
    {"pass_fds": 1},
    {"user": "no-such-user"},
    {"group": "no-such-group"},
    {"user": -1},
    {"extra_groups": 5},
    {"preexec_fn": raise_in_child},
    {"stdin": "no-file"},
    {"umask": "022"},
    {"executable": "/no/such/program"},
]


def error_of(loop_factory: LoopFactory, **keywords: Any) -> tuple[object, ...]:
    """What creating a subprocess raises on such a loop."""

    async def create() -> Any:
        call = {"program": "/bin/true", **keywords}
        process = await asyncio.create_subprocess_exec(call.pop("program"), **call)
        await process.wait()

    try:
        return ("none", run_on(loop_factory, create()))
    except Exception as exc:
        return type(exc), str(exc), getattr(exc, "errno", None), getattr(exc, "filename", None)


@pytest.mark.parametrize("keywords", BAD_CALLS, ids=lambda call: "-".join(map(str, call)))
def test_bad_call_raises_what_asyncio_raises(loop_factory: LoopFactory, keywords: dict[str, Any]) -> None:
    expected = error_of(asyncio.SelectorEventLoop, **keywords)
    assert expected[0] != "none"
    assert error_of(loop_factory, **keywords) == expected


BAD_SHELL_CALLS: list[Any] = [{"cmd": ["true"]}, {"cmd": "true", "shell": False}, {"cmd": "true", "text": True}]


@pytest.mark.parametrize("call", BAD_SHELL_CALLS, ids=str)
def test_bad_shell_command_raises_what_asyncio_raises(loop_factory: LoopFactory, call: dict[str, Any]) -> None:
    def error_on(factory: LoopFactory) -> tuple[object, ...]:
        with pytest.raises(ValueError, match="must be") as caught:
            run_on(factory, asyncio.create_subprocess_shell(**call))
        return caught.type, str(caught.value)

    assert error_on(loop_factory) == error_on(asyncio.SelectorEventLoop)


async def test_protocol_factory_that_raises_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    made: list[Any] = []
    monkeypatch.setattr(sys, "audit", lambda *event: made.append(event))

    def fail() -> asyncio.SubprocessProtocol:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await loop.subprocess_exec(fail, "/bin/true")
    assert made == []


async def test_extra_info_is_the_popen_of_the_process() -> None:
    process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE)
    transport = process._transport  # type: ignore[attr-defined] # there is no public way
    popen = transport.get_extra_info("subprocess")
    assert isinstance(popen, subprocess.Popen)
    assert (popen.pid, popen.args, popen.returncode) == (process.pid, ("/bin/cat",), None)
    assert transport.get_extra_info("no such") is None
    await process.communicate(b"")
    assert popen.returncode == popen.poll() == popen.wait() == 0


async def test_wait_returns_at_exit_though_a_grandchild_holds_the_pipe() -> None:
    with gate() as (held, release):
        process = await asyncio.create_subprocess_shell(f"{reading(held)} & exit 4", stdout=PIPE, pass_fds=(held,))
        assert process.stdout is not None
        assert await process.wait() == process.returncode == 4
        assert not process.stdout.at_eof()
        release()
        assert await process.stdout.read() == b""


async def test_communicate_reads_to_the_end_that_a_grandchild_holds() -> None:
    with gate() as (held, release):
        script = f"({reading(held)}; echo late) & echo early"
        process = await asyncio.create_subprocess_shell(script, stdout=PIPE, pass_fds=(held,))
        talk = asyncio.ensure_future(process.communicate())
        assert await process.wait() == 0
        await drain()
        assert not talk.done()
        release()
        assert list(await talk) == [b"early\nlate\n", None]


async def test_many_tasks_wait_for_one_process() -> None:
    process = await asyncio.create_subprocess_shell("read x; exit 6", stdin=PIPE)
    waits = [asyncio.ensure_future(process.wait()) for _ in range(10)]
    await drain()
    waits[3].cancel()
    process.stdin.close()  # type: ignore[union-attr] # it is a pipe
    results = await asyncio.gather(*waits, return_exceptions=True)
    assert isinstance(results.pop(3), asyncio.CancelledError)
    assert results == [6] * 9
    assert await process.wait() == 6


async def test_cancelled_waits_leave_nothing_behind() -> None:
    """Polling with wait_for() is common; each cancelled future was kept until the exit."""
    process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE)
    for _ in range(5):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), 0.0001)
    assert not process._transport._waiters  # type: ignore[attr-defined] # there is no public way
    await process.communicate(b"")


async def test_hundred_processes_at_once_keep_their_outputs_and_returncodes_apart() -> None:
    async def run(number: int) -> tuple[bytes | None, int | None]:
        process = await asyncio.create_subprocess_shell("read n; echo $n; exit $n", stdin=PIPE, stdout=PIPE)
        output, _ = await talk(process, b"%d\n" % number)
        return output, process.returncode

    results = await asyncio.gather(*[run(number) for number in range(100)])
    assert results == [(b"%d\n" % number, number) for number in range(100)]


def test_loops_in_two_threads_run_subprocesses_at_once(loop_factory: LoopFactory) -> None:
    results: list[list[str]] = []

    async def run() -> None:
        results.append(list(await asyncio.gather(*[shell_output("echo hello") for _ in range(20)])))

    threads = [threading.Thread(target=run_on, args=(loop_factory, run())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [["hello"] * 20] * 2


async def test_a_megabyte_goes_both_ways() -> None:
    process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE)
    data = bytes(range(256)) * 4096
    assert await talk(process, data) == (data, None)


async def test_reader_that_is_full_stops_the_process_from_writing() -> None:
    process = await asyncio.create_subprocess_exec("/usr/bin/head", "-c", "5000000", "/dev/zero", stdout=PIPE, limit=1000)
    reader = process.stdout
    assert reader is not None
    await reader.readexactly(1)
    for _ in range(5):
        await drain()
    assert process.returncode is None
    assert len(reader._buffer) <= 65536  # type: ignore[attr-defined] # what one read gives at most
    assert len(await reader.read()) == 4_999_999
    assert await process.wait() == 0


async def test_writer_waits_until_the_process_reads() -> None:
    with gate() as (held, release):
        process = await asyncio.create_subprocess_shell(f"{reading(held)}; cat > /dev/null", stdin=PIPE, pass_fds=(held,))
        writer = process.stdin
        assert writer is not None
        writer.write(bytes(1_000_000))
        draining = asyncio.ensure_future(writer.drain())
        await drain()
        assert not draining.done()
        release()
        await draining
        writer.close()
        assert await process.wait() == 0


async def test_communicate_ignores_a_stdin_that_is_closed_early() -> None:
    process = await asyncio.create_subprocess_shell("exec <&-; echo done", stdin=PIPE, stdout=PIPE)
    assert list(await process.communicate(bytes(1_000_000))) == [b"done\n", None]


async def test_communicate_ignores_a_stdin_that_was_closed_long_ago() -> None:
    """uvloop's own transport raises RuntimeError: the handler is closed."""
    process = await asyncio.create_subprocess_shell("echo done", stdin=PIPE, stdout=PIPE)
    await process.wait()
    await drain()
    assert await talk(process, b"too late") == (b"done\n", None)


async def test_writing_to_a_closed_stdin_does_nothing_and_drain_says_why() -> None:
    process = await asyncio.create_subprocess_exec("/bin/true", stdin=PIPE)
    writer = process.stdin
    assert writer is not None
    await process.wait()
    await drain()
    assert writer.transport.is_closing()
    writer.write(b"x")
    writer.writelines([b"x", b"y"])
    writer.write_eof()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        await writer.drain()
    writer.close()


async def test_end_of_input_can_be_written() -> None:
    process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdin.can_write_eof()
    process.stdin.write(b"x")
    process.stdin.write_eof()
    assert await process.stdout.read() == b"x"
    assert await process.wait() == 0


class Recorder(asyncio.SubprocessProtocol):
    """Remembers what it is told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.end = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.tell("connection_made")

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.tell("data", fd, data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self.tell("pipe_lost", fd)

    def process_exited(self) -> None:
        self.tell("exited")

    def connection_lost(self, exc: Exception | None) -> None:
        assert exc is None
        self.end.set_result(None)
        self.tell("connection_lost")

    def tell(self, *event: Any) -> None:
        self.events.append(event)


class Raiser(Recorder):
    """Raises whatever it is told."""

    def tell(self, *event: Any) -> None:
        super().tell(*event)
        raise ZeroDivisionError(event[0])


EVENTS = [
    ("connection_made",),
    ("connection_lost",),
    ("data", 1, b"out\n"),
    ("data", 2, b"err\n"),
    ("exited",),
    ("pipe_lost", 0),
    ("pipe_lost", 1),
    ("pipe_lost", 2),
]


def assert_in_order(events: list[tuple[Any, ...]]) -> None:
    """Each event once; what depends on another after that."""
    assert sorted(events) == sorted(EVENTS)
    assert events[0] == ("connection_made",)
    assert events[-1] == ("connection_lost",)
    for fd, data in ((1, b"out\n"), (2, b"err\n")):
        assert events.index(("data", fd, data)) < events.index(("pipe_lost", fd))


async def test_protocol_is_told_everything_once_and_in_order() -> None:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.subprocess_shell(Recorder, "echo out; echo err >&2")
    assert transport.get_protocol() is protocol
    assert protocol.events[0] == ("connection_made",)
    await protocol.end
    assert_in_order(protocol.events)
    assert transport.get_protocol() is None  # as asyncio's


async def test_protocol_that_raises_is_told_the_rest_and_the_loop_what_it_raised() -> None:
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
    """Pauses the reading at once."""

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


async def test_repr_tells_the_state() -> None:
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


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pids of the processes that transports were made for."""
    pids: list[int] = []
    init = SubprocessTransport.__init__

    def note(self: Any, loop: Any, registry: Any, protocol: Any, process: Any, *args: Any) -> None:
        pids.append(process.pid)
        init(self, loop, registry, protocol, process, *args)

    monkeypatch.setattr(SubprocessTransport, "__init__", note)
    return pids


async def test_cancellation_before_the_process_is_handed_over_ends_it_first(started: list[int]) -> None:
    creation = asyncio.ensure_future(asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE, stderr=PIPE))
    await asyncio.sleep(0)
    for _ in range(3):
        creation.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creation
    assert_reaped(started[0])


@pytest.mark.parametrize("rounds", range(3))
async def test_creation_cancelled_after_any_number_of_rounds_leaves_no_process(started: list[int], rounds: int) -> None:
    creation = asyncio.ensure_future(asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE, stderr=PIPE))
    for _ in range(rounds):
        await asyncio.sleep(0)
    if creation.cancel():
        with pytest.raises(asyncio.CancelledError):
            await creation
        for pid in started:
            assert_reaped(pid)
    else:
        await creation.result().communicate(b"")


@pytest.mark.parametrize("transport", ["WritePipeTransport", "ReadPipeTransport"])
async def test_pipe_that_cannot_be_connected_ends_the_process(
    started: list[int], transport: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, "pipe")

    monkeypatch.setattr(_subprocess, transport, fail)
    before = open_descriptors()
    with pytest.raises(OSError, match="pipe"):
        await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    await drain()
    after = {fd for fd, what in open_descriptors().items() if what.startswith("pipe") and before.get(fd) != what}
    assert not after
    assert_reaped(started[0])
    assert caplog.messages == []  # that we have reaped it ourselves is no theft


async def test_process_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch, started: list[int]) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise OSError(errno.EMFILE, "too many")

    await shell_output("echo")  # the loop's own descriptors
    before = open_descriptors()
    monkeypatch.setattr(Registry, "observe", fail)
    with pytest.raises(OSError, match="too many"):
        await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE, stderr=PIPE, **BY_POPEN)
    assert_reaped(started[1])
    assert {fd for fd, what in open_descriptors().items() if what.startswith("pipe") and before.get(fd) != what} == set()


async def test_cancellation_does_not_wait_for_a_process_that_may_not_be_killed(
    monkeypatch: pytest.MonkeyPatch, started: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """As it is if it has become another user. It stays watched."""

    def refuse(*args: Any) -> bool:
        raise PermissionError(errno.EPERM, "not allowed")

    with gate() as (held, release):
        creation = asyncio.ensure_future(asyncio.create_subprocess_shell(reading(held), pass_fds=(held,)))
        await asyncio.sleep(0)
        monkeypatch.setattr(Registry, "send_signal", refuse)
        creation.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creation
        (pid,) = started
        assert caplog.messages == [f"cannot kill process {pid}: it runs as another user"]
        ended = asyncio.ensure_future(aiopidfd.wait(pid))
        await drain()
        assert not ended.done()
        release()
        assert (await ended).source == "reaped"


@pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning")  # Popen's, of a process that is dropped while it runs
async def test_failed_creation_does_not_wait_for_a_process_that_may_not_be_killed(
    monkeypatch: pytest.MonkeyPatch, started: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise OSError(errno.EMFILE, "too many")

    def refuse(process: Any) -> None:
        raise PermissionError(errno.EPERM, "not allowed")

    with gate() as (held, release):
        monkeypatch.setattr(Registry, "observe", fail)
        monkeypatch.setattr(subprocess.Popen, "kill", refuse)
        with pytest.raises(OSError, match="too many"):
            await asyncio.create_subprocess_shell(reading(held), stdin=PIPE, pass_fds=(held,), **BY_POPEN)
        (pid,) = started
        assert caplog.messages == [f"cannot kill process {pid}: it runs as another user"]
        monkeypatch.undo()
        gc.collect()
        release()
        await_end(pid)
        subprocess.run(["/bin/true"], check=True)  # Popen reaps what it was left with when it starts another
        assert_reaped(pid)


@pytest.mark.parametrize("free", range(14))
async def test_shortage_of_descriptors_leaves_no_process_and_no_descriptor(
    started: list[int], free: int, backend: str
) -> None:
    """Whatever step it hits: the process runs, or there is none."""
    if backend == "sigchld" and sys.version_info < (3, 11, 4):
        pytest.skip("Popen itself leaves pipes open before Python 3.11.4: python/cpython#87474")
    await shell_output("echo")  # the loop's own descriptors
    started.clear()
    before = open_descriptors()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    filler: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 40, limits[1]))
        with contextlib.suppress(OSError):  # EMFILE
            while True:
                filler.append(os.open("/dev/null", os.O_RDONLY))
        for fd in filler[len(filler) - free :]:
            os.close(fd)
        del filler[len(filler) - free :]
        process = None
        try:
            process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE, stderr=PIPE)
        except OSError as exc:
            assert exc.errno == errno.EMFILE  # noqa: PT017 - it may succeed, too
    finally:
        for fd in filler:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    if process is not None:
        assert await talk(process, b"x") == (b"x", b"")
    await drain()
    for pid in started:
        assert_reaped(pid)
    assert {fd for fd, what in open_descriptors().items() if what.startswith("pipe") and before.get(fd) != what} == set()


@pytest.fixture
def thief(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], object]], None]:
    """Has each process ended, and its status taken, before Popen returns it."""
    real = subprocess.Popen

    def install(steal: Callable[[Any], object]) -> None:
        def popen(*args: Any, **keywords: Any) -> Any:
            process = real(*args, **keywords)
            steal(process)
            return process

        monkeypatch.setattr(subprocess, "Popen", popen)

    return install


async def test_status_stolen_before_we_hold_a_pidfd_is_255_at_once(thief: Any, caplog: pytest.LogCaptureFixture) -> None:
    thief(lambda process: os.waitpid(process.pid, 0))
    process = await asyncio.create_subprocess_shell("echo x; exit 3", stdout=PIPE, **BY_POPEN)
    assert await talk(process) == (b"x\n", None)
    assert process.returncode == 255
    assert len(caplog.messages) == 1
    assert f"{process.pid}" in caplog.messages[0]
    assert "255" in caplog.messages[0]


async def test_status_that_popen_itself_has_taken_is_not_lost(thief: Any, caplog: pytest.LogCaptureFixture) -> None:
    thief(lambda process: process.wait())
    process = await asyncio.create_subprocess_shell("exit 3", **BY_POPEN)
    assert await process.wait() == 3
    assert caplog.messages == []


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_closed_loop_leaves_no_pidfd_and_later_no_zombie(loop_factory: LoopFactory) -> None:
    with gate() as (held, release):
        loop = loop_factory()
        process = loop.run_until_complete(asyncio_create(loop, reading(held), stdin=PIPE, stdout=PIPE, pass_fds=(held,)))
        pid = process.pid
        loop.close()
        assert not [what for what in open_descriptors().values() if what.startswith(("pidfd:", "anon_inode:[pidfd]"))]
        del process, loop
        gc.collect()
        os.kill(pid, 0)  # it lives
        release()
        await_end(pid)
        run_on(loop_factory, shell_output("echo"))
        assert_reaped(pid)


async def asyncio_create(loop: asyncio.AbstractEventLoop, script: str, **keywords: Any) -> asyncio.subprocess.Process:
    assert asyncio.get_running_loop() is loop
    return await asyncio.create_subprocess_shell(script, **keywords)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_transport_can_be_closed_after_its_loop(loop_factory: LoopFactory) -> None:
    """asyncio's own raised "Event loop is closed" until Python 3.14."""
    loop = loop_factory()
    transport, _ = loop.run_until_complete(loop.subprocess_exec(asyncio.SubprocessProtocol, "/bin/cat"))
    pid = transport.get_pid()
    loop.close()
    transport.close()
    assert transport.is_closing()
    del transport, _, loop
    gc.collect()  # closes its stdin: cat ends
    await_end(pid)
    run_on(loop_factory, shell_output("echo"))
    assert_reaped(pid)


LOOPS_BY_NAME = """
import asyncio, gc, os, subprocess, sys
import aiopidfd

def make_loop(kind):
    if kind in ("SelectorEventLoop", "UvloopEventLoop"):
        return getattr(aiopidfd, kind)()
    if kind == "uvloop":
        import uvloop
        loop = uvloop.new_event_loop()
    else:
        loop = asyncio.SelectorEventLoop()
    aiopidfd.PidfdWatcher().attach_loop(loop)
    return loop
"""

KINDS = [
    "SelectorEventLoop",
    pytest.param("UvloopEventLoop", marks=needs_uvloop),
    "asyncio",
    pytest.param("uvloop", marks=needs_uvloop),
]


def run_python(script: str, *arguments: str, options: tuple[str, ...] = ("-W", "error")) -> tuple[str, str]:
    """Run a script in a process of its own, which must succeed; return what it prints, and what it says on stderr."""
    done = subprocess.run(
        [sys.executable, *options, "-c", LOOPS_BY_NAME + textwrap.dedent(script), *arguments],
        env=undebugged_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip(), done.stderr


NOISE = ("Event loop is closed", "Exception ignored", "Traceback", "never retrieved", "ignored GeneratorExit")


def assert_quiet(stderr: str) -> None:
    """Warnings of what was left open are as they should be; nothing else is said."""
    assert not [noise for noise in NOISE if noise in stderr], stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("closed", ["loop", "nothing"])
def test_destructors_are_quiet_when_processes_are_left_behind(kind: str, closed: str) -> None:
    script = """
        async def main():
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            return [await asyncio.create_subprocess_exec("/bin/cat", **pipes) for _ in range(3)]

        loop = make_loop(sys.argv[1])
        processes = loop.run_until_complete(main())
        processes[0].kill()
        processes[1].stdin.write(b"x")
        if sys.argv[2] == "loop":
            loop.close()
        del loop, processes
        gc.collect()
        print("end")
    """
    output, stderr = run_python(script, kind, closed, options=("-X", "dev"))
    assert output == "end"
    assert_quiet(stderr)


ECHO = """
        async def main():
            process = await asyncio.create_subprocess_shell("cat; exit 3", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            print(type(process._transport).__module__, *(await process.communicate(b"x")), process.returncode)
"""
OURS = "aiopidfd._subprocess b'x' None 3"


@needs_uvloop
def test_our_loop_needs_no_policy_and_cares_for_no_other() -> None:
    script = """
        import warnings
        import uvloop

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        aiopidfd.run(main(), loop_factory=aiopidfd.SelectorEventLoop)
    """
    assert run_python(ECHO + script) == (OURS, "")


FACTORIES = [
    "None",
    "aiopidfd.SelectorEventLoop",
    pytest.param("aiopidfd.UvloopEventLoop", marks=needs_uvloop),
]


@pytest.mark.parametrize("factory", FACTORIES)
def test_policy_makes_loops_of_its_factory(factory: str) -> None:
    script = f"""
        import warnings

        policy = aiopidfd.EventLoopPolicy(loop_factory={factory})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # asyncio's own, of policies, since Python 3.14
            asyncio.set_event_loop_policy(policy)
        asyncio.run(main())
        loop = policy.new_event_loop()
        print(isinstance(loop, {factory} or getattr(aiopidfd, "{"UvloopEventLoop" if uvloop else "SelectorEventLoop"}")))
        loop.close()
    """
    assert run_python(ECHO + script) == (f"{OURS}\nTrue", "")


@needs_child_watchers
@pytest.mark.parametrize(
    "factory",
    [
        *FACTORIES,
        "asyncio.SelectorEventLoop",
        pytest.param("__import__('uvloop').new_event_loop", marks=needs_uvloop),
    ],
)
def test_policy_has_child_watchers_on_every_loop(factory: str) -> None:
    script = f"""
        import warnings

        warnings.filterwarnings("ignore", message=".*child_watcher", category=DeprecationWarning)  # asyncio's, since 3.12
        asyncio.set_event_loop_policy(aiopidfd.EventLoopPolicy(loop_factory={factory}))
        assert isinstance(asyncio.get_child_watcher(), aiopidfd.PidfdWatcher)
        first, second = aiopidfd.PidfdWatcher(), aiopidfd.PidfdWatcher()
        asyncio.set_child_watcher(first)
        assert asyncio.get_child_watcher() is first
        asyncio.set_child_watcher(second)
        assert asyncio.get_child_watcher() is second
        assert "closed" in repr(first)
        asyncio.run(main())
        asyncio.set_child_watcher(None)
        assert "closed" in repr(second)
        asyncio.run(main())
    """
    outputs, stderr = run_python(ECHO + script)
    assert stderr == ""
    first, second = outputs.splitlines()
    assert first == OURS
    # Without a watcher that was set, loops that are not ours do what they always do.
    assert second == OURS or "(" in factory or factory == "asyncio.SelectorEventLoop"
    assert second.endswith("b'x' None 3")


def test_import_of_every_public_name_warns_of_nothing() -> None:
    script = """
        for name in aiopidfd.__all__:
            if name != "UvloopEventLoop":
                getattr(aiopidfd, name)
    """
    assert run_python(script) == ("", "")


@needs_uvloop
def test_uvloop_is_imported_only_when_its_loop_is_asked_for() -> None:
    script = """
        assert "uvloop" not in sys.modules
        loop = aiopidfd.UvloopEventLoop()
        import uvloop

        assert isinstance(loop, uvloop.Loop)
        assert aiopidfd.UvloopEventLoop is type(loop)
        print(type(loop).__module__, type(loop).__qualname__)
        loop.close()
    """
    assert run_python(script) == ("aiopidfd UvloopEventLoop", "")


def test_without_uvloop_its_loop_names_the_extra_and_the_rest_works() -> None:
    script = """
        sys.modules["uvloop"] = None
        for _ in range(2):
            try:
                from aiopidfd import UvloopEventLoop
            except ImportError as exc:
                print(exc)
        aiopidfd.run(main())
        try:
            aiopidfd.no_such_name
        except AttributeError as exc:
            print(exc)
    """
    message = "UvloopEventLoop needs uvloop: pip install 'aiopidfd[uvloop]'"
    expected = [message, message, OURS, "module 'aiopidfd' has no attribute 'no_such_name'"]
    assert run_python(ECHO + script) == ("\n".join(expected), "")


async def answer() -> tuple[bool, str]:
    process = await asyncio.create_subprocess_exec("/bin/echo", "hello", stdout=PIPE)
    output, _ = await process.communicate()
    return is_ours(process), output.decode()


ANSWER = (True, "hello\n")

OUR_CLASSES = ["SelectorEventLoop", pytest.param("UvloopEventLoop", marks=needs_uvloop)]


@pytest.fixture(params=OUR_CLASSES)
def loop_class(request: pytest.FixtureRequest) -> Any:
    """Each of our loop classes."""
    return getattr(aiopidfd, request.param)


def test_run_returns_what_main_returns(loop_class: Any) -> None:
    assert aiopidfd.run(answer(), loop_factory=loop_class) == ANSWER


def test_run_takes_uvloop_if_it_is_there() -> None:
    async def main() -> type[Any]:
        return type(asyncio.get_running_loop())

    assert aiopidfd.run(main()) is (aiopidfd.UvloopEventLoop if uvloop else aiopidfd.SelectorEventLoop)


def test_run_passes_on_what_main_raises(loop_class: Any) -> None:
    async def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        aiopidfd.run(main(), loop_factory=loop_class)


@pytest.mark.parametrize("debug", [True, False])
def test_run_sets_debug(loop_class: Any, debug: bool) -> None:
    async def main() -> bool:
        return asyncio.get_running_loop().get_debug()

    assert aiopidfd.run(main(), loop_factory=loop_class, debug=debug) is debug


def test_run_refuses_what_is_no_coroutine() -> None:
    with pytest.raises(ValueError, match="a coroutine was expected"):
        aiopidfd.run(answer)  # type: ignore[arg-type] # the point of the test


def test_run_refuses_to_run_inside_a_loop(loop_class: Any) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="running event loop"):
            aiopidfd.run(answer(), loop_factory=loop_class)

    aiopidfd.run(main(), loop_factory=loop_class)


def test_run_cancels_tasks_and_closes_generators_at_the_end(loop_class: Any) -> None:
    ended: list[str] = []

    async def task() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append("task")

    async def generate() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            ended.append("generator")

    async def main() -> list[Any]:
        left = asyncio.ensure_future(task())
        generator = generate()
        assert await generator.__anext__() == 1
        await asyncio.get_running_loop().run_in_executor(None, int)
        return [left, generator]  # neither is dropped before the end

    left, _ = aiopidfd.run(main(), loop_factory=loop_class)
    assert left.cancelled()
    assert ended == ["task", "generator"]
    assert threading.active_count() == 1


def test_run_reports_what_a_cancelled_task_raises(loop_class: Any) -> None:
    contexts: list[dict[str, Any]] = []

    async def task() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            raise ZeroDivisionError

    async def main() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
        left = asyncio.ensure_future(task())
        await asyncio.sleep(0)
        return left

    aiopidfd.run(main(), loop_factory=loop_class)
    assert [type(context["exception"]) for context in contexts] == [ZeroDivisionError]


def test_run_ends_cleanly_on_keyboard_interrupt(loop_class: Any) -> None:
    ended: list[str] = []

    async def main() -> None:
        process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE)
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
        try:
            await process.wait()
        finally:
            process.kill()
            await process.wait()
            ended.append("main")

    # Whoever has started the tests may ignore SIGINT, and Python then does so, too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            aiopidfd.run(main(), loop_factory=loop_class)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == ["main"]


@needs_uvloop
def test_uvloop_run_takes_our_loop() -> None:
    assert uvloop.run(answer(), loop_factory=aiopidfd.UvloopEventLoop) == ANSWER


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.Runner is new in Python 3.11")
def test_asyncio_runner_takes_our_loops(loop_class: Any) -> None:
    with asyncio.Runner(loop_factory=loop_class) as runner:  # type: ignore[attr-defined] # mypy checks for an older Python
        assert runner.run(answer()) == ANSWER
        assert runner.run(answer()) == ANSWER


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio.run(loop_factory=) is new in Python 3.12")
def test_asyncio_run_takes_our_loops(loop_class: Any) -> None:
    assert asyncio.run(answer(), loop_factory=loop_class) == ANSWER  # type: ignore[call-arg,unused-ignore] # since 3.12


@pytest.fixture(params=["asyncio", pytest.param("uvloop", marks=needs_uvloop)])
def plain_loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that is not ours."""
    loop = asyncio.SelectorEventLoop() if request.param == "asyncio" else uvloop.Loop()
    yield loop
    loop.close()


def has_native_methods(loop: Any) -> bool:
    return not {"subprocess_exec", "subprocess_shell"} & set(vars(loop))


def test_detaching_gives_the_loop_its_own_methods_back(plain_loop: asyncio.AbstractEventLoop) -> None:
    watcher = PidfdWatcher()
    for detach in (partial(watcher.attach_loop, None), watcher.close):
        watcher.attach_loop(plain_loop)
        assert not has_native_methods(plain_loop)
        assert plain_loop.run_until_complete(answer()) == ANSWER
        detach()
        assert has_native_methods(plain_loop)
    assert plain_loop.run_until_complete(answer()) == (False, "hello\n")


def test_loop_stays_plugged_until_the_last_watcher_has_left(plain_loop: asyncio.AbstractEventLoop) -> None:
    one, other = PidfdWatcher(), PidfdWatcher()
    one.attach_loop(plain_loop)
    one.attach_loop(plain_loop)
    other.attach_loop(plain_loop)
    one.close()
    assert plain_loop.run_until_complete(answer()) == ANSWER
    other.attach_loop(None)
    assert has_native_methods(plain_loop)


def test_watcher_that_was_dropped_stays_plugged_whoever_comes_after(plain_loop: asyncio.AbstractEventLoop) -> None:
    """Its id, which was what it was known by, is the next watcher's."""
    PidfdWatcher().attach_loop(plain_loop)
    for _ in range(5):
        other = PidfdWatcher()
        other.attach_loop(plain_loop)
        other.close()
        del other
    assert plain_loop.run_until_complete(answer()) == ANSWER


def test_watcher_that_moves_to_another_loop_unplugs_the_first(plain_loop: asyncio.AbstractEventLoop) -> None:
    other = asyncio.SelectorEventLoop()
    with contextlib.closing(other):
        watcher = PidfdWatcher()
        watcher.attach_loop(plain_loop)
        watcher.attach_loop(other)
        assert has_native_methods(plain_loop)
        assert other.run_until_complete(answer()) == ANSWER


def test_processes_go_on_when_the_watcher_leaves(plain_loop: asyncio.AbstractEventLoop) -> None:
    watcher = PidfdWatcher()
    watcher.attach_loop(plain_loop)

    async def main() -> tuple[bytes | None, bytes | None]:
        process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE)
        watcher.close()
        return await talk(process, b"still here")

    assert plain_loop.run_until_complete(main()) == (b"still here", None)


def test_plugged_loop_is_freed_when_it_is_dropped(loop_factory: LoopFactory) -> None:
    import weakref

    loop = loop_factory()
    loop.run_until_complete(answer())
    dropped = weakref.ref(loop)
    loop.close()
    del loop
    gc.collect()
    assert dropped() is None


def test_attaching_to_a_loop_of_ours_changes_nothing(loop_class: Any) -> None:
    loop = loop_class()
    watcher = PidfdWatcher()
    with contextlib.closing(loop):
        watcher.attach_loop(loop)
        assert has_native_methods(loop)
        watcher.close()
        assert loop.run_until_complete(answer()) == ANSWER
