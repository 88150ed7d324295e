"""The SIGCHLD handler: when it is installed and removed, its checks, and forked children."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import signal
import threading

import pytest

from aiopidfd import PidfdWatcher, afork, wait
from aiopidfd._backends import sigchld_backend
from aiopidfd._kernel.exit_status import ExitStatus
from aiopidfd._kernel.syscalls import describe_sigchld
from aiopidfd._watch.registries import registry_of

from ..conftest import LoopFactory, run_on
from ..helpers.children import Stranger, held, one_held
from ..helpers.sigchld import FOUND_BY_CHECK_S, Noted, is_in_front, no_checks, sigchld_at_default, watch, watch_one

__all__ = ["no_checks", "sigchld_at_default"]  # fixtures

BACKENDS = ["sigchld"]  # for conftest


async def test_handler_comes_with_the_first_child_and_goes_with_the_last() -> None:
    with held(2) as (one, two):
        first = await watch_one(one)
        assert describe_sigchld() == "ours"
        second = await watch_one(two)
        one.end(1)
        assert (await first).returncode == 1
        assert describe_sigchld() == "ours"
        two.end(2)
        assert (await second).returncode == 2
        assert describe_sigchld() == "SIG_DFL"


async def test_child_that_was_dead_before_it_was_watched_is_reported_without_a_check(no_checks: None) -> None:
    with one_held() as child:
        child.end_unreaped(3)
        assert (await asyncio.wait_for(wait(child.pid), 10)).returncode == 3


async def test_zombie_that_was_left_and_then_is_to_be_reaped_is_reported_without_a_check(no_checks: None) -> None:
    """The first observer leaves the zombie. The second one, added before the first is notified, reaps it."""
    registry, reported = registry_of(asyncio.get_running_loop()), asyncio.get_running_loop().create_future()
    with one_held() as child:
        child.end_unreaped(3)
        registry.observe(child.pid, "leaves it", lambda status: None, reap=False)
        registry.observe(child.pid, "reaps it", reported.set_result)
        assert (await asyncio.wait_for(reported, 10)).source == "reaped"


async def test_handler_goes_with_the_last_observer() -> None:
    with one_held() as child:
        watcher = PidfdWatcher()
        watcher.add_child_handler(child.pid, print)
        assert describe_sigchld() == "ours"
        watcher.remove_child_handler(child.pid)
        assert describe_sigchld() == "SIG_DFL"


async def test_handler_that_was_there_is_put_back() -> None:
    noted = Noted()
    signal.signal(signal.SIGCHLD, noted)
    before = describe_sigchld()
    with held(2) as (one, two):
        waiting = await watch_one(one)
        assert is_in_front()
        one.end(0)
        await waiting
        assert describe_sigchld() == before
        noted.called.clear()
        two.end(0)
        await noted.called.wait()


async def test_handler_of_somebody_who_replaced_ours_stays() -> None:
    with one_held() as child:
        watcher = PidfdWatcher()
        watcher.add_child_handler(child.pid, print)
        signal.signal(signal.SIGCHLD, Noted())
        replaced_by = describe_sigchld()
        watcher.remove_child_handler(child.pid)
        assert describe_sigchld() == replaced_by
        assert not is_in_front()


def test_two_loops_in_threads_share_the_handler(loop_factory: LoopFactory, no_checks: None) -> None:
    both_watch, seen = threading.Barrier(2), []

    async def main() -> None:
        with held(20) as children:
            tasks = await watch(*children)
            both_watch.wait(10)
            for number, child in enumerate(children):
                child.end(number)
            seen.append([status.returncode for status in await asyncio.gather(*tasks)])

    threads = [threading.Thread(target=run_on, args=(loop_factory, main())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [list(range(20))] * 2
    assert describe_sigchld() == "SIG_DFL"


# Checks that fail


async def test_checks_go_on_while_there_are_no_descriptors() -> None:
    """To read the state of a stranger takes a descriptor."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with one_held() as one, Stranger() as stranger:
        waiting = await watch_one(one)
        for_stranger = asyncio.ensure_future(wait(stranger.pid))
        await asyncio.sleep(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            await asyncio.sleep(FOUND_BY_CHECK_S)  # at least one check
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # so that only another check can find it
            one.end(3)
            status = await asyncio.wait_for(waiting, FOUND_BY_CHECK_S)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert (status.returncode, status.source) == (3, "reaped")
        assert not for_stranger.done()
        stranger.send("end")
        stranger.send("reap")
        status = await asyncio.wait_for(for_stranger, FOUND_BY_CHECK_S)
        assert (status.returncode, status.source) == (None, "not-child")


def test_interrupt_of_a_check_ends_no_checks(loop_factory: LoopFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt leaves run_forever(). When the loop runs again, the checks continue."""
    check = sigchld_backend.SigchldBackend.check

    def interrupted(self: sigchld_backend.SigchldBackend) -> None:
        monkeypatch.setattr(sigchld_backend.SigchldBackend, "check", check)
        raise KeyboardInterrupt

    async def main() -> ExitStatus:
        return await asyncio.wait_for(waiting, FOUND_BY_CHECK_S)

    loop = loop_factory()
    with one_held() as one:
        waiting = loop.run_until_complete(watch_one(one))
        monkeypatch.setattr(sigchld_backend.SigchldBackend, "check", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(asyncio.sleep(FOUND_BY_CHECK_S))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        one.end(3)
        assert loop.run_until_complete(main()).returncode == 3
    loop.close()


# Forked children


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # uvloop has a worker of io_uring sometimes
async def test_forked_child_has_the_handler_from_before_and_does_not_wake_its_parent(no_checks: None) -> None:
    loop = asyncio.get_running_loop()
    with one_held() as child:
        waiting = await watch_one(child)
        reaper = select.poll()
        reaper.register(registry_of(loop)._reaper.fd, select.POLLIN)
        done_read, done_write = os.pipe()
        go_read, go_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                grandchild = os.fork()
                if grandchild == 0:
                    os._exit(0)
                os.waitpid(grandchild, 0)  # its exit has sent this child a SIGCHLD
                os.write(done_write, describe_sigchld().encode())
                os.close(go_write)
                os.read(go_read, 1)
                code = 0
            finally:
                os._exit(code)
        assert os.read(done_read, 100) == b"SIG_DFL"
        assert reaper.poll(0) == []
        assert is_in_front()
        os.close(go_write)
        assert (await wait(pid)).returncode == 0
        for fd in (done_read, done_write, go_read):
            os.close(fd)
        child.end(1)
        assert (await waiting).returncode == 1


async def test_aforked_child_watches_children_of_its_own() -> None:
    """The child has a handler and a list of names of its own, not those of its parent."""

    def live() -> int:
        if describe_sigchld() != "SIG_DFL":
            return 1

        async def main() -> int:
            child = await afork(lambda: 42)
            return await child.wait()

        return asyncio.run(main())

    with one_held() as other:
        waiting = await watch_one(other)
        child = await afork(live)
        assert await child.wait() == 42
        other.end(0)
        await waiting
