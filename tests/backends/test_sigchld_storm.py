"""A storm of signals without exits: the SIGCHLD handler pauses, and no child is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from aiopidfd import PidfdWatcher
from aiopidfd._backends import sigchld_backend
from aiopidfd._kernel import syscalls
from aiopidfd._kernel.syscalls import describe_sigchld

from ..conftest import LoopFactory, children, run_on
from ..helpers.children import Held, held, one_held
from ..helpers.sigchld import (
    check_now,
    discard,
    drain,
    handle_in_c_and_discard,
    handlers,
    ignore,
    no_checks,
    sigchld_at_default,
    watch,
)

__all__ = ["handlers", "no_checks", "sigchld_at_default"]  # fixtures

BACKENDS = ["sigchld"]  # for conftest

# More signals than the handler accepts between two checks.
STORM = 1001


def handle_in_python(handlers: Any) -> None:
    signal.signal(signal.SIGCHLD, lambda number, frame: None)


BEFORE = pytest.mark.parametrize("set_up", [lambda _: None, ignore, discard, handle_in_python, handle_in_c_and_discard])


def storm() -> None:
    """Send more signals than the handler accepts."""
    for _ in range(STORM):
        os.kill(os.getpid(), signal.SIGCHLD)


@BEFORE
async def test_storm_has_the_handler_pause_until_the_check(
    no_checks: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    handlers: Any,
    set_up: Callable[[Any], None],
) -> None:
    monkeypatch.setattr(sigchld_backend, "_warned_of_storm", False)
    set_up(handlers)
    before = describe_sigchld()
    with held(3) as (one, two, three):
        tasks = await watch(one, two)
        ours = describe_sigchld()
        storm()
        assert not describe_sigchld().startswith(("ours", "SIG_IGN"))
        assert syscalls.NOCLDWAIT not in describe_sigchld()
        tasks += await watch(three)  # a further child does not end the pause
        assert not describe_sigchld().startswith("ours")
        one.end_unreaped(1)
        await drain()
        assert not tasks[0].done()
        check_now()
        assert describe_sigchld() == ours
        status = await tasks[0]
        assert (status.returncode, status.source) == (1, "reaped")
        two.end_unreaped(2)
        await drain()
        assert tasks[1].result().returncode == 2
        storm()
        assert not describe_sigchld().startswith("ours")
        check_now()
        three.end(3)
        assert (await tasks[2]).returncode == 3
    assert describe_sigchld() == before
    messages = [record.getMessage() for record in caplog.records if "very often" in record.getMessage()]
    assert len(messages) == 1


@BEFORE
async def test_last_child_that_ends_in_a_pause_leaves_what_was_there_before(
    no_checks: None, handlers: Any, set_up: Callable[[Any], None]
) -> None:
    set_up(handlers)
    before = describe_sigchld()
    with one_held() as child:
        watcher = PidfdWatcher()
        watcher.add_child_handler(child.pid, print)
        storm()
        watcher.remove_child_handler(child.pid)
        assert describe_sigchld() == before
        (task,) = await watch(child)
        assert describe_sigchld().startswith("ours")
        child.end(3)
        assert (await task).returncode == 3


async def test_handler_that_comes_in_a_pause_is_called_from_behind_ours(no_checks: None, handlers: Any) -> None:
    with one_held() as child:
        (task,) = await watch(child)
        storm()
        handlers.install_handler(2)
        check_now()
        assert describe_sigchld().startswith("ours")
        calls = handlers.count_calls(2)
        child.end(3)
        assert (await task).returncode == 3
        assert handlers.count_calls(2) == calls + 1


def test_child_that_outlives_its_loop_in_a_pause_is_reaped(loop_factory: LoopFactory, no_checks: None) -> None:
    async def main(child: Held) -> None:
        PidfdWatcher().add_child_handler(child.pid, print)
        storm()

    with one_held() as child:
        run_on(loop_factory, main(child))
        child.end(0)
        while child.pid in children():  # only the handler can reap it
            pass
    sigchld_backend.settle_abandoned()
    assert describe_sigchld() == "SIG_DFL"


async def test_fewer_signals_than_a_storm_leave_the_handler_where_it_is(no_checks: None) -> None:
    with one_held() as child:
        (task,) = await watch(child)
        for _ in range(3):
            for _ in range(STORM - 1):
                os.kill(os.getpid(), signal.SIGCHLD)
            assert describe_sigchld() == "ours"
            check_now()
        child.end(1)
        assert (await task).returncode == 1
