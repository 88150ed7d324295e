"""Many loops and threads, subprocesses of the loop itself, and the exit of the interpreter."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import warnings

import pytest

from aiopidfd import PidfdWatcher, afork

from ..conftest import LoopFactory, run_on
from ..helpers.children import Held, held, undebugged_environment
from ..helpers.lost_status import on_loop, quick_checks, watched

__all__ = ["quick_checks"]  # fixtures


def test_many_loops_in_many_threads_watch_and_fork_at_once(loop_factory: LoopFactory, backend: str) -> None:
    results: list[list[int | None]] = []

    async def work() -> None:
        with held(20) as some:
            waiting = [await watched(child.pid) for child in some]
            forked = []
            for number in range(5):
                forked.append(await afork(lambda number=number: 100 + number))  # type: ignore[misc] # mypy cannot infer it
                some[number].end(number)
            for number in range(5, 20):
                some[number].end(number)
            results.append([(await one).returncode for one in waiting] + [await child.wait() for child in forked])

    threads = [threading.Thread(target=run_on, args=(loop_factory, work())) for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12+ warns of fork beside threads; that is the test
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [[*range(20), *range(100, 105)]] * 4


def test_reap_by_others_after_the_loop_was_closed_harms_nobody(loop_factory: LoopFactory) -> None:
    """Our handler, which reaps the child of a closed loop, finds it reaped. The next loop works."""

    async def begin(pid: int) -> None:
        PidfdWatcher().add_child_handler(pid, print)

    async def finish(child: Held) -> int | None:
        waiting = await watched(child.pid)
        child.end(17)
        return (await waiting).returncode

    with held(2) as (one, two):
        run_on(loop_factory, begin(one.pid))
        one.end(0)
        with contextlib.suppress(ChildProcessError):  # our handler may be first
            os.waitpid(one.pid, 0)
        assert run_on(loop_factory, finish(two)) == 17


_EXITS = {
    "loop closed": "loop.run_until_complete(main())\nloop.close()",
    "loop left open": "loop.run_until_complete(main())",
    "SystemExit in the loop": "async def exit():\n    await main()\n    sys.exit(0)\nloop.run_until_complete(exit())",
}


@pytest.mark.parametrize("end", _EXITS.values(), ids=_EXITS.keys())
def test_exit_of_the_interpreter_with_children_alive_is_silent(end: str, loop_factory: LoopFactory, backend: str) -> None:
    """The children outlive it. They exit at the end of file that its exit causes."""
    program = on_loop(
        f"""
import asyncio, os, sys
import aiopidfd
read, write = os.pipe()
kept = []
def sleep():
    os.close(write)
    os.read(read, 1)
async def main():
    for _ in range(3):
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", "read x"], {{}}, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
        aiopidfd.PidfdWatcher().add_child_handler(pid, print)
        kept.append(asyncio.ensure_future(aiopidfd.wait(pid)))
    child = await aiopidfd.afork(sleep)
    child.detach()
    await asyncio.sleep(0)
    for waiting in kept:
        waiting.cancel()
    await asyncio.gather(*kept, return_exceptions=True)
LOOP
{end}
""",
        loop_factory,
    )
    command, environment = [sys.executable, "-c", program], undebugged_environment()
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


async def test_loop_s_own_subprocesses_beside_watched_children() -> None:
    """On uvloop, libuv installs and removes its SIGCHLD handler with each of them."""
    with held(3) as all_of_them:
        for number, child in enumerate(all_of_them):
            waiting = await watched(child.pid)
            process = await asyncio.create_subprocess_exec("/bin/sh", "-c", f"exit {20 + number}")
            child.end(number)
            assert (await waiting).returncode == number
            assert await process.wait() == 20 + number
