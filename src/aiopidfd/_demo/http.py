"""The child processes of the demo: workers answer HTTP requests, clients send them."""

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
# The pause between two requests of a client. Without it, closed connections would use all ports of 127.0.0.1 in seconds.
PAUSE_S: Final = 0.01
ANSWER_TIMEOUT_S: Final = 5.0

_ANSWER: Final = re.compile(rb"HTTP/1\.1 200 OK\r\n.*\r\n\r\nanswered by process \d+\n", re.DOTALL)

# The slots of the scoreboard. From EXITING_NS on, each child has a slot.
SERVED, FAILED, ANSWERED_NS, EXITING_NS = range(4)


def make_scoreboard() -> memoryview[int]:
    """Return the scoreboard: numbers in memory that this process shares with its forked children.

    SERVED and FAILED count requests. ANSWERED_NS is the start of the latest request that was served. EXITING_NS + n is when
    child n ran its last line of Python. Times are those of time.monotonic_ns(), which are the same in all processes.
    """
    return memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")


def work(listener: socket.socket, scoreboard: memoryview[int], place: int) -> int:
    """Run a worker: answer requests until SIGUSR1, then exit with code 3."""
    _prepare()
    run(_serve(listener))
    scoreboard[EXITING_NS + place] = time.monotonic_ns()
    return 3


def send_requests(listener: socket.socket, scoreboard: memoryview[int], place: int) -> int:
    """Run the clients: send requests until SIGTERM, wait for the last answers, and exit with code 0."""
    _prepare()
    address = listener.getsockname()
    listener.close()
    run(_send_requests(address, scoreboard))
    scoreboard[EXITING_NS + place] = time.monotonic_ns()
    return 0


def _prepare() -> None:
    # Ctrl-C sends SIGINT to all processes of the foreground process group. The parent handles it and stops the children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # No core dumps, since they delay the exit. A limit of 0 forbids the file, but not a handler such as systemd-coredump. A
    # limit of 1 forbids both, see core(5).
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0 if hard == 0 else 1, hard))


async def _serve(listener: socket.socket) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, stop.set)
    # All workers accept from one socket, which the parent keeps open. So a pending connection waits for the next worker when
    # a worker is killed.
    server = await asyncio.start_server(_answer, sock=listener)
    notify_ready()
    await stop.wait()
    server.close()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # ConnectionError, IncompleteReadError: the client has closed the connection. CancelledError: the worker exits. This task
    # is done then, and before Python 3.11.8 and 3.12.2 asyncio would print a traceback
    # (https://github.com/python/cpython/issues/113538).
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
        await reader.readuntil(b"\r\n\r\n")
        body = b"answered by process %d\n" % os.getpid()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
        writer.write(head + body)
        await writer.drain()
    writer.close()


async def _send_requests(address: tuple[str, int], scoreboard: memoryview[int]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    notify_ready()
    await asyncio.gather(*(_be_client(address, scoreboard, stop) for _ in range(CLIENTS)))


async def _be_client(address: tuple[str, int], scoreboard: memoryview[int], stop: asyncio.Event) -> None:
    while not stop.is_set():
        started_ns = time.monotonic_ns()
        if await _is_served(address):
            scoreboard[SERVED] += 1
            scoreboard[ANSWERED_NS] = max(scoreboard[ANSWERED_NS], started_ns)
        else:  # a request whose worker is killed fails, and is not sent again
            scoreboard[FAILED] += 1
        await asyncio.sleep(PAUSE_S)


async def _is_served(address: tuple[str, int]) -> bool:
    try:
        answer = await asyncio.wait_for(_get(address), ANSWER_TIMEOUT_S)
    except (OSError, asyncio.TimeoutError):
        return False
    return _ANSWER.fullmatch(answer) is not None


async def _get(address: tuple[str, int]) -> bytes:
    """Send one request over a new connection, and return the answer."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(b"GET / HTTP/1.1\r\nHost: %s:%d\r\nConnection: close\r\n\r\n" % (address[0].encode(), address[1]))
        return await reader.read()
    finally:
        writer.close()
