"""The demo: a server whose workers are killed and replaced all the while, and every exit is seen.

The parent forks, watches and replaces the workers, and does nothing else: it stays small, so that forking stays cheap, and
it has no connections that a worker could inherit. A server like it can be made with public names alone, as here.
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

from .http import ANSWERED_NS, LAST_WORDS_NS, make_board, send_requests, work
from .report import Life, Report

WORKERS: Final = 4
KILL_EVERY_S: Final = 1.0
PROGRESS_EVERY_S: Final = 0.2
STOP_TIMEOUT_S: Final = 6.0  # a second more than a child that does not obey SIGTERM gets before its SIGKILL

# How the workers are ended, in turn, and the returncode that must come of it: SIGUSR1 makes a worker exit with code 3.
WAYS: Final = {signal.SIGKILL: -9, signal.SIGSEGV: -11, signal.SIGUSR1: 3, signal.SIGTERM: -15}

ChildMain = Callable[[socket.socket, "memoryview[int]", int], int]


def run_demo(kills: int) -> int:
    """Run the demo until `kills` workers were killed, and return its exit code.

    0: no exit was lost, and the server has answered after every kill. 1: not so. 128 + n: stopped by signal n.
    """
    logging.getLogger("aiopidfd").setLevel(logging.ERROR)  # that a child is killed by force is what the demo is about
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
        board = make_board()
        report = Report(board)
        report.introduce(listener.getsockname(), WORKERS)
        server = Server(listener, board, report)
        clients = loop.create_task(server.run_child("clients", WORKERS, send_requests))
        keepers = [loop.create_task(server.keep_worker(place)) for place in range(WORKERS)]
        killer = loop.create_task(server.kill_workers(kills))
        progress = loop.create_task(server.show_progress())
        tasks: list[asyncio.Future[Any]] = [clients, *keepers, killer, progress]
        await asyncio.wait([stopped_by, *tasks], return_when=asyncio.FIRST_COMPLETED)
        await _cancel(killer, clients)  # the clients before the workers, so that no request loses its worker
        await _cancel(*keepers, progress)
    errors = [task.exception() for task in tasks if not task.cancelled()]
    is_good = report.sum_up()
    if stopped_by.done():
        return 128 + stopped_by.result()
    for error in errors:
        if error is not None:
            raise error
    # The clients, too, may have been the first to end, killed by somebody else.
    return 0 if is_good and not killer.cancelled() else 1


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for _ in range(2):  # the second time those whose child's exit nobody tells us of: it is lost, and must not hold us up
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S)


class Server:
    """The processes around one listening socket: its workers, and their clients."""

    def __init__(self, listener: socket.socket, board: memoryview[int], report: Report) -> None:
        self._listener = listener
        self._board = board
        self._report = report
        self._workers: dict[int, Life] = {}  # by place, the oldest first

    async def keep_worker(self, place: int) -> None:
        """Have a worker in `place`, and a new one whenever it has ended. Cancellation stops the worker."""
        while True:
            await self.run_child("worker", place, work)

    async def run_child(self, name: str, place: int, main: ChildMain) -> None:
        """Fork a child, wait until it has ended, and report how. Cancellation stops the child."""
        self._board[LAST_WORDS_NS + place] = 0
        child = await afork(
            partial(main, self._listener, self._board, place),
            ready="manual",  # when it serves
            pdeathsig=signal.SIGKILL,  # not even a parent that is killed leaves it behind
        )
        life = Life(name, child)
        if main is work:
            self._workers[place] = life
        self._report.add_start()
        try:
            await child.wait()
        except asyncio.CancelledError:
            life.signalled_ns = life.signalled_ns or time.monotonic_ns()
            await child.stop()
            raise
        finally:
            told_ns = time.monotonic_ns()
            self._workers.pop(place, None)
            # A child that is killed has no last words.
            self._report.add_exit(life, self._board[LAST_WORDS_NS + place] or life.signalled_ns, told_ns)

    async def kill_workers(self, kills: int) -> None:
        """Kill the oldest worker every second, `kills` times, and note whether the server answers afterwards."""
        await asyncio.sleep(KILL_EVERY_S)
        for way in itertools.islice(itertools.cycle(WAYS), kills):
            while not self._workers:  # noqa: ASYNC110 - rare: somebody else has killed them all, and they are being replaced
                await asyncio.sleep(KILL_EVERY_S)
            worker = next(iter(self._workers.values()))
            worker.expected = WAYS[way]
            worker.signalled_ns = killed_ns = time.monotonic_ns()
            worker.child.send_signal(way)
            try:
                await asyncio.sleep(KILL_EVERY_S)
            finally:
                self._report.add_kill(is_answered=self._board[ANSWERED_NS] > killed_ns)

    async def show_progress(self) -> None:
        """Keep the progress line up to date, until cancelled."""
        while True:
            self._report.show_progress(len(self._workers))
            await asyncio.sleep(PROGRESS_EVERY_S)
