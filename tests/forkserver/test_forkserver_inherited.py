"""ForkServer: what the server inherits and does not need, it closes: others wait for the end of it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from aiopidfd import ForkServer
from aiopidfd._backends.backend import probe_pidfd
from aiopidfd._kernel import inherited

from ..helpers.children import undebugged_environment
from ..helpers.workers import exit_with

pytestmark = pytest.mark.usefixtures("one_thread")

needs_pidfds = pytest.mark.skipif(probe_pidfd() is not None, reason="pidfds are forbidden here, and so is a fork server")

METHODS = ["fork", "spawn"]


@contextlib.contextmanager
def a_thread() -> Iterator[None]:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.fixture(params=[*METHODS, "os.fork"])
def made_by(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """How to make a server, in all three ways."""
    if request.param != "os.fork":
        yield {"start_method": request.param}
    elif sys.version_info >= (3, 12):
        with a_thread(), pytest.warns(DeprecationWarning, match="multi-threaded"):
            yield {}
    else:
        with a_thread():
            yield {}


async def test_program_started_before_the_server_sees_the_end_of_its_input(pidfds: None, made_by: Any) -> None:
    cat = await asyncio.create_subprocess_exec("cat", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    async with ForkServer(**made_by) as server:
        assert cat.stdin is not None
        cat.stdin.close()
        assert await asyncio.wait_for(cat.wait(), 10) == 0
        assert await (await server.afork(exit_with, 3)).wait() == 3


def make_pipe() -> tuple[int, int]:
    return os.pipe()


def make_reader() -> tuple[int, int]:
    """Whoever writes to a pipe sees its end by an error of poll."""
    read, write = os.pipe()
    return write, read


def make_connection() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def make_terminal() -> tuple[int, int]:
    return pty.openpty()


def make_other_terminal() -> tuple[int, int]:
    master, slave = pty.openpty()
    return slave, master


@pytest.mark.parametrize(
    "make", [make_pipe, make_reader, make_connection, make_terminal, make_other_terminal], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("inheritable", [False, True])
async def test_other_end_is_closed_when_this_process_closes_it(
    pidfds: None, made_by: Any, make: Callable[[], tuple[int, int]], inheritable: bool
) -> None:
    watched, closed = make()
    try:
        os.set_inheritable(closed, inheritable)
        async with ForkServer(**made_by):
            os.close(closed)
            poll = select.poll()
            poll.register(watched, 0)  # POLLHUP, POLLERR
            assert poll.poll(10_000)
    finally:
        os.close(watched)


@pytest.mark.parametrize("inheritable", [False, True])
async def test_port_is_free_when_this_process_has_closed_it(pidfds: None, made_by: Any, inheritable: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(inheritable)
        address = listener.getsockname()
        async with ForkServer(**made_by):
            listener.close()
            with socket.socket() as client, pytest.raises(ConnectionRefusedError):
                client.connect(address)


def try_lock(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.mark.parametrize("inheritable", [False, True])
async def test_lock_is_released_when_this_process_closes_its_file(
    pidfds: None, made_by: Any, inheritable: bool, tmp_path: Path
) -> None:
    path = tmp_path / "lock"
    with path.open("wb") as file:
        os.set_inheritable(file.fileno(), inheritable)
        fcntl.flock(file, fcntl.LOCK_EX)
        async with ForkServer(**made_by):
            assert not try_lock(path)
            file.close()
            assert try_lock(path)


log: BinaryIO | None = None


def write_log(text: bytes) -> None:
    assert log is not None
    log.write(text)
    log.flush()


async def test_file_that_is_open_stays_open_for_the_workers(pidfds: None, tmp_path: Path) -> None:
    """As the one that logging writes to."""
    global log
    path = tmp_path / "log"
    with path.open("ab") as log:
        async with ForkServer() as server:
            assert await (await server.afork(write_log, b"from a worker\n")).wait() == 0
            write_log(b"from the parent\n")
    assert path.read_bytes() == b"from a worker\nfrom the parent\n"


def close_and_open(numbers: list[int]) -> int:
    """In a worker, do what objects do that know the numbers, while others open descriptors."""
    read, write = os.pipe()
    if {read, write} & set(numbers):
        return 1
    for number in numbers:
        os.close(number)
    os.write(write, b"x")
    return 0 if os.read(read, 1) == b"x" else 2


async def test_numbers_that_are_still_known_never_name_what_is_opened_later(pidfds: None) -> None:
    pipes = [os.pipe() for _ in range(5)]
    numbers = [fd for pipe in pipes for fd in pipe]
    async with ForkServer() as server:
        for _ in range(3):
            assert await (await server.afork(close_and_open, numbers)).wait() == 0
    for fd in numbers:
        os.close(fd)


HOOKED = """
import asyncio, os, select, socket, sys, aiopidfd

