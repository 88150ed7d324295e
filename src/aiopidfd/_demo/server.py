"""The demo: a server whose workers are killed and replaced, and every exit is seen.

The parent forks, watches and replaces the workers, and does nothing else. So it uses little memory, which keeps forks fast,
and it has no connections that a worker would inherit. The demo uses public names only.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from aiopidfd import afork, run

from .http import ANSWERED_NS, EXITING_NS, make_scoreboard, send_requests, work
from .report import Record, Report

WORKERS: Final = 4
KILL_EVERY_S: Final = 1.0
PROGRESS_EVERY_S: Final = 0.2
STOP_TIMEOUT_S: Final = 6.0  # a second longer than stop() waits between SIGTERM and SIGKILL

# The signals that the workers get, in turn, with the expected returncode. SIGUSR1 makes a worker exit with code 3.
WAYS: Final = {signal.SIGKILL: -9, signal.SIGSEGV: -11, signal.SIGUSR1: 3, signal.SIGTERM: -15}

ChildMain = Callable[[socket.socket, "memoryview[int]", int], int]


def run_demo(kills: int) -> int:
    """Run the demo until `kills` workers were killed, and return its exit code.

    0: no exit was lost, and the server answered after every kill. 1: the demo failed. 128 + n: stopped by signal n.
    """
    logging.getLogger("aiopidfd").setLevel(logging.ERROR)  # a forced kill gives a warning, and the demo kills on purpose
    return run(_demo(kills))


async def _demo(kills: int) -> int:
    loop = asyncio.get_running_loop()
    stopped_by: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if not stopped_by.done():
            stopped_by.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        scoreboard = make_scoreboard()
        report = Report(scoreboard)
        report.introduce(listener.getsockname(), WORKERS)
        server = Server(listener, scoreboard, report)
        clients = loop.create_task(server.run_child("clients", WORKERS, send_requests))
        keepers = [loop.create_task(server.keep_worker(place)) for place in range(WORKERS)]
        killer = loop.create_task(server.kill_workers(kills))
        progress = loop.create_task(server.show_progress())
        tasks: list[asyncio.Future[Any]] = [clients, *keepers, killer, progress]
        await asyncio.wait([stopped_by, *tasks], return_when=asyncio.FIRST_COMPLETED)
        await _cancel(killer, clients)  # the clients first, so that no request fails
        await _cancel(*keepers, progress)
    errors = [task.exception() for task in tasks if not task.cancelled()]
    is_good = report.sum_up()
    if stopped_by.done():
        return 128 + stopped_by.result()
    for error in errors:
        if error is not None:
            raise error
    # If the killer was cancelled without a signal, another process has killed the clients.
    return 0 if is_good and not killer.cancelled() else 1


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for _ in range(2):  # the second time for tasks whose child's exit was not reported: they would wait forever
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S)


class Server:
    """The processes around one listening socket: its workers, and their clients."""

    def __init__(self, listener: socket.socket, scoreboard: memoryview[int], report: Report) -> None:
        self._listener = listener
        self._scoreboard = scoreboard
        self._report = report
        self._workers: dict[int, Record] = {}  # by place, the oldest first

    async def keep_worker(self, place: int) -> None:
        """Run a worker in `place`, and a new one whenever it exits. Cancellation stops the worker."""
        while True:
            await self.run_child("worker", place, work)

    async def run_child(self, name: str, place: int, main: ChildMain) -> None:
        """Fork a child, wait until it exits, and report its exit status. Cancellation stops the child."""
        self._scoreboard[EXITING_NS + place] = 0
        child = await afork(
            partial(main, self._listener, self._scoreboard, place),
            ready="manual",  # the child calls notify_ready() when it serves
            pdeathsig=signal.SIGKILL,  # the child is killed if the parent is killed
        )
        record = Record(name, child)
        if main is work:
            self._workers[place] = record
        self._report.add_start()
        try:
            await child.wait()
        except asyncio.CancelledError:
            record.signalled_ns = record.signalled_ns or time.monotonic_ns()
            await child.stop()
            raise
        finally:
            reported_ns = time.monotonic_ns()
            self._workers.pop(place, None)
            # A child that is killed does not set EXITING_NS.
            self._report.add_exit(record, self._scoreboard[EXITING_NS + place] or record.signalled_ns, reported_ns)

    async def kill_workers(self, kills: int) -> None:
        """Kill the oldest worker every second, `kills` times, and note whether the server answers after each kill."""
        await asyncio.sleep(KILL_EVERY_S)
        for way in itertools.islice(itertools.cycle(WAYS), kills):
            while not self._workers:  # noqa: ASYNC110 - rare: another process has killed all workers
                await asyncio.sleep(KILL_EVERY_S)
            worker = next(iter(self._workers.values()))
            worker.expected = WAYS[way]
            worker.signalled_ns = killed_ns = time.monotonic_ns()
            worker.child.send_signal(way)
            try:
                await asyncio.sleep(KILL_EVERY_S)
            finally:
                self._report.add_kill(is_answered=self._scoreboard[ANSWERED_NS] > killed_ns)

    async def show_progress(self) -> None:
        """Update the progress line until cancelled."""
        while True:
            self._report.show_progress(len(self._workers))
            await asyncio.sleep(PROGRESS_EVERY_S)
