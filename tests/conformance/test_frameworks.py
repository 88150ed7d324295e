"""Web servers, unchanged, on our loops. Their application makes children of every kind, and they end as on other loops."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import aiopidfd
from aiopidfd._backends.backend import ENVIRONMENT

from ..conftest import BACKENDS, LOOPS
from ..helpers.children import session_members

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240  # for one server, from its start to its end; in an emulated machine it takes a minute
REQUESTS = 8

# As module:name. The results on the last one are those expected on ours.
FACTORIES = {"asyncio": "aiopidfd:SelectorEventLoop", "uvloop": "aiopidfd:UvloopEventLoop"}
PLAIN = "asyncio:SelectorEventLoop"

# A server takes seconds, so not all combinations run: each loop gets each signal, and each backend both signals.
BACKEND_OF = {
    ("asyncio", signal.SIGTERM): BACKENDS[0],
    ("asyncio", signal.SIGINT): BACKENDS[-1],
    ("uvloop", signal.SIGTERM): BACKENDS[-1],
    ("uvloop", signal.SIGINT): BACKENDS[0],
}


class Kind(NamedTuple):
    """One way to run one server."""

    package: str  # the package that it needs
    workers: int
    # Arguments: the path of its socket, its loop factory as module:name, and a path for a file that it may write.
    make_command: Callable[[str, str, Path], list[str]]


def uvicorn(socket: str, factory: str, path: Path) -> list[str]:
    return ["-m", "uvicorn", "tests.conformance.frameworks_app:app", "--loop", factory, "--uds", socket]


def uvicorn_workers(socket: str, factory: str, path: Path) -> list[str]:
    return [*uvicorn(socket, factory, path), "--workers", "2"]


def gunicorn(socket: str, factory: str, path: Path) -> list[str]:
    path.write_text(f"""
from uvicorn_worker import UvicornWorker

class worker_class(UvicornWorker):
    CONFIG_KWARGS = {{"loop": "{factory}"}}
""")
    return ["-m", "gunicorn", "tests.conformance.frameworks_app:app", "-c", str(path), "-b", f"unix:{socket}", "-w", "2"]


def hypercorn_serve(socket: str, factory: str, path: Path) -> list[str]:
    path.write_text(f"""
import aiopidfd
from hypercorn.asyncio import serve
from hypercorn.config import Config
from {factory.replace(":", " import ")} as loop_factory
from tests.conformance.frameworks_app import app

config = Config()
config.bind = ["unix:{socket}"]
aiopidfd.run(serve(app, config), loop_factory=loop_factory)
""")
    return [str(path)]


def hypercorn(socket: str, factory: str, path: Path) -> list[str]:
    """By a policy, which the application sets: the worker loads it before it makes its loop.

    One worker: of several, hypercorn ends the others, whatever they do, as soon as the first one has ended. So it does on
    asyncio's own loop.
    """
    path.write_text(f"""
import asyncio
import aiopidfd
from {factory.replace(":", " import ")} as loop_factory
from tests.conformance.frameworks_app import app

asyncio.set_event_loop_policy(aiopidfd.EventLoopPolicy(loop_factory))
""")
    return ["-m", "hypercorn", f"{path.stem}:app", "-b", f"unix:{socket}", "-w", "1"]


def granian(socket: str, factory: str, path: Path) -> list[str]:
    path.write_text(f"""
import asyncio
from pathlib import Path
from granian import Granian, loops
from {factory.replace(":", " import ")} as loop_factory

@loops.register("auto")
def make_loop():
    loop = loop_factory()
    asyncio.set_event_loop(loop)
    return loop

if __name__ == "__main__":
    Granian("tests.conformance.frameworks_app:app", uds=Path("{socket}"), interface="asgi", workers=2).serve()
