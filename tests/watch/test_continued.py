"""A loop that goes on in a forked child of its process: daemons, and forks whose parent goes on, too."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from ..conftest import BACKENDS, LOOPS

_PRELUDE = """
import asyncio, os, signal, socket, subprocess, sys, time, warnings
import aiopidfd
kind, whose, *rest = sys.argv[1:]
if kind == "uvloop":
    import uvloop
    plain = uvloop.new_event_loop
    ours = aiopidfd.UvloopEventLoop
else:
    plain = asyncio.SelectorEventLoop
    ours = aiopidfd.SelectorEventLoop
loop = (ours if whose == "ours" else plain)()
watcher = aiopidfd.PidfdWatcher()
if whose == "plain":
    watcher.attach_loop(loop)
run = loop.run_until_complete

async def program():
    process = await asyncio.create_subprocess_exec("sh", "-c", "exit 3")
    return await process.wait()

async def fork():
    return await (await aiopidfd.afork(lambda: 3)).wait()

def start():
    return os.posix_spawn("/bin/sh", ["sh", "-c", "exit 3"], os.environ)

async def wait():
    return (await aiopidfd.wait(start())).returncode

async def handler():
    future = loop.create_future()
    watcher.add_child_handler(start(), lambda pid, code: future.set_result(code))
    return await future

ways = {f.__name__: f for f in (program, fork, wait, handler)}

def limited(coroutine):
    return asyncio.wait_for(coroutine, 10)

async def all_of_them():
    return await limited(asyncio.gather(*[way() for way in ways.values()]))

def end_with(code):
    sys.stdout.flush()
    os._exit(code)

def in_child(function):
    "Call it in a plain fork, and return whether that ended with exit code 0."
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:
            import traceback
            traceback.print_exc()
            end_with(1)
        end_with(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


def run_program(program: str, kind: str, whose: str, *arguments: str) -> str:
    """Run it; return what it has printed. It must not have complained of anything."""
    # An open loop would be closed at the interpreter's exit, and asyncio's debug mode then looks for modules that are gone.
    command = [sys.executable, "-W", "ignore", "-c", f"{_PRELUDE}{program}\nloop.close()\n", kind, whose, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=40)
    assert ran.stderr == ""
    assert ran.returncode == 0
    return ran.stdout


pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.parametrize("kind", LOOPS),
    pytest.mark.parametrize("whose", ["ours", "plain"]),
]

_DAEMON = """
used_before, forks = rest
if used_before != "nothing":
    assert run(limited(ways[used_before]())) == 3
for _ in range(int(forks)):
    pid = os.fork()
    if pid:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os.setsid()
for _ in range(2):
    for name, way in ways.items():
        assert run(limited(way())) == 3, name
assert run(all_of_them()) == [3] * 4
loop.close()
print("done")
"""


@pytest.mark.parametrize("forks", [1, 2])
@pytest.mark.parametrize("used_before", ["nothing", "program", "fork", "handler"])
def test_everything_works_in_a_daemon(used_before: str, forks: int, kind: str, whose: str, backend: str) -> None:
    assert run_program(_DAEMON, kind, whose, used_before, str(forks)) == "done\n"


_DAEMON_USES_BETWEEN = """
for _ in range(3):
    assert run(all_of_them()) == [3] * 4
    if os.fork():
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
assert run(all_of_them()) == [3] * 4
print("done")
"""


def test_loop_may_be_used_between_the_forks(kind: str, whose: str, backend: str) -> None:
    assert run_program(_DAEMON_USES_BETWEEN, kind, whose) == "done\n"


_OTHERS_READER = """
assert run(all_of_them()) == [3] * 4

def child():
    # Descriptors of others, one of which may have got the number of our reaper.
    pairs = [socket.socketpair() for _ in range(20)]
    async def read_all():
        futures = []
        for one, other in pairs:
            future = loop.create_future()
            loop.add_reader(one, lambda future=future: future.done() or future.set_result(None))
            other.send(b"x")
            futures.append(future)
        await limited(asyncio.gather(*futures))
        for one, _ in pairs:
            loop.remove_reader(one)
    run(read_all())
    assert run(all_of_them()) == [3] * 4

assert in_child(child)
print("done")
"""


def test_descriptors_of_others_are_reported_in_the_child(kind: str, whose: str, backend: str) -> None:
    assert run_program(_OTHERS_READER, kind, whose) == "done\n"


_PARENT_GOES_ON = """
first, second = socket.socketpair()
seen = []
loop.add_reader(first, lambda: seen.append(first.recv(9)))
held = subprocess.Popen(["sh", "-c", "read x; exit 5"], stdin=subprocess.PIPE)
reported = loop.create_future()
async def watch():
    watcher.add_child_handler(held.pid, lambda pid, code: reported.set_result(code))
run(watch())

def child():
    run(all_of_them())
    loop.remove_reader(first)
    run(asyncio.sleep(0))
    assert run(all_of_them()) == [3] * 4

for _ in range(2):
    assert in_child(child)
second.send(b"text")
run(asyncio.sleep(0.01))
assert seen == [b"text"], seen
held.stdin.write(b"\\n"); held.stdin.close()
assert run(limited(reported)) == 5
assert run(all_of_them()) == [3] * 4
start, rounds = time.process_time(), 0
run(asyncio.sleep(0.3))
assert time.process_time() - start < 0.15
print("done")
"""


