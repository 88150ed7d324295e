"""ForkServer: one that is dropped unclosed leaves nothing behind, whatever has become of its loop."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aiopidfd._backends.backend import probe_pidfd

from ..helpers.children import undebugged_environment

pytestmark = pytest.mark.skipif(probe_pidfd() is not None, reason="pidfds are forbidden here, and so is a fork server")

PREPARE = """
import asyncio, gc, os, signal, sys, threading, time, warnings
import aiopidfd

kind, method, workers = sys.argv[1:4]
PLAIN = asyncio.SelectorEventLoop
if kind == "uvloop":
    import uvloop
    PLAIN = uvloop.new_event_loop
LEASH = os.pipe()

def wait_for_leash():
    os.close(LEASH[1])
    os.read(LEASH[0], 1)

def descriptors():
    return len(os.listdir("/proc/self/fd"))

def has_children():
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT | 0x40000000)  # __WALL
    except ChildProcessError:
        return False
    return True

def count_readers(loop):
    return 0 if kind == "uvloop" else len(loop._selector.get_map())  # uvloop's cannot be seen

async def start(keep):
    server = aiopidfd.ForkServer(start_method=method)
    await server.__aenter__()
    for _ in range(3 if workers == "workers" else 0):
        worker = await server.afork(wait_for_leash, pass_fds=LEASH)
        worker.detach()
    if workers != "at once":  # the idle worker exists
        await server._link.prefork().outcome
    keep.append(server)

def end_workers():
    '''Those who are no children of a loop any more send no SIGCHLD if their server had no exit signal.'''
    global LEASH
    for fd in LEASH:
        os.close(fd)
    try:
        while workers == "workers":
            os.waitid(os.P_ALL, 0, os.WEXITED | 0x40000000)
    except ChildProcessError:
        pass

log = []
warnings.showwarning = lambda message, *_: log.append(str(message))  # not what it is about, which must go
warnings.simplefilter("always")
loop = PLAIN()
loop.run_until_complete(asyncio.sleep(0))
loop.run_until_complete(loop.run_until_complete(aiopidfd.afork(int)).wait())
loop.run_until_complete(asyncio.sleep(0.01))
kept = []

async def look():
    return descriptors(), count_readers(loop)  # a loop that runs has more

def report(*more):
    '''Say what is left, once nothing more goes away.'''
    ours = [text for text in log if "ForkServer" in text]
    others = [text for text in log if "ForkServer" not in text and "unclosed event loop" not in text]
    print(len(ours), "warning;", *others, *more)
    sys.stdout.flush()
"""

GOES_ON = """
before = loop.run_until_complete(look())
loop.run_until_complete(start(kept))

async def drop():
    if sys.argv[4] == "thread":
        thread = threading.Thread(target=kept.clear)
        thread.start()
        thread.join()
    else:
        kept.clear()
    gc.collect()
    assert log, "it is held by somebody"
    os.close(LEASH[0]), os.close(LEASH[1])
    deadline = time.monotonic() + 20
    while (has_children() or (descriptors() + 2, count_readers(loop)) != before) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    report(has_children(), descriptors() + 2 - before[0], count_readers(loop) - before[1])

if sys.argv[4] == "between":
    kept.clear()
loop.run_until_complete(drop())
loop.close()
"""

CLOSED = """
before = descriptors()
aiopidfd.run(start(kept), loop_factory=PLAIN)
if workers != "workers":
    assert not has_children(), "as soon as the loop is closed"
kept.clear()
end_workers()
report(has_children(), descriptors() + 2 - before)
loop.close()
"""

DROPPED = """
def run():
    loop = PLAIN()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(loop.run_until_complete(aiopidfd.afork(int)).wait())
    before = descriptors()
    loop.run_until_complete(start(kept))
    asyncio.set_event_loop(None)
    return before

before = run()
if sys.argv[4] == "together":
    # Nothing but cycles holds the server, either.
    kept.append(kept)
    del kept
else:
    kept.clear()
gc.collect()
end_workers()
report(has_children(), max(0, descriptors() + 2 - before))  # uvloop keeps a loop that has run in the main thread
loop.close()
"""


def run_program(program: str, *args: str) -> str:
    """Run a program of Python's, and return what it prints."""
    command = [sys.executable, "-c", PREPARE + program, *args]
    ran = subprocess.run(command, capture_output=True, timeout=60, check=False, text=True, env=undebugged_environment())
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


KINDS = ["asyncio", "uvloop"]
METHODS = ["fork", "spawn"]
WORKERS = ["at once", "workers"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The loop."""
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    return str(request.param)


@pytest.mark.parametrize("where", ["here", "thread", "between"])
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("method", METHODS)
def test_loop_goes_on(kind: str, method: str, workers: str, where: str) -> None:
    assert run_program(GOES_ON, kind, method, workers, where) == "1 warning; False 0 0\n"


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("method", METHODS)
def test_loop_was_closed(kind: str, method: str, workers: str) -> None:
    assert run_program(CLOSED, kind, method, workers) == "1 warning; False 0\n"


@pytest.mark.parametrize("order", ["server first", "together"])
@pytest.mark.parametrize("workers", WORKERS)
def test_loop_is_dropped_too(kind: str, workers: str, order: str) -> None:
    if kind == "uvloop" and workers == "workers":
        pytest.skip("uvloop keeps a loop that has run in the main thread and was not closed, and so the workers' pidfds")
    assert run_program(DROPPED, kind, "fork", workers, order) == "1 warning; False 0\n"
