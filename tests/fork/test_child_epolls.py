"""Epoll descriptors in a forked child: its parent's are detached, those that a fork hook has made in the child work."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from aiopidfd import ForkServer, afork
from aiopidfd._ext import lib

from ..conftest import LOOPS, open_descriptors
from ..helpers.seccomp import compile_c
from .test_child import ask, beside_uring_worker

# A hook cannot be taken back: there is one of each kind, and it does nothing but for a test that wants it to.
_hooks: dict[str, Callable[[], object]] = {}
for _when in ("before", "after_in_parent", "after_in_child"):
    os.register_at_fork(**{_when: lambda when=_when: _hooks.get(when, int)()})


@pytest.fixture
def hooks() -> Any:
    yield _hooks
    _hooks.clear()


def works(epoll: select.epoll) -> bool:
    """Whether it tells of a pipe that can be read."""
    read, write = os.pipe()
    try:
        epoll.register(read, select.EPOLLIN)
        os.write(write, b"x")
        return epoll.poll(5) == [(read, select.EPOLLIN)]
    finally:
        os.close(read)
        os.close(write)


async def test_epoll_that_a_fork_hook_makes_works(hooks: dict[str, Callable[[], object]]) -> None:
    made: list[select.epoll] = []
    hooks["after_in_child"] = lambda: made.append(select.epoll())
    assert await ask(lambda: works(made[0]))


async def test_epoll_that_a_fork_hook_makes_works_at_the_number_of_an_inherited_one(
    hooks: dict[str, Callable[[], object]],
) -> None:
    with contextlib.closing(select.epoll()) as epoll:
        number, made = epoll.fileno(), [epoll]

        def renew() -> None:
            made.pop().close()
            made.append(select.epoll())

        hooks["after_in_child"] = renew
        assert await ask(lambda: [made[0].fileno(), works(made[0])]) == [number, True]
        assert works(epoll)


async def test_file_that_a_fork_hook_opens_for_appending_stays(
    hooks: dict[str, Callable[[], object]], tmp_path: Any
) -> None:
    """The mark of an epoll descriptor is a flag that such files have, too."""
    with contextlib.closing(select.epoll()) as epoll:
        number = epoll.fileno()

        def renew() -> None:
            epoll.close()
            assert os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND) == number

        hooks["after_in_child"] = renew
        assert await ask(lambda: os.write(number, b"text")) == 4
    assert (tmp_path / "log").read_text() == "text"


async def test_epoll_that_a_hook_has_made_in_the_parent_is_detached(hooks: dict[str, Callable[[], object]]) -> None:
    """Also if it was made after all else: right before the fork."""
    made: list[select.epoll] = []
    hooks["before"] = lambda: made.append(select.epoll())
    try:
        assert await ask(lambda: os.readlink(f"/proc/self/fd/{made[-1].fileno()}")) == "/dev/null"
    finally:
        hooks.clear()
        assert works(made[-1])
        for epoll in made:
            epoll.close()


async def test_epolls_of_the_parent_work_on(hooks: dict[str, Callable[[], object]]) -> None:
    read, write = os.pipe()
    with contextlib.closing(select.epoll()) as epoll:
        epoll.register(read, select.EPOLLIN)
        for _ in range(2):

            def touch() -> None:
                with contextlib.suppress(OSError):
                    epoll.unregister(read)

            assert await (await afork(touch)).wait() == 0
        os.write(write, b"x")
        assert epoll.poll(5) == [(read, select.EPOLLIN)]
    os.close(read)
    os.close(write)


async def test_child_of_a_child_detaches_those_of_both() -> None:
    def child() -> int:
        import asyncio

        own = select.epoll()

        async def main() -> int:
            names = await ask(lambda: sorted(open_descriptors().values()))
            return int(any("eventpoll" in name for name in names) or not works(own))

        return asyncio.run(main())

    with contextlib.closing(select.epoll()):
        assert await (await afork(child)).wait() == 0


@beside_uring_worker
async def test_plain_fork_finds_the_epolls_as_they_were() -> None:
    with contextlib.closing(select.epoll()) as epoll:
        await (await afork(int)).wait()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = not works(epoll)
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


async def test_without_hooks_of_ours_all_are_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork that calls no hooks of C: as all that there is may be the parent's, all of it is detached."""
    real_fork = os.fork

    def fork() -> int:
        lib.ap_expect_fork(-1)
        return real_fork()

    monkeypatch.setattr(os, "fork", fork)
    with contextlib.closing(select.epoll()) as epoll:
        assert await ask(lambda: os.readlink(f"/proc/self/fd/{epoll.fileno()}")) == "/dev/null"


