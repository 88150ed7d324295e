"""Ten thousand live children on one loop: all are reported, within the descriptor limit and with little memory."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import resource
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiopidfd import PidfdWatcher

from ..conftest import LoopFactory, open_descriptors, run_on
from ..helpers.seccomp import compile_c

COUNT = 10_000
SPARE = 300  # descriptors and pids for other use

# The memory that the watcher may keep for each: a dict entry, a Child, and the callback with its arguments.
TRACED_LIMIT = 400
RESIDENT_LIMIT = 800  # the allocators round up


def read_number(path: str) -> int | None:
    """The number in a file of the kernel. None if there is no such file, or no limit."""
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return None


@pytest.fixture
def room_for_them(backend: str) -> Iterator[None]:
    """Skip the test if the limits are too low. Raise the soft limit of descriptors to the hard one."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if backend == "pidfd" and limits[1] < COUNT + SPARE:
        pytest.skip(f"RLIMIT_NOFILE allows {limits[1]} descriptors, and it takes {COUNT + SPARE}")
    for what in ("pid_max", "threads-max"):
        most = read_number(f"/proc/sys/kernel/{what}")
        if most is not None and most < COUNT + 10 * SPARE:
            pytest.skip(f"{what} is {most}, and it takes {COUNT + 10 * SPARE}")
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        available_kib = next(int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable"))
    if available_kib < 2 << 20:
        pytest.skip(f"{available_kib >> 10} MiB of memory are available, and it takes 2048")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def children(room_for_them: None) -> Iterator[tuple[dict[int, int], Callable[[], None]]]:
    """So many children: the exit code by pid, and a function that ends all of them."""
    program = os.fsencode(compile_c("tiny.c", "-O1", "-static", "-nostdlib", "-fno-stack-protector"))
    codes: dict[int, int] = {}
    read, write = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, read)
        release = stack.enter_context(contextlib.closing(os.fdopen(write, "wb", buffering=0))).close
        try:
            for number in range(COUNT):
                code = number % 256
                argument = bytes([code]) if code else b""
                pid = os.posix_spawn(program, [program, argument], {}, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
                codes[pid] = code
        except OSError as exc:
            end_all(codes)
            if exc.errno != errno.EAGAIN:  # RLIMIT_NPROC, or a limit of the container
                raise
            pytest.skip(f"{len(codes)} processes are allowed here, and it takes {COUNT}")
        try:
            yield codes, release
        finally:
            end_all(codes)


def end_all(pids: dict[int, int]) -> None:
    """Kill and reap the children that are left."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def resident() -> int:
    """The memory of this process, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def test_ten_thousand_children_are_all_seen(
    loop_factory: LoopFactory, backend: str, children: tuple[dict[int, int], Callable[[], None]]
) -> None:
    codes, release = children
    seen = dict.fromkeys(codes, -1)
    watcher = PidfdWatcher()

    async def main() -> tuple[int, int, int]:
        done = asyncio.get_running_loop().create_future()
        left = len(codes)

        def reported(pid: int, returncode: int) -> None:
            nonlocal left
            assert seen[pid] == -1, "reported twice"
            seen[pid] = returncode
            left -= 1
            if left == 0:
                done.set_result(None)

        def watch_all() -> None:
            for pid in codes:
                watcher.add_child_handler(pid, reported)

        gc.collect()
        before = resident()
        watch_all()
        resident_bytes = resident() - before
        descriptors = len(open_descriptors())
        # A second time, to count the allocations: counting takes memory itself.
        for pid in codes:
            assert watcher.remove_child_handler(pid)
        gc.collect()
        tracemalloc.start()
        try:
            watch_all()
            traced_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        release()
        await done
        return descriptors, traced_bytes, resident_bytes

    descriptors, traced_bytes, resident_bytes = run_on(loop_factory, main(), timeout_s=200)
    assert seen == codes
    print(
        f"{COUNT} children, {descriptors} descriptors; per child {traced_bytes / COUNT:.0f} bytes allocated by Python, "
        f"{resident_bytes / COUNT:.0f} more resident"  # too low if an earlier test has left free memory in the heap
    )
    assert descriptors < SPARE + (COUNT if backend == "pidfd" else 0)
    assert traced_bytes / COUNT < TRACED_LIMIT
    assert resident_bytes / COUNT < RESIDENT_LIMIT