def test_parent_that_goes_on_is_unharmed(kind: str, whose: str, backend: str) -> None:
    """The child removes a reader of its parent's, in its own copy of the loop; the parent hears of all that it watches."""
    program = "import logging; logging.disable()\n" + _PARENT_GOES_ON
    assert run_program(program, kind, whose) == "done\n"


_NO_SPIN = """
held = subprocess.Popen(["sh", "-c", "read x; exit 5"], stdin=subprocess.PIPE)
reported = loop.create_future()
async def watch():
    watcher.add_child_handler(held.pid, lambda pid, code: reported.set_result(code))
run(watch())
held.stdin.write(b"\\n"); held.stdin.close()
os.waitid(os.P_PID, held.pid, os.WEXITED | os.WNOWAIT)  # the parent's reaper is readable, and nobody reads it

def child():
    run(asyncio.sleep(0))
    start = time.process_time()
    run(asyncio.sleep(0.3))
    spent = time.process_time() - start
    assert spent < 0.15, spent
    start = time.process_time()
    assert run(all_of_them()) == [3] * 4
    run(asyncio.sleep(0.3))
    spent = time.process_time() - start
    assert spent < 0.25, spent

assert in_child(child)
assert run(limited(reported)) == 5  # the child has not taken it away
print("done")
"""


def test_child_does_not_spin_on_what_its_parent_has_to_reap(kind: str, whose: str, backend: str) -> None:
    program = "import logging; logging.disable()\n" + _NO_SPIN
    assert run_program(program, kind, whose) == "done\n"


_OF_THE_PARENT = """
import contextlib, logging
logging.disable()
class Protocol(asyncio.SubprocessProtocol):
    def __init__(self): self.exited = loop.create_future()
    def process_exited(self): self.exited.set_result(None)

async def begin():
    global handle, process, waiting
    handle = await aiopidfd.afork(signal.pause)
    process = await asyncio.create_subprocess_exec("sh", "-c", "read x", stdin=asyncio.subprocess.PIPE)
    waiting = loop.create_task(aiopidfd.wait(os.getppid()))
    await asyncio.sleep(0.01)
run(begin())

def child():
    async def look():
        handle.terminate()
        process.kill()
        assert handle.fileno() == -1
        assert await limited(handle.wait()) == 255
        assert handle.exit_status.source == "lost"
        assert await limited(process.wait()) == 255
        status = await limited(waiting)
        assert (status.returncode, status.source) == (None, "not-child")
        assert await handle.stop() == 255
    run(look())

assert in_child(child)
async def end():
    assert handle.returncode is None and process.returncode is None
    process.stdin.close()
    assert await limited(process.wait()) == 1
    assert await handle.stop() == -signal.SIGTERM
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
run(end())
print("done")
"""


def test_children_of_the_parent_are_neither_signalled_nor_waited_for(kind: str, whose: str, backend: str) -> None:
    """Nothing hangs in the child: their ends are reported as lost at once."""
    assert run_program(_OF_THE_PARENT, kind, whose) == "done\n"


_HALF_MADE = """
import logging
logging.disable()
async def main():
    child = loop.create_task(aiopidfd.afork(signal.pause, ready="manual"))
    await asyncio.sleep(0.05)
    return child
task = run(main())

def child():
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    async def look():
        try:
            await limited(task)
        except aiopidfd.ChildStartError as exc:
            assert exc.exit_status.source == "lost"
            return True
    assert run(look())
    for fd in opened:
        os.fstat(fd)  # nobody has closed it for a gate of the same number

assert in_child(child)
task.cancel()
try:
    run(task)
except asyncio.CancelledError:
    loop.close()
    print("done")
"""


def test_half_made_child_of_the_parent_is_given_up(kind: str, whose: str, backend: str) -> None:
    assert run_program(_HALF_MADE, kind, whose) == "done\n"


_CLOSED = """
assert run(program()) == 3
def descriptors():
    names = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [os.readlink(name) for name in names if os.path.lexists(name)]
def child():
    loop.close()
    assert not [name for name in descriptors() if "eventpoll" in name]
    other = plain()
    asyncio.set_event_loop(other)
    assert other.run_until_complete(limited(fork())) == 3
assert in_child(child)
assert run(program()) == 3
loop.close()
print("done")
"""


def test_child_may_close_the_loop_and_make_its_own(kind: str, whose: str, backend: str) -> None:
    assert run_program(_CLOSED, kind, whose) == "done\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may hide /proc")
def test_daemon_works_without_proc(kind: str, whose: str, backend: str) -> None:
    hide: Any = (
        "import ctypes; libc = ctypes.CDLL(None)\n"
        "if libc.unshare(0x20000) or libc.mount(b'none', b'/', None, 0x44000, None):\n"
        "    print('cannot'); end_with(0)\n"
        "if libc.mount(b'none', b'/proc', b'tmpfs', 0, None):\n"
        "    print('cannot'); end_with(0)\n"
    )
    out = run_program(hide + _DAEMON, kind, whose, "program", "1")
    if out == "cannot\n":
        pytest.skip("no mount namespace can be made here")
    assert out == "done\n"
