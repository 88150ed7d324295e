"""The watcher against a model, driven by Hypothesis: an observer is called once for the exit, unless it was removed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import warnings
from functools import partial
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from aiopidfd import AbstractChildProcess, ExitStatus, PidfdWatcher, afork, wait

from ..conftest import LoopFactory, children, open_descriptors
from ..helpers.children import DEADLY, await_zombie, obey
from ..helpers.seccomp import compile_c

# The same examples in each run, of a number that takes some seconds with --full.
SETTINGS = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),  # all of them are about time
)

CHILDREN = 3
WATCHERS = 2
PATIENCE_S = 5.0  # short: Hypothesis repeats a failure many times to find the smallest example

which_child = st.integers(0, CHILDREN - 1)
which_watcher = st.integers(0, WATCHERS - 1)


class Observer:
    """An observer of a child's exit, and what was reported to it."""

    def __init__(self, *, reap: bool = True) -> None:
        self.reap = reap
        self.reported: list[int | None] = []

    def handle(self, pid: int, returncode: int, expected_pid: int) -> None:
        """The callback of a handler."""
        assert pid == expected_pid
        self.reported.append(returncode)

    def take(self, task: asyncio.Task[ExitStatus]) -> None:
        """The callback of a task."""
        if not task.cancelled() and task.exception() is None:
            self.reported.append(task.result().returncode)


class Child:
    """A child, and its state in the model."""

    def __init__(self, pid: int, orders: int) -> None:
        self.pid = pid
        self.orders = orders
        self.returncode: int | None = None  # once it has ended
        self.reaped = False
        self.handlers: dict[PidfdWatcher, Observer] = {}
        self.waits: dict[asyncio.Task[ExitStatus], Observer] = {}
        self.handle: AbstractChildProcess | None = None  # of a forked child; it observes it, too

    @property
    def observers(self) -> list[Observer]:
        """The observers to be called."""
        return [*self.handlers.values(), *self.waits.values()]

    def is_to_be_reaped(self) -> bool:
        """Whether an observer wants that. Those that peek do not."""
        return self.handle is not None or any(observer.reap for observer in self.observers)

    def is_unreaped(self) -> bool:
        """Whether the kernel still has the zombie."""
        try:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True


