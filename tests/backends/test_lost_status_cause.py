"""The warning of a lost status names what has reaped the child."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from aiopidfd._backends import lost_status, sigchld_backend
from aiopidfd._kernel import syscalls
from aiopidfd._kernel.syscalls import describe_sigchld

from ..helpers.children import held
from ..helpers.sigchld import (
    check_now,
    discard,
    handle_in_c_and_discard,
    handlers,
    ignore,
    no_checks,
    sigchld_at_default,
    watch,
)

__all__ = ["handlers", "no_checks", "sigchld_at_default"]  # fixtures

BACKENDS = ["sigchld"]  # for conftest


@pytest.mark.parametrize(
    ("present", "recent", "expected"),
    [
        ("SIG_IGN", "", "SIGCHLD is ignored"),
        ("a handler in /x/lib.so with SA_NOCLDWAIT", "", "SIGCHLD is set with SA_NOCLDWAIT"),
        ("a handler in /x/lib.so", "SIG_IGN", "SIGCHLD is ignored, or was a moment ago"),
        (
            "ours, and behind it a handler in /x/lib.so",
            "SIG_DFL with SA_NOCLDWAIT",
            "SIGCHLD is set with SA_NOCLDWAIT, or was",
        ),
        ("ours, and behind it SIG_IGN", "a handler in /x/lib.so", "SIGCHLD was ignored before aiopidfd"),
        ("ours, and behind it a handler in /x/lib.so with SA_NOCLDWAIT", "", "SIGCHLD was set with SA_NOCLDWAIT before"),
        ("ours, and behind it a handler in /x/lib.so", "", "the SIGCHLD handler in /x/lib.so"),
        ("ours", "a handler in /x/lib.so", "the SIGCHLD handler in /x/lib.so"),
        ("ours", "", "another thread"),
    ],
)
def test_warning_of_a_lost_status_looks_everywhere_for_what_has_the_kernel_reap(
    present: str, recent: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syscalls, "describe_sigchld", lambda: present)
    monkeypatch.setattr(sigchld_backend, "recent_replacement", lambda: recent)
    assert lost_status.find_likely_cause().startswith(expected)


@pytest.mark.parametrize("set_up", [ignore, discard, handle_in_c_and_discard])
async def test_what_had_the_kernel_reap_is_found_behind_ours(
    no_checks: None, handlers: Any, set_up: Callable[[Any], None]
) -> None:
    with held(2) as (one, two):
        tasks = await watch(one)
        set_up(handlers)
        one.end(1)
        with pytest.raises(ChildProcessError):
            os.waitpid(one.pid, 0)  # the kernel has reaped it
        tasks += await watch(two)  # installs our handler again
        assert describe_sigchld().startswith("ours")
        assert "so that the kernel reaps children itself" in lost_status.find_likely_cause()
        sigchld_backend._replaced = (0.0, "")  # as if it was long ago
        assert "before aiopidfd handled it" in lost_status.find_likely_cause()
        check_now()
        assert (await tasks[0]).source == "lost"
        two.end(2)
        assert (await tasks[1]).returncode == 2


def test_harmless_handler_is_not_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler of libuv reaps its own children only."""
    action = "ours, and behind it a handler in /x/site-packages/uvloop/loop.so"
    monkeypatch.setattr(syscalls, "describe_sigchld", lambda: action)
    assert "another thread" in lost_status.find_likely_cause()
