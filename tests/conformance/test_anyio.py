"""anyio's subprocesses, unchanged, on our loops."""

from __future__ import annotations

import operator
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import aiopidfd
from aiopidfd._programs.transport import SubprocessTransport

anyio = pytest.importorskip("anyio", reason="anyio is not installed")
to_process = pytest.importorskip("anyio.to_process")

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment] # tests on uvloop are skipped, with a reason

Run = Callable[[Callable[[], Any]], Any]


@pytest.fixture(params=["anyio.run", "aiopidfd.run"])
def starter(request: pytest.FixtureRequest) -> str:
    """What makes the loop and runs the coroutine of the test on it."""
    return str(request.param)


@pytest.fixture(
    params=[
        "SelectorEventLoop",
        pytest.param("UvloopEventLoop", marks=pytest.mark.skipif(uvloop is None, reason="uvloop is not installed")),
    ]
)
def run(request: pytest.FixtureRequest, starter: str) -> Run:
    """Runs a coroutine function on a loop of one of our classes."""
    loop_class = getattr(aiopidfd, request.param)
    if starter == "anyio.run":
        return partial(anyio.run, backend_options={"loop_factory": loop_class})
    return lambda main: aiopidfd.run(main(), loop_factory=loop_class)


def test_run_process_gives_output_and_returncode(run: Run) -> None:
    async def main() -> None:
        done = await anyio.run_process("cat; echo error >&2", input=b"input")
        assert (done.stdout, done.stderr, done.returncode) == (b"input", b"error\n", 0)
        done = await anyio.run_process(["/bin/sh", "-c", "pwd; umask"], cwd="/usr", umask=0o027)
        assert done.stdout == b"/usr\n0027\n"
        with pytest.raises(subprocess.CalledProcessError) as caught:
            await anyio.run_process("exit 3")
        assert caught.value.returncode == 3
        assert (await anyio.run_process("kill -TERM $$", check=False)).returncode == -signal.SIGTERM

    run(main)


def test_run_process_moves_a_megabyte(run: Run) -> None:
    async def main() -> None:
        data = bytes(range(256)) * 4096
        assert (await anyio.run_process(["/bin/cat"], input=data)).stdout == data

    run(main)


def test_many_processes_run_in_a_task_group(run: Run) -> None:
    outputs: list[bytes] = []

    async def echo(number: int) -> None:
        outputs.append((await anyio.run_process(["/bin/echo", str(number)])).stdout)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for number in range(30):
                group.start_soon(echo, number)

    run(main)
    assert sorted(outputs) == sorted(b"%d\n" % number for number in range(30))


def test_open_process_is_a_conversation(run: Run) -> None:
    async def main() -> None:
        async with await anyio.open_process(["/bin/cat"]) as process:
            assert isinstance(process._process._transport, SubprocessTransport)
            await process.stdin.send(b"hello")
            assert await process.stdout.receive() == b"hello"
            assert process.returncode is None
            await process.stdin.aclose()
            assert await process.wait() == 0
            with pytest.raises(anyio.EndOfStream):
                await process.stdout.receive()
        assert process.returncode == 0
        async with await anyio.open_process(["/bin/cat"]) as process:
            process.send_signal(signal.SIGUSR1)
            assert await process.wait() == -signal.SIGUSR1

    run(main)


async def send_for_ever(stream: Any) -> None:
    while True:
        await stream.send(bytes(100_000))


def test_process_that_closes_its_stdin_breaks_the_stream(run: Run) -> None:
    async def main() -> None:
        async with await anyio.open_process(["/bin/sh", "-c", "exec <&-; echo closed; read x"], stderr=None) as process:
            assert await process.stdout.receive() == b"closed\n"
            with pytest.raises(anyio.BrokenResourceError):
                await send_for_ever(process.stdin)
            assert await process.wait() == 1

    run(main)


def test_cancelled_process_is_killed_and_reaped(run: Run) -> None:
    async def main() -> Any:
        with anyio.CancelScope() as scope:
            async with await anyio.open_process(["/bin/sh", "-c", "exec sleep 1000"]) as process:
                scope.cancel()
                await process.wait()
        assert scope.cancelled_caught
        return process.returncode

    assert run(main) == -signal.SIGKILL


def test_cancelled_run_process_leaves_no_process(run: Run) -> None:
    """The fixture that looks for children that are left is the test."""

    async def main() -> None:
        with anyio.move_on_after(0.05) as scope:
            await anyio.run_process(["/bin/sleep", "60"])
        assert scope.cancelled_caught

    run(main)


def test_process_pool_of_anyio_works_and_ends_with_the_loop(run: Run) -> None:
    async def main() -> None:
        assert await to_process.run_sync(operator.add, 1, 2) == 3

    run(main)
