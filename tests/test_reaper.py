"""The reaper by itself: what it holds, what it tells, and what a process that we forked can do to it."""

from __future__ import annotations

import ctypes
import os
import select
from collections.abc import Iterator

import pytest

from aiopidfd import _reaper

from .children import one_held
from .conftest import BACKENDS

pytestmark = pytest.mark.skipif("pidfd" not in BACKENDS, reason="pidfds are forbidden here")


@pytest.fixture
def reaper() -> Iterator[_reaper.Reaper]:
    opened = _reaper.Reaper()
    yield opened
    opened.release()
    opened.close()


def is_readable(reaper: _reaper.Reaper) -> bool:
    poll = select.poll()
    poll.register(reaper.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def fork_without_hooks(reader: int) -> int:
    """Fork as a C library does: no Python hook closes what the child has inherited. It ends when it can read."""
    pid = int(ctypes.PyDLL(None).fork())
    if pid == 0:
        os.read(reader, 1)
        os._exit(0)
    return pid


def test_end_is_told_once_although_a_forked_process_holds_a_copy(reaper: _reaper.Reaper) -> None:
    """Its interest outlives the close in the parent, out of reach; it must not fire, then or ever."""
    reader, writer = os.pipe()
    with one_held() as child:
        pidfd = reaper.add(child.pid, 0)
        holder = fork_without_hooks(reader)
        try:
            child.end_unreaped(7)
            assert [record[:4] for record in reaper.reap()[1]] == [(child.pid, pidfd, 7 << 8, _reaper.SOURCE_REAPED)]
            reaper.release()
            assert os.path.exists(f"/proc/{holder}/fd/{pidfd}")
            assert not is_readable(reaper)
            with one_held() as second:  # whose pidfd has the same number
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


def test_wake_descriptor_tells_each_time_even_after_it_was_modified(reaper: _reaper.Reaper) -> None:
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
            reaper.modify(0, reader, 0)  # tells at once what is there to read, as the SIGCHLD backend wants it
            assert is_readable(reaper)
            reaper.reap()
            reaper.clear_woken()
    finally:
        os.close(reader)
        os.close(writer)
