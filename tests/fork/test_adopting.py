"""Adopting a child by its pidfd: is it one, and of that child? Asked of the kernel, of /proc, or of waitid()."""

from __future__ import annotations

import errno
import os

import pytest

from aiopidfd import PidfdChildProcess
from aiopidfd._backends.backend import probe_pidfd
from aiopidfd._kernel import proc, syscalls
from aiopidfd._kernel.syscalls import open_pidfd

from ..helpers.children import held, one_held

BACKENDS = ["pidfd"]  # for conftest

pytestmark = pytest.mark.skipif(probe_pidfd() is not None, reason="pidfds are forbidden here")


class OlderKernel:
    """Linux before 6.13, as far as it is asked here."""

    @staticmethod
    def ap_pidfd_get_pid(pidfd: int) -> int:
        """Say that there is no such call."""
        return -errno.ENOTTY


@pytest.fixture(params=["by the kernel", "by /proc", "by waitid"])
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How it is known here whose pidfd it is."""
    if request.param != "by the kernel":
        get_pid = syscalls.get_pid

        def get_pid_as_before(pidfd: int) -> int | None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(syscalls, "lib", OlderKernel)
                return get_pid(pidfd)

        monkeypatch.setattr(syscalls, "get_pid", get_pid_as_before)
    if request.param == "by waitid":
        monkeypatch.setattr(proc, "read_pid", lambda pidfd: None)
    return str(request.param)


async def test_child_is_adopted(known: str) -> None:
    with one_held() as one:
        child = PidfdChildProcess(one.pid, open_pidfd(one.pid))
        one.end(3)
        assert await child.wait() == 3


async def test_child_that_has_ended_is_adopted(known: str) -> None:
    with one_held() as one:
        one.end_unreaped(4)
        assert await PidfdChildProcess(one.pid, open_pidfd(one.pid)).wait() == 4


@pytest.mark.parametrize("number", [-1, 999, 0x7FFFFFFF])
async def test_descriptor_that_is_not_open_is_ebadf(known: str, number: int) -> None:
    with one_held() as one:
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)) as raised:
            PidfdChildProcess(one.pid, number)
        assert raised.value.errno == errno.EBADF
        one.end_unreaped(0)


async def test_descriptor_that_is_no_pidfd_is_refused(known: str) -> None:
    with one_held() as one, open(os.devnull, "rb") as null:
        with pytest.raises(ValueError, match="not a pidfd of process"):
            PidfdChildProcess(one.pid, null.fileno())
        one.end_unreaped(0)


async def test_pidfd_of_another_child_is_refused_where_that_can_be_known(known: str) -> None:
    with held(2) as (one, two):
        two.end_unreaped(0)  # then waitid tells, too
        pidfd = open_pidfd(two.pid)
        with pytest.raises(ValueError, match="not a pidfd of process"):
            PidfdChildProcess(one.pid, pidfd)
        os.close(pidfd)
        one.end_unreaped(0)


async def test_pidfd_of_a_child_that_was_reaped_is_refused(known: str) -> None:
    with one_held() as one:
        pidfd = open_pidfd(one.pid)
        one.end_unreaped(0)
        os.waitpid(one.pid, 0)
        with pytest.raises((ValueError, ChildProcessError)):
            PidfdChildProcess(one.pid, pidfd)
        os.close(pidfd)
