"""The pipes of subprocesses: data, flow control, and either end closed at any time."""

from __future__ import annotations

import asyncio
import os

import pytest

from ..helpers.subprocesses import (
    PIPE,
    drain,
    gate,
    plug,  # noqa: F401 - pytest looks for it in this module
    pytest_generate_tests,  # noqa: F401 - pytest looks for it in this module
    reading,
    talk,
)

# Each test runs on loops of our classes, and on other loops with a watcher: see `plug`.
pytestmark = pytest.mark.usefixtures("plug")


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
        await asyncio.wait_for(draining, 10)
        writer.close()
        assert await process.wait() == 0


async def test_communicate_ignores_a_stdin_that_is_closed_early() -> None:
    process = await asyncio.create_subprocess_shell("exec <&-; echo done", stdin=PIPE, stdout=PIPE)
    assert list(await process.communicate(bytes(1_000_000))) == [b"done\n", None]


async def test_communicate_ignores_a_stdin_that_was_closed_long_ago() -> None:
    """uvloop's own transport raises RuntimeError here."""
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


async def test_no_call_on_a_pipe_can_stand_still() -> None:
    """A loop may call the reader of an empty pipe: another process with the same pipe may have read first."""
    process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    pipes = [process._transport.get_pipe_transport(number) for number in range(3)]  # type: ignore[attr-defined]
    assert [os.get_blocking(pipe.get_extra_info("pipe").fileno()) for pipe in pipes] == [False] * 3
    await talk(process, b"")


async def test_what_the_other_direction_can_is_not_implemented_as_on_uvloop() -> None:
    process = await asyncio.create_subprocess_exec("/bin/cat", stdin=PIPE, stdout=PIPE)
    transport = process._transport  # type: ignore[attr-defined] # there is no public way
    writer, reader = transport.get_pipe_transport(0), transport.get_pipe_transport(1)
    for call in (writer.pause_reading, writer.resume_reading, reader.write_eof, reader.get_write_buffer_size):
        with pytest.raises(NotImplementedError):
            call()
    with pytest.raises(NotImplementedError):
        reader.write(b"")
    assert await talk(process, b"in") == (b"in", None)
