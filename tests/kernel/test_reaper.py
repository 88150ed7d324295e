"""The reaper alone: its pidfds, its records, and what a forked process can do to it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
from collections.abc import Iterator

import pytest

from aiopidfd._ext import lib
from aiopidfd._kernel import syscalls
from aiopidfd._kernel.reaper import SOURCE_REAPED, Reaper

from ..conftest import BACKENDS, open_descriptors
from ..helpers.children import held, one_held, state_of, traced
from ..helpers.seccomp import python_under_filter

pytestmark = [pytest.mark.core, pytest.mark.skipif("pidfd" not in BACKENDS, reason="pidfds are forbidden here")]


@pytest.fixture
def reaper() -> Iterator[Reaper]:
    opened = Reaper()
    yield opened
    opened.release()
    opened.close()


def is_readable(reaper: Reaper) -> bool:
    poll = select.poll()
    poll.register(reaper.fd, select.POLLIN)
    return bool(poll.poll(0))


def fork_without_hooks(reader: int) -> int:
    """Fork as a C library does: no Python hook closes the inherited descriptors. The child exits when it can read."""
    pid = int(ctypes.PyDLL(None).fork())
    if pid == 0:
        os.read(reader, 1)
        os._exit(0)
    return pid


def test_exit_is_reported_once_although_a_forked_process_has_a_copy(reaper: Reaper) -> None:
    """The epoll entry outlives the close in the parent, which cannot remove it any more. It must never become ready."""
    reader, writer = os.pipe()
    with one_held() as child:
        pidfd = reaper.add(child.pid, 0)
        holder = fork_without_hooks(reader)
        try:
            child.end_unreaped(7)
            assert [record[:4] for record in reaper.reap()[1]] == [(child.pid, pidfd, 7 << 8, SOURCE_REAPED)]
            reaper.release()
            assert os.path.exists(f"/proc/{holder}/fd/{pidfd}")
            assert not is_readable(reaper)
            with one_held() as second:  # its pidfd has the same number
                assert reaper.add(second.pid, 0) == pidfd
                second.end_unreaped(8)
                assert [record[:3] for record in reaper.reap()[1]] == [(second.pid, pidfd, 8 << 8)]
                reaper.release()
        finally:
            os.write(writer, b"x")
            os.waitpid(holder, 0)
            os.close(reader)
            os.close(writer)
        assert not is_readable(reaper)
        assert list(reaper.reap()[1]) == []


def test_removed_process_is_not_reported_although_a_forked_process_holds_a_copy(reaper: Reaper) -> None:
    """A pidfd that was only closed would still report the exit, under a number that may be another file's."""
    reader, writer = os.pipe()
    with one_held() as child:
        pidfd = reaper.add(child.pid, 0)
        holder = fork_without_hooks(reader)
        try:
            reaper.remove(pidfd)
            assert os.path.exists(f"/proc/{holder}/fd/{pidfd}")
            child.end_unreaped(7)
            assert not is_readable(reaper)
            assert list(reaper.reap()[1]) == []
        finally:
            os.write(writer, b"x")
            os.waitpid(holder, 0)
            os.close(reader)
            os.close(writer)


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    """Have signals interrupt any wait in this thread. Code that never waits does not notice them."""
    done, thread = threading.Event(), threading.get_ident()

    def interrupt() -> None:
        while not done.wait(0.05):
            signal.pthread_kill(thread, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        yield
    finally:
        done.set()
        interrupter.join()
        signal.signal(signal.SIGUSR1, before)


def test_reaper_never_waits_for_a_zombie_that_its_tracer_holds(reaper: Reaper) -> None:
    with one_held() as child, traced(child.pid) as tracer:
        pidfd = reaper.add(child.pid, 0)
        child.end(14)
        while state_of(child.pid) != "Z":
            os.sched_yield()
        with interrupted():
            assert list(reaper.reap()[1]) == []
            assert is_readable(reaper)  # a second time: a change would be seen
            assert list(reaper.reap()[1]) == []
        assert not is_readable(reaper)
        tracer.release()
        poll = select.poll()
        poll.register(reaper.fd, select.POLLIN)
        assert poll.poll(10_000) != []
        assert [record[:3] for record in reaper.reap()[1]] == [(child.pid, pidfd, 14 << 8)]


def test_forked_child_keeps_a_descriptor_that_has_the_number_of_one_of_ours(reaper: Reaper) -> None:
    ends = lib.ap_reaper_open_gate(reaper.fd, 1)
    ours, childs = ends >> 32, ends & 0xFFFFFFFF
    os.close(childs)
    syscalls.close_tracked_fd(ours)
    os.dup2(0, ours)  # another file has this number now
    pid = os.fork()
    if pid == 0:
        try:
            syscalls.after_fork_in_child()
            os.fstat(ours)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(ours)
    assert os.waitpid(pid, 0)[1] == 0


def test_wake_descriptor_wakes_each_time_even_after_it_was_modified(reaper: Reaper) -> None:
    reader, writer = os.pipe()
    try:
        reaper.add_wake(reader)
        for _ in range(2):
            for _ in range(2):
                os.write(writer, b"x")
                assert list(reaper.reap()[1]) == []
                assert reaper.woken
                reaper.clear_woken()
                assert not is_readable(reaper)
            reaper.modify(0, reader, 0)  # readable at once, as the SIGCHLD backend needs it
            assert is_readable(reaper)
            reaper.reap()
            reaper.clear_woken()
    finally:
        os.close(reader)
        os.close(writer)


def test_release_closes_all_of_a_batch_and_nothing_in_between(reaper: Reaper) -> None:
    before = open_descriptors()
    others = []
    with held(7) as all_of_them:
        pidfds = []
        for number, child in enumerate(all_of_them):
            pidfds.append(reaper.add(child.pid, 0))
            if number in (1, 4):  # so that groups of two, three and two are consecutive
                others.append(os.dup(0))
        for number in (6, 0, 3, 2, 5, 1, 4):  # not in the order of their descriptors
            all_of_them[number].end_unreaped(0)
        assert [record[1] for record in reaper.reap()[1]] != sorted(pidfds)
        reaper.keep_open(pidfds[2])
        reaper.release()
        with_pipes = open_descriptors()
        assert not {*pidfds} - {pidfds[2]} & {*with_pipes}
        assert {*others, pidfds[2]} <= {*with_pipes}
        syscalls.close_tracked_fd(pidfds[2])
    for fd in others:
        os.close(fd)
    assert open_descriptors() == before


_RELEASE = """
import os
from aiopidfd._kernel import syscalls
from aiopidfd._kernel.reaper import Reaper, SOURCE_REAPED
os.register_at_fork(after_in_child=syscalls.after_fork_in_child)
reaper = Reaper()
pids = [os.posix_spawn("/bin/true", ["true"], {}) for _ in range(4)]
pidfds = [reaper.add(pid, 0) for pid in pids]
for pid in pids:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
assert reaper.reap()[0] == 4
reaper.release()
# Other files get these numbers now. A forked child keeps its copies of them.
assert [os.dup(0) for _ in pidfds] == pidfds
pid = os.fork()
if pid == 0:
    for fd in pidfds:
        os.close(fd)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.parametrize("rules", ["io_uring_setup", "close_range", "close_range=EPERM"])
def test_release_does_without_close_range(rules: str) -> None:
    """On Linux before 5.9, and under a filter. The first rule refuses a call that we do not use."""
    assert python_under_filter(rules, _RELEASE) == "0\n"
