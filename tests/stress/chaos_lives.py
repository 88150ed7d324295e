"""The lives of the children in the chaos: how they are made, watched and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import aiopidfd
from aiopidfd import PidfdWatcher, wait
from aiopidfd._kernel.exit_status import LOST_RETURNCODE
from aiopidfd._watch.registries import registry_of

from ..helpers.children import DEADLY, Stranger, obey
from ..helpers.mischief import is_out_of_descriptors

if TYPE_CHECKING:
    from .chaos import Chaos

LANES = 200
PATIENCE_S = 30.0
LEFT_PER_LOOP = 20  # children that outlive it


def fork(orders: int) -> int:
    """Fork from any thread. Return the child's pid."""
    pid = os.fork()
    if pid == 0:
        code = 98
        try:
            code = obey(orders)
        finally:
            os._exit(code)
    return pid


class Skipped(Exception):
    """There are enough lives of this kind."""


class Held:
    """A child that waits for its orders, and what may be reported of it."""

    def __init__(self, pid: int, orders: int, mark: int) -> None:
        self.pid = pid
        self.mark = mark
        self.may_be: set[int | None] = set()
        self.by_pidfd = False
        self.orders = orders

    def end(self, chance: random.Random) -> None:
        """Have it end somehow. It cannot have ended before, so its pid is still its own."""
        kind = chance.randrange(4)
        if kind == 0:
            self.may_be = {-signal.SIGKILL}
            os.kill(self.pid, signal.SIGKILL)
            return
        if kind == 1:
            deadly = chance.choice(DEADLY)
            self.may_be = {-deadly}
            os.write(self.orders, bytes([ord("s"), deadly]))
        else:
            code = chance.randrange(LOST_RETURNCODE)
            self.may_be = {code}
            os.write(self.orders, bytes([ord("x"), code]))
        if kind == 3:  # two things at once
            self.may_be.add(-signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):  # another waitpid() was first
                os.kill(self.pid, signal.SIGKILL)

    def bury(self) -> None:
        """Reap it as its owner, if it is not reaped yet."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


class Act:
    """The part of one loop in a run: LANES tasks, each with one life after another."""

    def __init__(self, chaos: Chaos, loop: asyncio.AbstractEventLoop, seed: float, deadline: float) -> None:
        self.chaos = chaos
        self.loop = loop
        self.random = random.Random(seed)
        self.deadline = deadline
        self.watcher = PidfdWatcher()
        self.left: list[Held] = []
        self.strangers = 0
        self.makers: list[Callable[[int], Awaitable[int]]] = [self._spawn, self._spawn, self._spawn, self._fork_in_thread]
        self.lives = {
            self._observed: 40,
            self._handled: 10,
            self._peeked: 5,
            self._cancelled: 10,
            self._subprocess: 10,
            self._afork: 4,
            self._cancelled_afork: 2,
            self._abandoned: 2,
            self._other_loop: 2,
            self._stranger: 1,
        }

    async def run(self) -> None:
        """Start lives until the deadline, and finish them."""
        registry_of(self.loop)  # while there are descriptors for it
        await asyncio.gather(self.chaos.mischief.run(self.deadline), *[self._lane() for _ in range(LANES)])

    def release(self) -> None:
        """End the children whose loop is closed."""
        for child in self.left:
            child.end(self.random)
            os.close(child.orders)

    async def _lane(self) -> None:
        lives, weights = list(self.lives), list(self.lives.values())
        while time.monotonic() < self.deadline:
            await self._pause()
            life = self.random.choices(lives, weights)[0]
            try:
                await life()
            except Skipped:
                pass
            except OSError as exc:
                if not is_out_of_descriptors(exc):
                    raise
                self.chaos.count(refused=1)
            else:
                self.chaos.lives[life.__name__.strip("_").replace("_", " ")] += 1

    async def _pause(self) -> None:
        await asyncio.sleep(self.random.choice([0, 0.001, 0.02]) * self.random.random())

    async def _spawn(self, orders: int) -> int:
        return os.posix_spawn(self.chaos.ender, ["ender"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, orders, 0)])

    async def _fork_in_thread(self, orders: int) -> int:
        return await self.loop.run_in_executor(self.chaos.executor, fork, orders)

    @contextlib.asynccontextmanager
    async def _made(self, make: Callable[[int], Awaitable[int]]) -> AsyncIterator[Held]:
        """A child. Afterwards its pipe is closed. If it was not ordered to end, it is killed and reaped."""
        mark = self.chaos.mischief.mark()
        with contextlib.ExitStack() as stack:
            orders, writer = os.pipe()
            stack.callback(os.close, writer)
            try:
                pid = await make(orders)
            finally:
                os.close(orders)
            child = Held(pid, writer, mark)
            try:
                yield child
            finally:
                if not child.may_be:
                    os.kill(pid, signal.SIGKILL)
                    child.bury()

    def _any_maker(self) -> Callable[[int], Awaitable[int]]:
        return self.random.choice(self.makers)

    def _end(self, child: Held) -> None:
        """Order it to end, and note how it is watched then."""
        watched = registry_of(self.loop)._children[child.pid]
        child.by_pidfd = watched.backend.name == "pidfd"
        child.end(self.random)

    async def _end_after_a_stop(self, child: Held, is_told: Callable[[], bool]) -> None:
        """Stop it, order it to end, and continue it."""
        os.kill(child.pid, signal.SIGSTOP)
        watched = registry_of(self.loop)._children[child.pid]
        await self._pause()
        self.chaos.count(wrong=is_told())  # it has only stopped
        child.by_pidfd = watched.backend.name == "pidfd"
        child.end(self.random)
        with contextlib.suppress(ProcessLookupError):  # killed and reaped
            os.kill(child.pid, signal.SIGCONT)

    async def _have(self, child: Held, future: asyncio.Future[Any]) -> Any:
        """Wait for it. Return None if that hangs."""
        await asyncio.wait([future], timeout=PATIENCE_S)
        if future.done():
            return future.result()
        future.cancel()
        self.chaos.count(hung=1)
        return None

    async def _observed(self) -> None:
        """Several tasks wait; some of them give up, and may come back."""
        async with self._made(self._any_maker()) as child:
            tasks = [asyncio.ensure_future(wait(child.pid)) for _ in range(self.random.choice([1, 1, 2, 3]))]
            await asyncio.sleep(0)
            given_up: list[asyncio.Future[Any]] = []
            if self.random.random() < 0.3:
                given_up = [asyncio.ensure_future(wait(child.pid, reap=False)) for _ in range(2)]
                await self._pause()
                for task in given_up:
                    task.cancel()
            if self.random.random() < 0.2:  # it is unwatched for a moment
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                tasks = [asyncio.ensure_future(wait(child.pid))]
            await self._pause()
            await asyncio.sleep(0)
            if self.random.random() < 0.3:
                await self._end_after_a_stop(child, tasks[0].done)
            else:
                self._end(child)
            if len(tasks) > 1 and self.random.random() < 0.5:
                await self._pause()
                given_up.append(tasks.pop())
                given_up[-1].cancel()
            for number, task in enumerate(tasks):
                status = await self._have(child, task)
                if status is not None:
                    self.chaos.count(wrong=status.pid != child.pid)
                    if number == 0:
                        self.chaos.reported(child, status.returncode, status.source)
                    else:  # all get the same
                        self.chaos.count(wrong=status != tasks[0].result())
            for task in given_up:
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _handled(self) -> None:
        """A watcher's callback, which is called once."""
        async with self._made(self._any_maker()) as child:
            reported: asyncio.Future[int] = self.loop.create_future()
            # A second call is an InvalidStateError, and so an error.
            self.watcher.add_child_handler(child.pid, lambda _, returncode: reported.set_result(returncode))
            await self._pause()
            self._end(child)
            returncode = await self._have(child, reported)
            if returncode is not None:
                self.chaos.reported(child, returncode, "lost" if returncode == LOST_RETURNCODE else "reported to a handler")

    async def _peeked(self) -> None:
        """Its owner reaps it when it is reported."""
        async with self._made(self._any_maker()) as child:
            waiting = asyncio.ensure_future(wait(child.pid, reap=False))
            await asyncio.sleep(0)
            await self._pause()
            self._end(child)
            status = await self._have(child, waiting)
            if status is not None:
                self.chaos.reported(child, status.returncode, status.source)
            child.bury()

    async def _cancelled(self) -> None:
        """The wait is cancelled while it ends."""
        async with self._made(self._any_maker()) as child:
            waiting = asyncio.ensure_future(wait(child.pid))
            await asyncio.sleep(0)
            self._end(child)
            await self._pause()
            if waiting.cancel():
                await asyncio.wait([waiting])
            else:
                status = waiting.result()
                self.chaos.reported(child, status.returncode, status.source)
            child.bury()

    async def _subprocess(self) -> None:
        """A subprocess of asyncio's."""
        processes: list[asyncio.subprocess.Process] = []

        async def make(orders: int) -> int:
            processes.append(await asyncio.create_subprocess_exec(self.chaos.ender, stdin=orders))
            return processes[0].pid

        async with self._made(make) as child:
            await self._pause()
            self._end(child)
            returncode = await self._have(child, asyncio.ensure_future(processes[0].wait()))
            if returncode is not None:
                self.chaos.reported(child, returncode, "lost" if returncode == LOST_RETURNCODE else "of a subprocess")

    async def _afork(self) -> None:
        """A forked child with a handle."""
        handles: list[aiopidfd.AbstractChildProcess] = []

        async def make(orders: int) -> int:
            handles.append(await aiopidfd.afork(partial(obey, orders)))
            return handles[0].pid

        async with self._made(make) as child:
            self._end(child)
            await self._have(child, asyncio.ensure_future(handles[0].wait()))
            status = handles[0].exit_status
            if status is not None:
                self.chaos.reported(child, status.returncode, status.source)

    async def _cancelled_afork(self) -> None:
        """An afork that is cancelled before the child is ready."""
        forking = asyncio.ensure_future(aiopidfd.afork(partial(time.sleep, 60)))
        await self._pause()
        forking.cancel()
        await asyncio.wait([forking])
        if not forking.cancelled():
            handle = forking.result()
            handle.kill()
            await self._have(Held(handle.pid, -1, 0), asyncio.ensure_future(handle.wait()))

    async def _abandoned(self) -> None:
        """A child that outlives this loop, unless there are enough of them."""
        async with self._made(self._any_maker()) as child:
            if len(self.left) >= LEFT_PER_LOOP:
                raise Skipped
            orders = os.dup(child.orders)
            if self.random.random() < 0.5:
                self.watcher.add_child_handler(child.pid, print)  # not called while this loop runs
            else:
                task = asyncio.ensure_future(wait(child.pid))
                task._log_destroy_pending = False  # type: ignore[attr-defined] # that is what we are here for
                await asyncio.sleep(0)
            self.left.append(Held(child.pid, orders, child.mark))
            child.may_be = {None}  # another function ends it

    async def _other_loop(self) -> None:
        """A loop in another thread. It is closed while its children run."""
        await self.loop.run_in_executor(self.chaos.waiting_executor, self._run_other_loop, self.random.random())

    def _run_other_loop(self, seed: float) -> None:
        # A loop of asyncio or uvloop that cannot be made writes to stderr. This wait makes that rare.
        with contextlib.ExitStack() as room:
            for _ in range(16):
                room.callback(os.close, os.dup(0))
        loop = self.chaos.factory()
        try:
            act = Act(self.chaos, loop, seed, time.monotonic())
            loop.run_until_complete(act._be_other())
        finally:
            loop.close()
            act.release()

    async def _be_other(self) -> None:
        registry_of(self.loop)
        lives = [self._observed(), self._handled(), self._abandoned()]
        for result in await asyncio.gather(*lives, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _stranger(self) -> None:
        """Another process's child."""
        if self.strangers:
            raise Skipped
        self.strangers += 1
        call = partial(self.loop.run_in_executor, self.chaos.waiting_executor)
        try:
            stranger = await call(Stranger)
            try:
                child = Held(stranger.pid, -1, self.chaos.mischief.mark())
                child.may_be = {11}
                waiting = asyncio.ensure_future(wait(child.pid))
                await asyncio.sleep(0)
                if waiting.done():
                    await waiting  # out of descriptors: watching a stranger needs one
                watched = registry_of(self.loop)._children[child.pid]
                child.by_pidfd = watched.backend.name == "pidfd"
                stranger.send("end")
                stranger.send("reap")
                status = await self._have(child, waiting)
                if status is not None:
                    if status.source == "not-child" and not (child.by_pidfd and self.chaos.recoverable):
                        child.may_be = {None}
                    self.chaos.reported(child, status.returncode, status.source)
            finally:
                await call(stranger.__exit__)  # which waits
        finally:
            self.strangers -= 1
