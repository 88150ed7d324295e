"""An ASGI application that makes children while it serves. The tests of web servers use it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

import aiopidfd

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

# The fork server of this process, made when it starts to serve.
fork_server: aiopidfd.ForkServer


def say(*words: object) -> None:
    """Print a line for the test, in one write: lines of other processes do not break it."""
    os.write(1, " ".join(["app:", *map(str, words), "\n"]).encode())


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Serve one ASGI connection."""
    if scope["type"] == "lifespan":
        await live(receive, send)
    elif scope["type"] == "http":
        children = await (make_children() if scope["path"] == "/" else hold_children())
        body = json.dumps({"loop": name_loop(), "children": children}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def name_loop() -> str:
    """Return the public name of the running loop's class."""
    kind = type(asyncio.get_running_loop())
    return next((f"aiopidfd:{name}" for name in aiopidfd.__all__ if getattr(aiopidfd, name, None) is kind), repr(kind))


async def live(receive: Receive, send: Send) -> None:
    """Start a fork server when the web server's process starts, and end it at the end."""
    global fork_server
    await receive()
    async with aiopidfd.ForkServer(fallback=True) as fork_server:
        say("started", os.getpid())
        await send({"type": "lifespan.startup.complete"})
        await receive()
    say("stopped", os.getpid())
    await send({"type": "lifespan.shutdown.complete"})


async def make_children() -> list[Any]:
    """Run a child of each kind to its end, all at the same time."""
    return list(await asyncio.gather(run_program(), fork_child(), fork_worker()))


async def run_program() -> list[object]:
    """Send a megabyte through a program."""
    data = os.urandom(1 << 20)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec("sh", "-c", "cat; exit 3", stdin=pipe, stdout=pipe)
    output, _ = await process.communicate(data)
    return [output == data, process.returncode]


async def fork_child() -> int:
    """Fork this process. The child runs a loop of its own, with a program."""

    async def main() -> int:
        process = await asyncio.create_subprocess_exec("sh", "-c", "exit 4")
        return await process.wait()

    child = await aiopidfd.afork(lambda: aiopidfd.run(main(), loop_factory=aiopidfd.SelectorEventLoop))
    return await child.wait()


async def fork_worker() -> int:
    """Have the fork server make a child."""
    worker = await fork_server.afork(add, 2, 3)
    return await worker.wait()


def add(first: int, second: int) -> int:
    """Be a worker."""
    return first + second


async def hold_children() -> list[int]:
    """Make children that live until the test closes a FIFO. Meanwhile the server gets its signal to end."""
    fifo = os.environ["FRAMEWORKS_FIFO"]
    program = 'exec < "$0"; echo; read nothing; exit 6'
    process = await asyncio.create_subprocess_exec("sh", "-c", program, fifo, stdout=asyncio.subprocess.PIPE)
    child = await aiopidfd.afork(lambda: read_to_end(fifo), ready="manual")
    worker = await fork_server.afork(read_to_end, fifo, ready="manual")
    assert process.stdout is not None
    await process.stdout.readline()
    say("holding", os.getpid())
    return list(await asyncio.gather(process.wait(), child.wait(), worker.wait()))


def read_to_end(fifo: str) -> int:
    """Be a child that exits when the FIFO has no writer any more."""
    with open(fifo, "rb") as pipe:
        aiopidfd.notify_ready()
        pipe.read()
    return 7