def open_some():
    poll, (left, right) = select.epoll(), socket.socketpair()
    poll.register(left, select.EPOLLIN)
    return poll, left, right, os.pipe()

mine, renewed = open_some(), False

def renew():
    global mine, renewed
    if renewed:  # in the server: its workers have what it has made, but for epoll descriptors, which they would share
        poll = select.epoll()
        poll.register(mine[1], select.EPOLLIN)
        mine = poll, *mine[1:]
        return
    renewed = True
    for end in mine[:3]:
        end.close()
    for fd in mine[3]:
        os.close(fd)
    mine = open_some()  # with the same numbers
os.register_at_fork(after_in_child=renew)

def work():
    poll, left, right, (read, write) = mine
    os.write(write, b"1"), right.send(b"2")
    poll.register(read, select.EPOLLIN)
    found = len(poll.poll(10))
    return found * 10 + int(os.read(read, 1) + left.recv(1) == b"12")

async def main():
    async with aiopidfd.ForkServer() as server:
        print(server.features.made_by, await (await server.afork(work)).wait())

asyncio.run(main())
"""


def run_program(program: str, *args: str, **options: Any) -> str:
    """Run a program of Python's, and return what it prints."""
    ran: subprocess.CompletedProcess[bytes] = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *args],
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
        env=undebugged_environment(),
        **options,
    )
    return ran.stdout.decode()


@needs_pidfds
def test_what_fork_hooks_have_made_in_the_server_stays() -> None:
    assert run_program(HOOKED) == "clone 21\n"


CLOSED_STREAMS = """
import os, sys
read, write = os.pipe()
assert read == 0
import aiopidfd

async def main():
    async with aiopidfd.ForkServer(start_method=sys.argv[1]) as server:
        os.close(write)
        assert os.read(read, 1) == b"", "the server holds it"
        worker = await server.afork(exec, "import os; os._exit(len(os.read(0, 1)) + os.system('read x') // 256)")
        print(await worker.wait())

aiopidfd.run(main(), loop_factory=aiopidfd.SelectorEventLoop)  # libuv can't have descriptors below 3
"""


@needs_pidfds
@pytest.mark.parametrize("method", METHODS)
def test_pipe_with_the_number_of_a_closed_standard_stream_is_closed_too(method: str) -> None:
    """And nothing else gets the number: a worker, and the programs that it starts, read no end of a socket there."""
    assert run_program(CLOSED_STREAMS, method, preexec_fn=lambda: os.close(0)) == "1\n"


def test_descriptors_are_found_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    found = inherited.list_descriptors()

    def fail(path: str) -> Any:
        raise FileNotFoundError(2, "No such file or directory", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fail)
        assert inherited.list_descriptors() == sorted(found)


def test_snapshot_distinguishes_an_inherited_descriptor_from_a_new_one_with_its_number() -> None:
    """Also where the inode numbers are the same, as those of all epoll descriptors are."""
    polls = [select.epoll() for _ in range(3)]
    snapshot = inherited.Snapshot()
    try:
        os.dup2(polls[0].fileno(), polls[1].fileno(), inheritable=False)
        polls[2].close()
        found = snapshot.find_inherited()
        assert polls[0].fileno() in found
        assert polls[1].fileno() not in found
        assert set(found) <= set(inherited.list_descriptors())
    finally:
        snapshot.close()
        for poll in polls:
            poll.close()