""")
    return [str(path)]


KINDS = {
    "uvicorn": Kind("uvicorn", 1, uvicorn),
    "uvicorn with workers": Kind("uvicorn", 2, uvicorn_workers),
    "gunicorn": Kind("uvicorn_worker", 2, gunicorn),
    "hypercorn": Kind("hypercorn", 1, hypercorn),
    "hypercorn's serve()": Kind("hypercorn", 1, hypercorn_serve),
    "granian": Kind("granian", 2, granian),
}

# At its end, a worker of that granian may hold the GIL and wait for a thread of its own that waits for the GIL.
OLD_GRANIAN = pytest.mark.skipif(sys.version_info < (3, 10), reason="the last granian for Python 3.9 (2.5) may deadlock")
NAMES = [pytest.param(name, marks=OLD_GRANIAN if name == "granian" else ()) for name in KINDS]


class Outcome(NamedTuple):
    """The results of a server from its start to its end."""

    answers: list[Any]
    held: Any  # the answer to the request during which it got its signal
    stopped: int  # how many workers have ended properly
    exit_code: int
    output: str


class Server:
    """A running server, seen from outside."""

    def __init__(self, process: asyncio.subprocess.Process, socket: str) -> None:
        self.process = process
        self.lines: list[str] = []
        self._socket = socket

    async def hear(self, word: str, count: int = 1) -> None:
        """Return when the application has printed `word` so often."""
        assert self.process.stdout is not None
        while self.count(word) < count:
            line = await self.process.stdout.readline()
            assert line, f"the server has ended: {''.join(self.lines)}"
            self.lines.append(line.decode())

    def count(self, word: str) -> int:
        return sum(line.startswith(f"app: {word} ") for line in self.lines)

    async def ask(self, path: str) -> Any:
        """Send a request. Return the JSON of the answer."""
        reader, writer = await asyncio.open_unix_connection(self._socket)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
            assert " 200" in status, status
            (length,) = (int(line.partition(":")[2]) for line in headers if line.startswith("content-length:"))
            # Not until the end of file: a forked child has a copy of the connection.
            return json.loads(await reader.readexactly(length))
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def await_listening(self) -> None:
        """Return when it accepts connections."""
        while True:
            try:
                _, writer = await asyncio.open_unix_connection(self._socket)
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return await writer.wait_closed()


def run_server(kind: Kind, factory: str, number: signal.Signals, backend: str) -> Outcome:
    """Start a server, send requests, send it a signal during one of them, and wait until all its processes are gone."""
    return aiopidfd.run(_run_server(kind, factory, number, backend), loop_factory=aiopidfd.SelectorEventLoop)


async def _run_server(kind: Kind, factory: str, number: signal.Signals, backend: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path: the path of a socket must be short
        socket, fifo = f"{folder}/socket", f"{folder}/fifo"
        os.mkfifo(fifo)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *kind.make_command(socket, factory, Path(folder, "launch.py")),
            cwd=ROOT,
            env={**os.environ, ENVIRONMENT: backend, "FRAMEWORKS_FIFO": fifo, "PYTHONPATH": f"{folder}:{ROOT}"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        server = Server(process, socket)
        try:
            return await asyncio.wait_for(_run_to_end(server, kind.workers, fifo, number), TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            rest, _ = await process.communicate()
            print(*server.lines, rest.decode(), sep="")  # shown if the test fails


async def _run_to_end(server: Server, workers: int, fifo: str, number: signal.Signals) -> Outcome:
    await server.hear("started", workers)
    await server.await_listening()
    answers = await asyncio.gather(*(server.ask("/") for _ in range(REQUESTS)))
    writer = os.open(fifo, os.O_RDWR)  # O_WRONLY would wait for a reader
    try:
        asking = asyncio.ensure_future(server.ask("/hold"))
        await server.hear("holding")
        if number == signal.SIGINT:
            os.killpg(server.process.pid, number)  # as a terminal does
        else:
            server.process.send_signal(number)
        # The server should see the signal before the request is done. If it takes longer, the test tests less.
        await asyncio.sleep(0.3)
    finally:
        os.close(writer)
    held = await asking
    # The end of file comes when the last process that has inherited it is gone.
    assert server.process.stdout is not None
    server.lines += (await server.process.stdout.read()).decode().splitlines(keepends=True)
    exit_code = await server.process.wait()
    while session_members(server.process.pid):  # it has closed its output, and is about to end
        await asyncio.sleep(0.02)
    return Outcome(answers, held, server.count("stopped"), exit_code, "".join(server.lines))


@functools.cache
def run_plain(name: str, number: signal.Signals) -> Outcome:
    """The results on asyncio's own loop."""
    return run_server(KINDS[name], PLAIN, number, BACKENDS[0])


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)], ids=lambda number: number.name
)
@pytest.mark.parametrize("name", NAMES)
def test_server_serves_and_ends_on_our_loop_as_on_its_own(name: str, number: signal.Signals, loop: str) -> None:
    kind = KINDS[name]
    if importlib.util.find_spec(kind.package) is None:
        pytest.skip(f"{kind.package} is not installed")
    plain = run_plain(name, number)
    ours = run_server(kind, FACTORIES[loop], number, BACKEND_OF[loop, number])
    for answer in ours.answers:
        assert answer["children"] == [[True, 3], 4, 5]
    for answer in (*ours.answers, ours.held):
        assert answer["loop"] == FACTORIES[loop]
    if number == signal.SIGTERM:
        assert ours.held["children"] == [6, 7, 7]  # the signal went to the server, not to them
    assert ours.held["children"] == plain.held["children"]
    assert ours.stopped == plain.stopped == kind.workers
    assert ours.exit_code == plain.exit_code
    assert ours.output.count("Traceback") == plain.output.count("Traceback")
