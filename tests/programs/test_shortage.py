"""Out of descriptors: programs without pipes are started and watched. Programs with pipes fail cleanly."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from aiopidfd._programs import lifecycle, transport

from .. import conftest
from ..conftest import LoopFactory, children, open_descriptors, run_on
from ..helpers.children import few_descriptors
from ..helpers.seccomp import NESTED, installing, python_under_filter
from ..helpers.subprocesses import (
    PIPE,
    plug,  # noqa: F401 - pytest looks for it in this module
    pytest_generate_tests,  # noqa: F401 - pytest looks for it in this module
)

# Each test runs on loops of our classes, and on other loops with a watcher: see `plug`.
pytestmark = [pytest.mark.usefixtures("plug")]

# Without clone(CLONE_PIDFD), Popen starts the programs. It needs two descriptors.
BACKENDS = [name for name in conftest.BACKENDS if name == "pidfd"]

not_nested = pytest.mark.skipif(NESTED in os.environ, reason="a filter is over the suite already")


async def start(*command: str, **keywords: Any) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(*command, **keywords)


async def test_hundred_programs_run_though_there_is_room_for_twenty(caplog: pytest.LogCaptureFixture) -> None:
    with few_descriptors(20):
        programs = [await start("/bin/sleep", "1000") for _ in range(100)]
    programs[0].terminate()
    assert await programs[0].wait() == -signal.SIGTERM
    for number, program in enumerate(programs[1:], 1):
        program.send_signal(signal.SIGKILL if number % 2 else signal.SIGTERM)
    codes = [await program.wait() for program in programs[1:]]
    assert codes == [-signal.SIGKILL if number % 2 else -signal.SIGTERM for number in range(1, 100)]
    assert len(caplog.messages) == 1
    assert "watching children by SIGCHLD: cannot watch pid " in caplog.messages[0]


@pytest.mark.parametrize("free", range(4))
async def test_program_without_pipes_is_started_though_no_descriptor_is_left(free: int) -> None:
    await (await start("/bin/true")).wait()
    with few_descriptors(free):
        process = await start("/bin/sh", "-c", "exit 7")
        assert await process.wait() == 7
        with pytest.raises(FileNotFoundError):
            await start("/no/such/program")
    assert children() == set()


async def test_one_descriptor_is_enough_for_streams_to_null() -> None:
    await (await start("/bin/true")).wait()
    null = subprocess.DEVNULL
    with few_descriptors(1):
        process = await start("/bin/sh", "-c", "echo out; echo err >&2; cat", stdin=null, stdout=null, stderr=null)
        assert await process.wait() == 0


@pytest.mark.parametrize("free", range(6))
async def test_pipes_for_which_there_is_no_room_start_nothing_and_leave_nothing(free: int) -> None:
    await (await start("/bin/true")).wait()
    before = open_descriptors()
    with few_descriptors(free), pytest.raises(OSError, match="Too many open files") as caught:
        await start("/bin/cat", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    assert caught.value.errno == errno.EMFILE
    assert open_descriptors() == before
    assert children() == set()


@pytest.mark.parametrize("streams", [{"stdout": subprocess.DEVNULL}, {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE}])
async def test_running_programs_give_descriptors_to_one_that_has_streams(streams: dict[str, Any]) -> None:
    with few_descriptors(20):
        programs = [await start("/bin/sleep", "1000") for _ in range(30)]
        program = await start("/bin/sh", "-c", "cat; exit 7", **{"stdin": subprocess.DEVNULL, **streams})
        await asyncio.wait_for(program.communicate(b"" if "stdin" in streams else None), 20)
        assert program.returncode == 7
        for number, one in enumerate(programs):
            one.send_signal(signal.SIGKILL if number % 2 else signal.SIGTERM)
        codes = await asyncio.wait_for(asyncio.gather(*[one.wait() for one in programs]), 20)
    assert codes == [-signal.SIGKILL if number % 2 else -signal.SIGTERM for number in range(30)]


async def test_program_that_has_ended_unnoticed_gives_its_descriptor_and_keeps_its_status() -> None:
    read, write = os.pipe()
    with few_descriptors(20):
        programs = [await start("/bin/sh", "-c", "read line; exit 5", stdin=read) for _ in range(30)]
        os.close(read)
        os.close(write)
        for program in programs:
            os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)  # the loop does not run during this call
        last = await start("/bin/cat", stdin=PIPE, stdout=PIPE)
        await asyncio.wait_for(last.communicate(b""), 20)
        assert [await program.wait() for program in (*programs, last)] == [5] * 30 + [0]


async def test_many_programs_at_once_without_a_descriptor_keep_their_returncodes_apart() -> None:
    await (await start("/bin/true")).wait()
    with few_descriptors(0):
        programs = await asyncio.gather(*[start("/bin/sh", "-c", f"exit {number}") for number in range(50)])
        assert [await program.wait() for program in programs] == list(range(50))


async def test_returncode_that_others_take_without_a_descriptor_is_255(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    observe = lifecycle.watch_program

    def reap_first(registry: Any, program: Any, observer: Any) -> Any:
        os.waitpid(program.pid, 0)
        return observe(registry, program, observer)

    await (await start("/bin/true")).wait()
    monkeypatch.setattr(transport, "watch_program", reap_first)
    with few_descriptors(0):
        process = await start("/bin/true")
        assert await process.wait() == 255
    assert any("exit status is lost" in message for message in caplog.messages)


def test_loop_in_another_thread_starts_programs_without_a_descriptor(loop_factory: LoopFactory) -> None:
    codes: list[int] = []

    async def main() -> None:
        await (await start("/bin/true")).wait()
        with few_descriptors(0):
            programs = [await start("/bin/sh", "-c", f"exit {number}") for number in range(10)]
            codes.extend([await program.wait() for program in programs])

    thread = threading.Thread(target=run_on, args=(loop_factory, main()))
    thread.start()
    thread.join()
    assert codes == list(range(10))


async def test_first_program_of_a_loop_needs_what_popen_needs() -> None:
    """And two descriptors more, which the registry keeps."""
    with few_descriptors(2):
        assert await (await start("/bin/sh", "-c", "exit 3")).wait() == 3


REFUSED = """
import asyncio, aiopidfd
async def main():
    programs = [await asyncio.create_subprocess_exec("/bin/sh", "-c", f"exit {number}") for number in range(20)]
    print([await program.wait() for program in programs] == list(range(20)))
    try:
        await asyncio.create_subprocess_exec("/no/such/program")
    except FileNotFoundError:
        print("not found")
