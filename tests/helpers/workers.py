"""What the workers of a fork server do in the tests, and what they are asked for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiopidfd import (
    AbstractChildProcess,
    ForkServer,
    notify_ready,
)

from ..conftest import children, open_descriptors


def wait_for_signal() -> None:
    """What a worker does that is to be ended by a signal.

    Python sees SIGINT between two steps only: one that comes just before a pause() without end would not end it.
    """
    while True:
        time.sleep(0.02)


def exit_with(code: int) -> int:
    return code


def say_ready_after_read(fd: int, code: int) -> int:
    os.read(fd, 1)
    notify_ready()
    return code


def raise_value_error(text: str) -> None:
    raise ValueError(text)


def interrupt() -> None:
    raise KeyboardInterrupt


def ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    notify_ready()
    wait_for_signal()


def tell(pid: int, number: int, what: str) -> None:
    """Write what a worker sees of itself into the pipe that the process `pid` has under that number."""
    fd = os.open(f"/proc/{pid}/fd/{number}", os.O_WRONLY)
    os.write(fd, json.dumps(LOOKS[what](fd)).encode())


def tell_descriptors(fd: int) -> list[str]:
    return sorted(target for number, target in open_descriptors().items() if number > 2 and number != fd)


def tell_signals(fd: int) -> dict[str, Any]:
    with open("/proc/self/status", encoding="ascii") as status:
        fields = dict(line.split(":", 1) for line in status)
    masks = {name: int(fields[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")}
    return {**masks, "wakeup": signal.set_wakeup_fd(-1)}


def tell_asyncio(fd: int) -> list[bool]:
    try:
        asyncio.current_task()
    except RuntimeError:
        return [asyncio._get_running_loop() is None, True]
    return [asyncio._get_running_loop() is None, False]


def tell_thread_id(fd: int) -> list[int]:
    """The ID of this only thread: the kernel's, Python's, and the one that the C library caches and encodes in a clock."""
    clock = time.pthread_getcpuclockid(threading.get_ident())
    return [os.getpid(), threading.get_native_id(), ~(clock >> 3)]


LOOKS: dict[str, Callable[[int], Any]] = {
    "descriptors": tell_descriptors,
    "signals": tell_signals,
    "asyncio": tell_asyncio,
    "pid": tell_thread_id,
    "parent": lambda fd: os.getppid(),
    "bench": lambda fd: "bench.forked" in sys.modules,
}


async def ask(server: ForkServer, what: str) -> Any:
    """Return what a worker of the server says of itself."""
    read, write = os.pipe()
    try:
        async with await server.afork(tell, os.getpid(), write, what):
            return json.loads(await asyncio.get_running_loop().run_in_executor(None, os.read, read, 65536))
    finally:
        os.close(read)
        os.close(write)


@contextlib.asynccontextmanager
async def fork_server(**options: Any) -> AsyncIterator[ForkServer]:
    """A server; where there can be none, what stands in for it."""
    async with ForkServer(fallback=True, **options) as server:
        yield server


async def others(server: ForkServer) -> set[int]:
    """The children of this process, without the worker that waits for an order."""
    idle = None if server._link is None else server._link.idle
    if idle is None:
        return children()
    worker = await asyncio.shield(idle.outcome)
    assert isinstance(worker, AbstractChildProcess)
    return children() - {worker.pid}


def server_child(server: ForkServer) -> AbstractChildProcess:
    assert server._server is not None
    return server._server


async def kill_server(server: ForkServer) -> None:
    """Kill the server, and return when that is known."""
    child = server_child(server)
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
