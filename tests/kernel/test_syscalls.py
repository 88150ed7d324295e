"""The system calls that one child costs when no other code reaps it, counted by strace."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ..conftest import BACKENDS, LOOPS
from ..helpers.children import undebugged_environment

CHILDREN = 200
BATCH = 64

# One call closes consecutive pidfds. Linux before 5.9 does not have it.
CLOSES_RANGES = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (5, 9)

# Calls for memory and for the interpreter's own locks do not depend on the number of children. asyncio before Python 3.12
# calls getpid each time the running loop is requested.
NOT_COUNTED = {"getpid", "brk", "futex", "madvise", "mmap", "mprotect", "mremap", "munmap"}

# A program that watches CHILDREN children that exit at the same time. It marks the start and the end of the counting by
# calls for files that do not exist. The children are not traced: a tracer would change how they end.
_PROGRAM = """
import asyncio, gc, os, signal, sys
from aiopidfd import PidfdWatcher, wait
from aiopidfd._watch.registries import registry_of
loop_kind, path, count = sys.argv[1], sys.argv[2], int(sys.argv[3])

def mark(what):
    os.path.exists(f"/mark/{what}")

def spawn(read):
    actions = [(os.POSIX_SPAWN_DUP2, read, 0)]
    return os.posix_spawn("/bin/sh", ["sh", "-c", "read x"], {}, file_actions=actions)

async def main():
    loop = asyncio.get_running_loop()
    read, write = os.pipe()
    pids = [spawn(read) for _ in range(count)]
    os.close(read)
    await wait(os.posix_spawn("/bin/true", ["true"], {}))  # so that all is done that a loop does once
    all_told, left = loop.create_future(), count
    def note(*args):
        nonlocal left
        left -= 1
        if not left:
            all_told.set_result(None)
    watcher, registry = PidfdWatcher(), registry_of(loop)
    gc.disable()
    mark("begin")
    for pid in pids:
        if path == "add_child_handler":
            watcher.add_child_handler(pid, note)
        else:
            registry.observe(pid, note, note, check=False)
    mark("end")
    for pid in pids:  # one by one, so that they are reaped in the order of their pidfds
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    os.close(write)
    mark("begin")
    await all_told
    mark("end")

if loop_kind == "uvloop":
    import uvloop
    loop = uvloop.new_event_loop()
else:
    loop = asyncio.SelectorEventLoop()
loop.run_until_complete(main())
loop.close()
"""

_AFORK = """
import asyncio, os, sys
from aiopidfd import afork
loop_kind, path, count = sys.argv[1], sys.argv[2], int(sys.argv[3])

async def main():
    await (await afork(lambda: None)).wait()
    os.path.exists("/mark/begin")
    for _ in range(count):
        await (await afork(lambda: None)).wait()
    os.path.exists("/mark/end")

if loop_kind == "uvloop":
    import uvloop
    loop = uvloop.new_event_loop()
else:
    loop = asyncio.SelectorEventLoop()
loop.run_until_complete(main())
loop.close()
"""

pytestmark = pytest.mark.skipif("pidfd" not in BACKENDS, reason="pidfds are forbidden here")


@pytest.fixture(scope="module")
def strace() -> str:
    """The path of strace. Skip if there is none, or if it may not trace."""
    path = shutil.which("strace")
    if path is None:
        pytest.skip("strace is not installed")
    tried = subprocess.run([path, "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"strace cannot trace here: {tried.stderr.strip()}")
    return path


def count_calls(strace: str, program: str, folder: Path, *arguments: str) -> Counter[str]:
    """Run the program. Count the system calls of its process between the marks, by name."""
    log = folder / "trace"
    command = [strace, "-o", str(log), sys.executable, "-W", "ignore", "-c", program, *arguments]
    subprocess.run(command, check=True, timeout=300, env=undebugged_environment())
    calls: Counter[str] = Counter()
    counting = False
    for line in log.read_text(errors="replace").splitlines():
        if '"/mark/' in line:
            counting = "/mark/begin" in line
        elif counting and (call := re.match(r"\w+(?=\()", line)) is not None:
            calls[call[0]] += 1
    return Counter({name: number for name, number in calls.items() if name not in NOT_COUNTED})


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize(("path", "waits"), [("add_child_handler", 2), ("forked by us", 1)])
def test_each_child_costs_three_calls_and_one_more_for_a_bare_pid(
    kind: str, path: str, waits: int, strace: str, tmp_path: Path
) -> None:
    """The extra call checks that the pid is a child of this process."""
    calls = count_calls(strace, _PROGRAM, tmp_path, kind, path, str(CHILDREN))
    closes = calls.pop("close_range", 0) + calls.pop("close", 0)
    polls = sum(calls.pop(name, 0) for name in ("epoll_wait", "epoll_pwait", "epoll_pwait2"))
    assert calls == {
        "pidfd_open": CHILDREN,
        "epoll_ctl": CHILDREN,
        "waitid": waits * CHILDREN,
    }
    # For each batch one by the reaper and one or two by the loop. The loop runs before and after the batches, too.
    batches = -(-CHILDREN // BATCH)
    assert batches <= polls <= 3 * batches + 4
    if CLOSES_RANGES:  # one for each batch, and one for each gap between consecutive numbers
        assert batches <= closes <= batches + 4
    else:
        assert closes == CHILDREN


@pytest.mark.parametrize("kind", LOOPS)
def test_afork_opens_and_waits_once_for_each_child(kind: str, strace: str, tmp_path: Path) -> None:
    calls = count_calls(strace, _AFORK, tmp_path, kind, "afork", "20")
    assert calls["pidfd_open"] == calls["waitid"] == 20
    assert calls["kill"] == calls["pidfd_send_signal"] == 0
