"""What our code claims about Linux, and since which version: each claim is tried on the kernel that runs."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import aiopidfd
from aiopidfd import wait

from ..helpers.children import held
from . import answers

BACKENDS = ["pidfd"]  # for conftest: the SIGCHLD backend does not need any of this


def version_of(release: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", release)
    assert found is not None, release
    return int(found[1]), int(found[2])


RUNNING = version_of(os.uname().release)


def is_filtered() -> bool:
    """Whether a seccomp filter may answer for the kernel, as it does in most containers."""
    with open("/proc/self/status", encoding="ascii") as status:
        return "Seccomp:\t0" not in status.read()


pytestmark = pytest.mark.skipif(is_filtered(), reason="a seccomp filter may answer for the kernel")

ALWAYS = (0, 0)


def since(major: int, minor: int, *, before: str, then: str = "yes") -> dict[tuple[int, int], str]:
    return {ALWAYS: before, (major, minor): then}


CLAIMS: dict[str, tuple[Callable[[], str], dict[tuple[int, int], str]]] = {
    "pidfd_send_signal": (answers.signals_by_pidfd, since(5, 1, before="ENOSYS")),
    "clone(CLONE_PIDFD)": (answers.clones_with_pidfd, since(5, 2, before="ENOSYS")),
    "pidfd_open": (answers.opens_pidfd, since(5, 3, before="ENOSYS")),
    "clone3": (answers.clones_by_clone3, since(5, 3, before="ENOSYS")),
    "waitid(P_PIDFD)": (answers.waits_by_pidfd, since(5, 4, before="EINVAL")),
    "CLONE_CLEAR_SIGHAND": (answers.clears_handlers, since(5, 5, before="EINVAL")),
    "close_range": (answers.closes_range, since(5, 9, before="ENOSYS")),
    "worker of io_uring": (
        answers.lists_worker_of_io_uring,
        # 5.10.162 has the io_uring of 5.15.
        {ALWAYS: "not listed", (5, 10): "listed", (5, 11): "not listed", (5, 12): "listed"},
    ),
    "polled: running, zombie, again, reaped": (
        answers.polls_zombie,
        {(5, 3): "- IN - -", (6, 9): "- IN - IN|HUP"},
    ),
    "PIDFD_SIGNAL_PROCESS_GROUP": (answers.signals_group, since(6, 9, before="EINVAL")),
    "PIDFD_INFO_EXIT of reaped": (
        answers.reports_exit,
        {ALWAYS: "ENOTTY", (6, 11): "EINVAL", (6, 13): "ESRCH", (6, 15): "yes"},
    ),
    "PIDFD_INFO_EXIT of zombie": (
        answers.reports_exit_of_zombie,
        {ALWAYS: "ENOTTY", (6, 11): "EINVAL", (6, 13): "not yet"},
    ),
    "child without exit signal": (answers.keeps_child_without_signal, {ALWAYS: "kept"}),
    "exit signal of CLONE_PARENT": (answers.sibling_has_signal_of_its_maker, {ALWAYS: "none"}),
    "calls on a reaped process": (answers.pidfd_of_reaped, {ALWAYS: "ESRCH"}),
    "waitid on a traced zombie": (answers.traced_child_is_hidden, {ALWAYS: "nothing"}),
    "size of /proc/self/fd": (answers.counts_descriptors, since(6, 2, before="0", then="how many are open")),
    "epoll after fork": (answers.epoll_is_shared_after_fork, {ALWAYS: "its parent's too"}),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_running_kernel_does_what_is_claimed_of_its_version(claim: str) -> None:
    check, by_version = CLAIMS[claim]
    expected = by_version[max(version for version in by_version if version <= RUNNING)]
    said = check()
    print(f"{claim}: {said}")
    assert said == expected


def test_every_version_that_the_sources_name_is_claimed_here() -> None:
    folders = [Path(aiopidfd.__file__).parent, Path(__file__).parents[2] / "cffi_build"]
    named: dict[tuple[int, int], str] = {}
    for path in [path for folder in folders for path in folder.rglob("*.[pch]*") if path.suffix in (".py", ".c", ".h")]:
        for release in re.findall(r"Linux (?:before )?(\d+\.\d+)", path.read_text(encoding="utf-8")):
            named[version_of(release)] = path.name
    claimed = {version for _, by_version in CLAIMS.values() for version in by_version}
    assert named
    assert {version: name for version, name in named.items() if version not in claimed} == {}


async def test_status_that_others_took_is_recovered_since_6_15_and_lost_before(caplog: pytest.LogCaptureFixture) -> None:
    with held(20) as children:
        waits = [asyncio.ensure_future(wait(child.pid)) for child in children]
        await asyncio.sleep(0)
        for code, child in enumerate(children):
            child.end_unreaped(code)
            os.waitpid(child.pid, 0)
        statuses = await asyncio.gather(*waits)
    reported = [(status.returncode, status.source) for status in statuses]
    warned = [record.getMessage().partition(":")[0] for record in caplog.records if record.levelno >= logging.WARNING]
    if RUNNING >= (6, 15):
        assert reported == [(code, "recovered") for code in range(20)]
        assert warned == []
    else:
        assert reported == [(255, "lost")] * 20
        assert sorted(warned) == sorted(f"child process pid {child.pid}" for child in children)