_RENEWER = """
import asyncio, ctypes, sys, select, os
def load():
    global number
    number = ctypes.CDLL(sys.argv[1]).renew_epoll()
if sys.argv[2] == "before":
    load()
import aiopidfd
if sys.argv[2] == "after":
    load()
factory = aiopidfd.UvloopEventLoop if sys.argv[3] == "uvloop" else aiopidfd.SelectorEventLoop
def child():
    epoll = select.epoll.fromfd(number)
    read, write = os.pipe()
    epoll.register(read, select.EPOLLIN)
    os.write(write, b"x")
    return 7 if epoll.poll(5) == [(read, select.EPOLLIN)] else 8
async def main():
    return await (await aiopidfd.afork(child)).wait()
print(aiopidfd.run(main(), loop_factory=factory))
"""


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("loaded", ["before", "after"])
def test_epoll_that_a_hook_of_a_c_library_makes_works(loaded: str, kind: str) -> None:
    """Of pthread_atfork, registered before ours or after it."""
    library = compile_c("library.c", "-O1", "-shared", "-fPIC", "-pthread")
    command = [sys.executable, "-c", _RENEWER, str(library), loaded, kind]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ran.stdout, ran.stderr) == ("7\n", "")


_made_in_worker: list[select.epoll] = []


def renew_in_worker() -> None:
    _made_in_worker[:] = [select.epoll()]


def use_renewed() -> int:
    return 7 if works(_made_in_worker[0]) else 8


@pytest.mark.usefixtures("one_thread")
async def test_epoll_that_a_fork_hook_makes_works_in_a_worker(hooks: dict[str, Callable[[], object]], pidfds: None) -> None:
    hooks["after_in_child"] = renew_in_worker
    async with ForkServer() as server, await server.afork(use_renewed) as worker:
        assert await worker.wait() == 7
    for epoll in _made_in_worker:
        epoll.close()


_GRPC = """
import os, sys, threading
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "1"
import grpc, aiopidfd
from concurrent import futures
loop_kind, first = sys.argv[1:]
echo = grpc.method_handlers_generic_handler(
    "Echo", {"Echo": grpc.unary_unary_rpc_method_handler(lambda request, context: request + b"!")}
)

def call(channel, data):
    return channel.unary_unary("/Echo/Echo")(data, timeout=20)

def serve_and_call():
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers([echo])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = call(channel, b"child")
    server.stop(None).wait()
    return 7 if answer == b"child!" else 8

async def main():
    return await (await aiopidfd.afork(serve_and_call)).wait()

if first == "used":
    # A channel that is in use, as of a server that asks another one, and then forks workers.
    import subprocess
    other = subprocess.Popen([sys.executable, "-c", '''
import grpc, sys
from concurrent import futures
server = grpc.server(futures.ThreadPoolExecutor(1))
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(
    "Echo", {"Echo": grpc.unary_unary_rpc_method_handler(lambda request, context: request + b"!")})])
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
sys.stdin.read()
'''], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    channel = grpc.insecure_channel(f"127.0.0.1:{int(other.stdout.readline())}")
    assert call(channel, b"parent") == b"parent!"
factory = aiopidfd.UvloopEventLoop if loop_kind == "uvloop" else aiopidfd.SelectorEventLoop
print(aiopidfd.run(main(), loop_factory=factory))
if first == "used":
    assert call(channel, b"parent") == b"parent!"
    channel.close()
    other.communicate()
"""


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("first", ["unused", "used"])
def test_grpc_works_in_an_aforked_child(first: str, kind: str) -> None:
    """Its client and its server, with its fork support on: its hooks renew what it polls with."""
    pytest.importorskip("grpc", reason="grpcio is not installed")
    command = [sys.executable, "-W", "ignore", "-c", _GRPC, kind, first]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ran.stdout == "7\n", ran.stderr


_PRELOADED = """
import os, select
epoll = select.epoll()
def is_detached():
    try:
        epoll.register(os.pipe()[0])
    except OSError as exc:
        return 7 if exc.errno == 22 else 8
    return 9
"""


@pytest.mark.usefixtures("one_thread")
async def test_epoll_of_a_preloaded_module_is_detached(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, pidfds: None) -> None:
    """Else the workers would share it with one another."""
    (tmp_path / "aiopidfd_test_preloaded.py").write_text(_PRELOADED)
    monkeypatch.syspath_prepend(tmp_path)
    look = "__import__('aiopidfd_test_preloaded').is_detached()"
    async with ForkServer(preload=["aiopidfd_test_preloaded"]) as server, await server.afork(eval, look) as worker:
        assert await worker.wait() == 7
