"""What the children of the demo do: answer HTTP requests, or send them."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import re
import resource
import signal
import socket
import time
from typing import Final

from aiopidfd import notify_ready, run

CLIENTS: Final = 4
# Between two requests of a client. Without it the closed connections would use up the ports of 127.0.0.1 in some seconds.
PAUSE_S: Final = 0.01
ANSWER_TIMEOUT_S: Final = 5.0

_ANSWER: Final = re.compile(rb"HTTP/1\.1 200 OK\r\n.*\r\n\r\nanswered by process \d+\n", re.DOTALL)

# What is where on the board. From LAST_WORDS_NS on each child has a place of its own.
SERVED, FAILED, ANSWERED_NS, LAST_WORDS_NS = range(4)


def make_board() -> memoryview[int]:
    """Return numbers that this process shares with those that it forks, and that outlive whoever has written them.

    SERVED and FAILED count requests; ANSWERED_NS is when the latest request that was served had been started, LAST_WORDS_NS
    when a child reached its last line of Python. Times are in ns of time.monotonic_ns(), the same in all processes.
    """
    return memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")


def work(listener: socket.socket, board: memoryview[int], place: int) -> int:
    """Live as a worker: answer requests until SIGUSR1, and then exit with code 3, as a worker that gives up."""
    _prepare()
    run(_serve(listener))
    board[LAST_WORDS_NS + place] = time.monotonic_ns()
    return 3


def send_requests(listener: socket.socket, board: memoryview[int], place: int) -> int:
    """Live as the clients: send requests until SIGTERM, then wait for the last answers and exit with code 0."""
    _prepare()
    address = listener.getsockname()
    listener.close()
    run(_send_requests(address, board))
    board[LAST_WORDS_NS + place] = time.monotonic_ns()
    return 0


def _prepare() -> None:
    # Ctrl-C goes to every process of the terminal's foreground group; what to do about it is for the parent to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # No core dumps. 0 would forbid the file only; 1 byte is too little for one, and the value at which the kernel does not
    # start a handler such as systemd-coredump either, for which an exit would have to wait.
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0 if hard == 0 else 1, hard))


async def _serve(listener: socket.socket) -> None:
    give_up = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, give_up.set)
    # All workers accept from one socket, and the parent holds it, too: a connection that nobody has accepted yet waits for
    # the next worker, however many are killed meanwhile.
    server = await asyncio.start_server(_answer, sock=listener)
    notify_ready()
    await give_up.wait()
    server.close()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # A client that goes away is no error of ours; IncompleteReadError if it says nothing at all. CancelledError if the
    # worker ends meanwhile: nothing of this task comes after it, and asyncio would print a traceback of it before Python
    # 3.11.8 and 3.12.2 (https://github.com/python/cpython/issues/113538).
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
        await reader.readuntil(b"\r\n\r\n")
        body = b"answered by process %d\n" % os.getpid()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
        writer.write(head + body)
        await writer.drain()
    writer.close()


async def _send_requests(address: tuple[str, int], board: memoryview[int]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    notify_ready()
    await asyncio.gather(*(_be_client(address, board, stop) for _ in range(CLIENTS)))


async def _be_client(address: tuple[str, int], board: memoryview[int], stop: asyncio.Event) -> None:
    while not stop.is_set():
        started_ns = time.monotonic_ns()
        if await _is_served(address):
            board[SERVED] += 1
            board[ANSWERED_NS] = max(board[ANSWERED_NS], started_ns)
        else:  # sent once: a request that dies with its worker has failed
            board[FAILED] += 1
        await asyncio.sleep(PAUSE_S)


async def _is_served(address: tuple[str, int]) -> bool:
    try:
        answer = await asyncio.wait_for(_get(address), ANSWER_TIMEOUT_S)
    except (OSError, asyncio.TimeoutError):
        return False
    return _ANSWER.fullmatch(answer) is not None


async def _get(address: tuple[str, int]) -> bytes:
    """Send one request over a connection of its own, and return all that comes back."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(b"GET / HTTP/1.1\r\nHost: %s:%d\r\nConnection: close\r\n\r\n" % (address[0].encode(), address[1]))
        return await reader.read()
    finally:
        writer.close()
