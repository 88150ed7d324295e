"""Subprocesses on our loops, and on other loops with a watcher: how they start, and how they end."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from ..conftest import LoopFactory, run_on
from ..helpers.children import few_descriptors
from ..helpers.subprocesses import (
    BY_POPEN,
    PIPE,
    drain,
    gate,
    is_ours,
    needs_root,
    output_of,
    plug,  # noqa: F401 - pytest looks for it in this module
    pytest_generate_tests,  # noqa: F401 - pytest looks for it in this module
    reading,
    shell_output,
    talk,
)

# Each test runs on loops of our classes, and on other loops with a watcher: see `plug`.
pytestmark = pytest.mark.usefixtures("plug")


async def test_subprocesses_are_ours() -> None:
    process = await asyncio.create_subprocess_exec("/bin/true")
    assert is_ours(process)
    assert await process.wait() == 0


@pytest.mark.core
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
    f_getpipe_sz = 1032  # fcntl.F_GETPIPE_SZ, new in Python 3.10
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
    """The exception of a failed start on such a loop."""

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


@pytest.mark.parametrize("free", range(12))
@pytest.mark.parametrize("keywords", [{}, BY_POPEN], ids=["in C", "by Popen"])
async def test_shortage_of_descriptors_starts_no_process_and_leaves_nothing(free: int, keywords: dict[str, Any]) -> None:
    await output_of("/bin/true")  # so that all is open that a loop opens once
    process = None
    with few_descriptors(free):
        try:
            process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE, stderr=PIPE, **keywords)
        except OSError as exc:
            assert exc.errno == errno.EMFILE  # noqa: PT017 - whether it is raised depends on the backend, too
            assert free < 9
    if process is not None:
        assert await process.communicate(b"in") == (b"in", b"")
        assert free >= 6  # three pipes


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
        assert await asyncio.wait_for(process.wait(), 10) == process.returncode == 4
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
    """Polling with wait_for() is common. A cancelled future must not stay until the exit."""
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