class Machine(RuleBasedStateMachine):
    """Operations on watchers and children. The loop does not run between them."""

    factory: LoopFactory

    def __init__(self) -> None:
        super().__init__()
        self.ender = str(compile_c("ender.c", "-O1", "-static"))
        self.before = open_descriptors(), children()
        self.loop = self.factory()
        self.errors: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self.watchers = [PidfdWatcher() for _ in range(WATCHERS)]
        self.closed: set[PidfdWatcher] = set()
        self.attached: set[PidfdWatcher] = set()
        self.children: list[Child] = []
        self.taken_back: list[Observer] = []  # they must not be called

    # The rules. A rule that runs the loop ends when all expected calls were made, so that the model has the same state.

    @initialize()
    def start(self) -> None:
        """Start with a child: without one most rules do nothing."""
        self.spawn()

    @precondition(lambda self: len(self.children) < CHILDREN)
    @rule()
    def spawn(self) -> None:
        read, write = os.pipe()
        pid = os.posix_spawn(self.ender, ["ender"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
        os.close(read)
        self.children.append(Child(pid, write))

    @precondition(lambda self: len(self.children) < CHILDREN)
    @rule()
    def fork(self) -> None:
        read, write = os.pipe()
        handle = self.loop.run_until_complete(afork(partial(obey, read)))
        os.close(read)
        child = Child(handle.pid, write)
        child.handle = handle
        self.children.append(child)
        self.settle()

    @rule(number=which_child, code=st.integers(0, 255))
    def exit(self, number: int, code: int) -> None:
        self.end(number, bytes([ord("x"), code]), code)

    @rule(number=which_child, deadly=st.sampled_from(DEADLY))
    def die(self, number: int, deadly: int) -> None:
        self.end(number, bytes([ord("s"), deadly]), -deadly)

    @rule(number=which_child)
    def kill(self, number: int) -> None:
        self.end(number, b"", -signal.SIGKILL)

    @rule(number=which_child, by=which_watcher, in_loop=st.booleans())
    def add_child_handler(self, number: int, by: int, in_loop: bool) -> None:
        child, watcher, observer = self.child(number), self.watchers[by], Observer()
        expected = self.why_not_add(child, watcher, in_loop)
        add = partial(watcher.add_child_handler, child.pid, observer.handle, child.pid)
        # While the loop runs, it may be reported to the others and reaped before this call.
        may_be_late = in_loop and child.returncode is not None and child.is_to_be_reaped()
        raised: type[Exception] | None = None
        try:
            if in_loop:
                self.loop.run_until_complete(call(add))
            else:
                add()
        except (RuntimeError, ProcessLookupError) as exc:
            raised = type(exc)
        assert raised is expected or (may_be_late and raised is ProcessLookupError)
        if raised is None:
            if watcher in child.handlers:
                self.replaced(child, watcher, observer)
            child.handlers[watcher] = observer
        if in_loop:
            self.settle()

    @rule(number=which_child, by=which_watcher)
    def remove_child_handler(self, number: int, by: int) -> None:
        child, watcher = self.child(number), self.watchers[by]
        observer = child.handlers.pop(watcher, None)
        assert watcher.remove_child_handler(child.pid) is (observer is not None)
        self.taken_back += [observer] if observer is not None else []

    @rule(number=which_child, reap=st.booleans())
    def wait(self, number: int, reap: bool) -> None:
        child, observer = self.child(number), Observer(reap=reap)
        may_be_late = child.returncode is not None and child.is_to_be_reaped()
        task = self.loop.create_task(wait(child.pid, reap=reap))
        task.add_done_callback(observer.take)
        self.loop.run_until_complete(asyncio.sleep(0))
        if task.done() and task.exception() is not None:
            assert isinstance(task.exception(), ProcessLookupError)
            assert child.reaped or may_be_late
        else:
            assert not child.reaped
            child.waits[task] = observer
        self.settle()

    @precondition(lambda self: any(child.waits for child in self.children))
    @rule(number=which_child, pick=st.integers(0, 5))
    def cancel(self, number: int, pick: int) -> None:
        waited_for = [child for child in self.children if child.waits]
        child = waited_for[number % len(waited_for)]
        task = list(child.waits)[pick % len(child.waits)]
        observer = child.waits.pop(task)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            self.loop.run_until_complete(task)
        assert task.cancelled()
        self.taken_back.append(observer)
        if child.returncode is not None and observer.reap and not child.is_to_be_reaped():
            child.reaped = not child.is_unreaped()  # both are right: the wait was cancelled at the moment of the exit
            if child.reaped:  # and was reported to those that peek
                self.check(child)
        self.settle()

    @rule(by=which_watcher)
    def close_watcher(self, by: int) -> None:
        watcher = self.watchers[by]
        self.drop_handlers(watcher, warns=watcher in self.attached, do=watcher.close)
        self.closed.add(watcher)
        self.attached.discard(watcher)

    @rule(by=which_watcher)
    def attach(self, by: int) -> None:
        watcher = self.watchers[by]
        watcher.attach_loop(self.loop)
        self.attached.add(watcher)
        self.closed.discard(watcher)

    @rule(by=which_watcher)
    def detach(self, by: int) -> None:
        watcher = self.watchers[by]
        if watcher in self.attached:
            self.drop_handlers(watcher, warns=True, do=partial(watcher.attach_loop, None))
            self.attached.discard(watcher)
        else:
            watcher.attach_loop(None)

    @rule()
    def run(self) -> None:
        self.settle()

    @invariant()
    def is_as_it_must_be(self) -> None:
        assert self.errors == []
        assert [observer.reported for observer in self.taken_back if observer.reported] == []
        for child in self.children:
            assert [observer.reported for observer in child.observers if observer.reported] == []
            assert child.is_unreaped() is not child.reaped

    def teardown(self) -> None:
        for number, child in enumerate(self.children):
            if child.returncode is None:
                self.kill(number)
        self.settle()
        self.is_as_it_must_be()
        for child in self.children:
            os.close(child.orders)
            if not child.reaped:  # no observer reaps it
                os.waitpid(child.pid, 0)
        for watcher in self.watchers:
            watcher.close()
        self.loop.close()
        assert (open_descriptors(), children()) == self.before

    # Helpers.

    def child(self, number: int) -> Child:
        """One of the children."""
        return self.children[number % len(self.children)]

    def end(self, number: int, order: bytes, returncode: int) -> None:
        """Have a child end, if it has not. It is not reported before the loop runs."""
        child = self.child(number)
        if child.returncode is None:
            if order:
                os.write(child.orders, order)
            else:
                os.kill(child.pid, signal.SIGKILL)
            await_zombie(child.pid)
            child.returncode = returncode

    def why_not_add(self, child: Child, watcher: PidfdWatcher, in_loop: bool) -> type[Exception] | None:
        """The exception that add_child_handler must raise."""
        if watcher in self.closed or not (in_loop or watcher in self.attached):
            return RuntimeError
        return ProcessLookupError if child.reaped else None

    def replaced(self, child: Child, watcher: PidfdWatcher, by: Observer) -> None:
        """Note a handler that another one replaced: at most one of them is called."""
        last = child.handlers[watcher]
        if not last.reported:
            self.taken_back.append(last)

    def drop_handlers(self, watcher: PidfdWatcher, *, warns: bool, do: Any) -> None:
        """Call what drops all handlers of a watcher."""
        dropped = [child.handlers.pop(watcher) for child in self.children if watcher in child.handlers]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            do()
        warned = [warning for warning in caught if warning.category is RuntimeWarning]  # not those of the garbage collector
        assert len(warned) == (warns and bool(dropped))
        self.taken_back += dropped

    def settle(self) -> None:
        """Run the loop until all expected calls are made, and check them."""
        for child in self.children:
            if child.returncode is not None and not child.reaped and (child.observers or child.handle is not None):
                child.reaped = child.is_to_be_reaped()
                self.check(child)
        self.loop.run_until_complete(turns())

    def check(self, child: Child) -> None:
        """Check that all observers of a child are called once, with the right returncode."""
        observers = child.observers
        deadline = time.monotonic() + PATIENCE_S
        while not all(observer.reported for observer in observers) or (child.handle and child.handle.returncode is None):
            assert time.monotonic() < deadline, f"{[observer.reported for observer in observers]} of {child.returncode}"
            self.loop.run_until_complete(asyncio.sleep(0.001))
        self.loop.run_until_complete(turns())
        assert [observer.reported for observer in observers] == [[child.returncode]] * len(observers)
        if child.handle is not None:
            assert child.handle.returncode == child.returncode
        child.handlers.clear()
        child.waits.clear()


async def turns() -> None:
    """Some rounds of the loop, in which a second call would be seen."""
    for _ in range(4):
        await asyncio.sleep(0)


async def call(function: Any) -> None:
    """Call the function in the loop."""
    function()


def test_watcher_does_what_the_model_does(loop_factory: LoopFactory, full: bool) -> None:
    class OnOneLoop(Machine):
        factory = staticmethod(loop_factory)

    run_state_machine_as_test(OnOneLoop, settings=SETTINGS if full else settings(SETTINGS, max_examples=40))
