"""What a forked child knows of its parent: whether it lives, and nothing of the loop that it has set."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aiopidfd import afork, wait
from aiopidfd._fork import child as child_life
from aiopidfd._kernel import syscalls

from ..helpers.workers import fork_server, wait_for_signal


async def _end_of_orphan(middle: Callable[[int], None], expected: int) -> bool:
    """Run `middle` in a child that dies of `expected`, and return whether the child whose pid it writes dies by SIGTERM."""
    read, write = os.pipe()
    child = await afork(partial(middle, write))
    os.close(write)
    assert await child.wait() == expected
    pid = int(os.read(read, 20))
    with contextlib.suppress(ProcessLookupError):  # it may be gone before we can look
        if select.select([read], [], [], 10)[0]:  # by the end of its copy
            assert (await wait(pid)).returncode in (-signal.SIGTERM, None)
        else:
            os.kill(pid, signal.SIGKILL)
            return False
    os.close(read)
    return True


async def test_child_gets_pdeathsig_when_its_parent_dies() -> None:
    def middle(write: int) -> None:
        async def main() -> None:
            child = await afork(wait_for_signal, pdeathsig=signal.SIGTERM)
            child.detach()
            os.write(write, b"%d\n" % child.pid)

        asyncio.run(main())

    assert await _end_of_orphan(middle, 0)


def _outlive_parent(monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    """Have the next child's parent die between the fork and prctl(PR_SET_PDEATHSIG)."""
    set_pdeathsig, parent = syscalls.set_pdeathsig, os.getpid()

    def set_late(*args: Any) -> Any:
        os.write(write, b"%d\n" % os.getpid())
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            os.sched_yield()
        return set_pdeathsig(*args)

    monkeypatch.setattr(child_life, "set_pdeathsig", set_late)


async def test_pdeathsig_of_a_parent_that_has_died_since_the_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    def middle(write: int) -> None:
        _outlive_parent(monkeypatch, write)
        asyncio.run(afork(wait_for_signal, pdeathsig=signal.SIGTERM))

    assert await _end_of_orphan(middle, -signal.SIGKILL)


async def test_pdeathsig_of_a_parent_that_has_died_since_its_fork_server_forked(
    monkeypatch: pytest.MonkeyPatch, pidfds: None
) -> None:
    def middle(write: int) -> None:
        async def main() -> None:
            _outlive_parent(monkeypatch, write)
            async with fork_server() as server:
                await server.afork(wait_for_signal, pdeathsig=signal.SIGTERM, pass_fds=[write])

        asyncio.run(main())

    assert await _end_of_orphan(middle, -signal.SIGKILL)


_NAMESPACE = """
import aiopidfd, ctypes, os, signal, sys, time
if ctypes.CDLL(None).unshare(0x20000000):  # CLONE_NEWPID: of the children
    sys.exit(77)
if (init := os.fork()) == 0:
    time.sleep(60)
async def main():
    child = await aiopidfd.afork(lambda: 7, pdeathsig=signal.SIGTERM)
    assert await child.wait() == 7
    child = await aiopidfd.afork(lambda: 0 if os.getppid() == 0 and time.sleep(60) else 1, pdeathsig=signal.SIGTERM)
    await child.stop()
    assert child.returncode == -signal.SIGTERM
try:
    aiopidfd.run(main())
finally:
    os.kill(init, 9)
"""


def test_pdeathsig_in_a_new_pid_namespace() -> None:
    """There the parent's number is 0."""
    ended = subprocess.run([sys.executable, "-c", _NAMESPACE], check=False)
    if ended.returncode == 77:
        pytest.skip("a PID namespace cannot be made here; it takes root")
    assert ended.returncode == 0


_WATCHED = """
import asyncio, signal, sys, aiopidfd
make_policy, make_watcher = sys.argv[1:]
asyncio.set_event_loop_policy(eval(make_policy)())
watcher = eval(make_watcher)()
asyncio.set_child_watcher(watcher)

async def run(code):
    return await (await asyncio.create_subprocess_exec("sh", "-c", f"exit {code}")).wait()

def child():
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1
    assert asyncio.get_event_loop_policy()._local._loop is None
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    code = loop.run_until_complete(asyncio.wait_for(run(5), 20))
    asyncio.set_event_loop(None)
    loop.close()
    return code

async def main():
    pending = await asyncio.create_subprocess_exec("sleep", "60")
    handler = signal.getsignal(signal.SIGCHLD)
    forked = await aiopidfd.afork(child)
    code = await asyncio.wait_for(forked.wait(), 30)
    assert signal.getsignal(signal.SIGCHLD) == handler
    pending.kill()
    assert await asyncio.wait_for(pending.wait(), 20) == -9  # the parent's still works
    return code

code = asyncio.run(main())
watcher.close()
sys.exit(code)
"""

_POLICIES = ["asyncio.DefaultEventLoopPolicy", "lambda: aiopidfd.EventLoopPolicy(asyncio.SelectorEventLoop)"]
_WATCHERS = [
    *("asyncio.ThreadedChildWatcher", "asyncio.SafeChildWatcher", "asyncio.FastChildWatcher"),
    *("asyncio.MultiLoopChildWatcher", "asyncio.PidfdChildWatcher", "aiopidfd.PidfdWatcher"),
]


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python 3.14 has no child watchers")
@pytest.mark.parametrize("policy", _POLICIES)
@pytest.mark.parametrize("watcher", _WATCHERS)
def test_child_warns_of_nothing_beside_a_watcher_with_pending_handlers(policy: str, watcher: str, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    with errors.open("w") as out:
        ended = subprocess.run(
            # Python 3.12 and 3.13 warn of every use of a watcher, and before of a fork beside asyncio's threads.
            [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", _WATCHED, policy, watcher],
            check=False,
            stderr=out,
            timeout=60,
        )
    assert (ended.returncode, errors.read_text(encoding="utf-8")) == (5, "")


class _Policy:
    """A policy of a program's own, which cannot be without a loop."""

    def set_event_loop(self, loop: object) -> None:
        raise RuntimeError("no loop")


async def test_policy_that_fails_is_printed_and_the_child_runs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:  # pytest-asyncio has the policy forget the loop afterwards
        patched.setattr(asyncio.events, "_event_loop_policy", _Policy())
        child = await afork(lambda: 4)
        assert await child.wait() == 4
    assert "RuntimeError: no loop" in capfd.readouterr().err