aiopidfd.run(main(), loop_factory=aiopidfd.SelectorEventLoop)
"""


@not_nested
@pytest.mark.parametrize("code", ["EMFILE", "ENFILE"])
def test_pidfd_that_the_kernel_refuses_starts_the_program_without(code: str) -> None:
    assert python_under_filter(f"clone3,clone_pidfd={code}", REFUSED) == "True\nnot found\n"


REAPER_REFUSES = """
import asyncio, aiopidfd, os, signal
async def main():
    await (await asyncio.create_subprocess_exec("/bin/true")).wait()
    {install}
    before = os.listdir("/proc/self/fd")
    try:
        await asyncio.create_subprocess_exec("/bin/sleep", "1000")
    except OSError as exc:
        print(exc.errno)
    print(os.listdir("/proc/self/fd") == before)
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        print("no child")
os.kill = None  # not used
aiopidfd.run(main(), loop_factory=aiopidfd.SelectorEventLoop)
"""


@not_nested
def test_program_whose_pidfd_the_epoll_refuses_is_ended_by_it() -> None:
    """ENOSPC: see /proc/sys/fs/epoll/max_user_watches. Nothing else can be watched then, not even by SIGCHLD."""
    program = REAPER_REFUSES.format(install=installing("epoll_add=ENOSPC"))
    result = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.returncode) == (f"{errno.ENOSPC}\nTrue\nno child\n", 0), result.stderr
