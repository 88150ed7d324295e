"""Functions that the workers of a fork server run in the tests."""

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
    """Run until a signal kills this worker.

    Python handles SIGINT between two bytecodes only. A SIGINT just before signal.pause() would not end the pause.
    """
    while True:
        time.sleep(0.02)


def exit_with(code: int) -> int:
    return code


def notify_ready_after_read(fd: int, code: int) -> int:
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


def report(pid: int, number: int, what: str) -> None:
    """Write a property of this worker to the pipe that the process `pid` has open as `number`."""
    fd = os.open(f"/proc/{pid}/fd/{number}", os.O_WRONLY)
    os.write(fd, json.dumps(LOOKS[what](fd)).encode())


def report_descriptors(fd: int) -> list[str]:
    return sorted(target for number, target in open_descriptors().items() if number > 2 and number != fd)


def report_signals(fd: int) -> dict[str, Any]:
    with open("/proc/self/status", encoding="ascii") as status:
        fields = dict(line.split(":", 1) for line in status)
    masks = {name: int(fields[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")}
    return {**masks, "wakeup": signal.set_wakeup_fd(-1)}


def report_asyncio(fd: int) -> list[bool]:
    try:
        asyncio.current_task()
    except RuntimeError:
        return [asyncio._get_running_loop() is None, True]
    return [asyncio._get_running_loop() is None, False]


def report_thread_id(fd: int) -> list[int]:
    """The ID of this only thread: the kernel's, Python's, and the one that the C library caches and encodes in a clock."""
    clock = time.pthread_getcpuclockid(threading.get_ident())
    return [os.getpid(), threading.get_native_id(), ~(clock >> 3)]


LOOKS: dict[str, Callable[[int], Any]] = {
    "descriptors": report_descriptors,
    "signals": report_signals,
    "asyncio": report_asyncio,
    "pid": report_thread_id,
    "parent": lambda fd: os.getppid(),
    "bench": lambda fd: "bench.forked" in sys.modules,
}


async def ask(server: ForkServer, what: str) -> Any:
    """Return a property of a worker of the server."""
    read, write = os.pipe()
    try:
        async with await server.afork(report, os.getpid(), write, what):
            return json.loads(await asyncio.get_running_loop().run_in_executor(None, os.read, read, 65536))
    finally:
        os.close(read)
        os.close(write)


@contextlib.asynccontextmanager
async def fork_server(**options: Any) -> AsyncIterator[ForkServer]:
    """A fork server, or its fallback where it is not available."""
    async with ForkServer(fallback=True, **options) as server:
        yield server


async def others(server: ForkServer) -> set[int]:
    """The children of this process, without the idle worker."""
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
    """Kill the server, and return when its exit is reported."""
    child = server_child(server)
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
