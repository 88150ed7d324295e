"""Where pidfds are forbidden: the backend, what is logged, and that everything works."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aiopidfd import PidfdWatcher, wait
from aiopidfd._backends.backend import ENVIRONMENT, probe_pidfd

from ..conftest import LoopFactory, open_descriptors, run_on
from ..helpers.children import one_held
from ..helpers.seccomp import NESTED, NO_PIDFDS, installing, python_under_filter, under_filter

BACKENDS = ["sigchld"]  # for conftest: each test chooses by itself

CORE = [
    *("loops/test_watcher.py", "loops/test_watcher_errors.py", "loops/test_watcher_loops.py", "loops/test_wait.py"),
    *("fork/test_fork.py", "fork/test_process.py", "fork/test_child.py"),
]

# If the suite runs under a filter already, a second filter tests nothing else.
pytestmark = pytest.mark.skipif(NESTED in os.environ, reason="runs under a filter already")
needs_pidfds = pytest.mark.skipif(probe_pidfd() is not None, reason="pidfds are forbidden here")

PRELUDE = """
import asyncio, errno, logging, os, signal, sys
from aiopidfd import PidfdWatcher, afork, wait

def lines():
    return [record.getMessage() for record in kept if record.levelno == logging.INFO]

class Keep(logging.Handler):
    def emit(self, record):
        kept.append(record)

kept = []
logging.getLogger("aiopidfd").setLevel(logging.INFO)
logging.getLogger("aiopidfd").addHandler(Keep())

def spawn(code):
    read, write = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, read, 0)]
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", f"read x; exit {code}"], {}, file_actions=actions)
    os.close(read)
    return pid, write
"""

# Watches two children, one after the other. Prints their statuses and the log.
WATCH = """
async def main():
    for code in (3, 4):
        pid, write = spawn(code)
        waiting = asyncio.ensure_future(wait(pid))
        await asyncio.sleep(0)
        os.close(write)
        status = await waiting
        print(status.returncode, status.source)
    child = await afork(lambda: 5)
    print(type(child).__name__, await child.wait())
    for line in lines():
        print(line)

asyncio.run(main())
"""


@pytest.mark.parametrize("answer", ["ENOSYS", pytest.param("EPERM", marks=pytest.mark.long)])
def test_core_of_the_suite_passes_without_pidfds(answer: str, full: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in (ENVIRONMENT, "PYTEST_ADDOPTS")}
    tests = Path(__file__).parents[1]
    # No watchdog: it is a thread, and afork warns of threads. The call has a timeout.
    options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=0"]
    command = [sys.executable, "-m", "pytest", *options, *(f"{tests.name}/{name}" for name in (CORE if full else CORE[1:4]))]
    result = under_filter(NO_PIDFDS[answer], command, env=environment, cwd=tests.parent, timeout=540)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr
    assert " passed" in result.stdout


@pytest.mark.skipif(probe_pidfd() is not None, reason="a filter over a filter: the outer one answers first")
@pytest.mark.parametrize("answer", ["ENOSYS", "EPERM", "EACCES"])
@pytest.mark.parametrize("call", ["pidfd_open", "waitid_pidfd"])
def test_forbidden_call_means_sigchld_and_one_line_says_why(call: str, answer: str) -> None:
    printed = python_under_filter(f"{call}={answer}", PRELUDE + WATCH).splitlines()
    assert printed[:3] == ["3 reaped", "4 reaped", "PosixChildProcess 5"]
    (line,) = printed[3:]
    assert line.startswith("watching children by sigchld: ")
    assert os.strerror(getattr(errno, answer)) in line
    assert ("pidfd_open" if call == "pidfd_open" else "waitid") in line


def test_linux_5_3_which_cannot_wait_by_pidfd_means_sigchld() -> None:
    printed = python_under_filter("waitid_pidfd=EINVAL", PRELUDE + WATCH).splitlines()
    assert printed[:3] == ["3 reaped", "4 reaped", "PosixChildProcess 5"]
    assert [line for line in printed[3:] if "5.4" in line] == printed[3:]
    assert len(printed) == 4


def test_refused_signals_mean_sigchld_since_a_child_must_be_signalled_safely() -> None:
    program = """
async def main():
    child = await afork(signal.pause)
    child.terminate()
    print(type(child).__name__, await child.wait())
asyncio.run(main())
"""
    assert python_under_filter("pidfd_send_signal=EPERM", PRELUDE + program) == "PosixChildProcess -15\n"


def test_clone3_answering_eperm_is_survived_where_nothing_else_needs_it() -> None:
    """glibc needs it for posix_spawn and threads, so this cannot be the filter of the whole suite."""
    program = """
async def main():
    child = await afork(lambda: 5)
    print(type(child).__name__, await child.wait())
asyncio.run(main())
"""
    rules = "pidfd_open=EPERM,waitid_pidfd=EPERM,pidfd_send_signal=EPERM,clone3=EPERM,clone_pidfd=EPERM"
    assert python_under_filter(rules, PRELUDE + program) == "PosixChildProcess 5\n"


@pytest.mark.skipif(probe_pidfd() is not None, reason="a filter over a filter: the outer one answers first")
@pytest.mark.parametrize("answer", ["pidfd_open=ENOSYS", "pidfd_open=EPERM", "pidfd_open=EACCES", "waitid_pidfd=EINVAL"])
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_insisting_on_pidfds_where_they_are_forbidden_is_a_clear_error_at_once(answer: str, by: str) -> None:
    program = """
try:
    PidfdWatcher(backend=sys.argv[1])
except OSError as exc:
    print(errno.errorcode[exc.errno], exc.strerror)
"""
    environment = {**os.environ, ENVIRONMENT: "pidfd" if by == "environment" else ""}
    command = [sys.executable, "-c", PRELUDE + program, "auto" if by == "environment" else "pidfd"]
    result = under_filter(answer, command, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(answer.partition("=")[2])
    assert "pidfds are not available here" in result.stdout


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_sigchld_can_be_chosen_where_pidfds_work(
    loop_factory: LoopFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    monkeypatch.setenv(ENVIRONMENT, "sigchld" if by == "environment" else "")
    caplog.set_level(logging.INFO, "aiopidfd")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for code in (1, 2):
            with one_held() as child:
                reported = loop.create_future()
                watcher = PidfdWatcher(backend="auto" if by == "environment" else "sigchld")
                watcher.add_child_handler(
                    child.pid, lambda pid, returncode, reported=reported: reported.set_result(returncode)
                )
                assert not [
                    what for what in open_descriptors().values() if what.startswith(("pidfd:", "anon_inode:[pidfd]"))
                ]
                child.end(code)
                assert await reported == code

    run_on(loop_factory, main())
    (record,) = [record for record in caplog.records if record.levelno == logging.INFO]
    because = f"{ENVIRONMENT} is set" if by == "environment" else "backend='sigchld' was passed"
    assert record.getMessage() == f"watching children by sigchld: {because}"


@needs_pidfds
def test_pidfds_are_chosen_where_they_work_and_one_line_says_so(
    loop_factory: LoopFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ENVIRONMENT, "")
    caplog.set_level(logging.INFO, "aiopidfd")

    async def main() -> None:
        for code in (1, 2):
            with one_held() as child:
                child.end(code)
                assert (await wait(child.pid)).returncode == code

    run_on(loop_factory, main())
    assert [record.getMessage() for record in caplog.records] == [
        "watching children by pidfd: processes can be opened, waited for and signalled by pidfd"
    ]


def test_nonsense_in_the_environment_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "nonsense")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT} must be 'auto', 'pidfd' or 'sigchld', not 'nonsense'"):
        PidfdWatcher()


async def test_nonsense_in_the_environment_is_refused_by_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "nonsense")
    with one_held() as child, pytest.raises(ValueError, match=ENVIRONMENT):
        await wait(child.pid)


@needs_pidfds
@pytest.mark.parametrize(
    "rules",
    ["pidfd_open=EPERM", "waitid_pidfd=ENOSYS", "waitid_pidfd=EINVAL", NO_PIDFDS["EPERM"]],
)
def test_filter_that_is_installed_later_loses_no_child(rules: str) -> None:
    """A process sandboxes itself. Children from before are watched by pidfd, later ones by SIGCHLD."""
    program = f"""
async def main():
    early = [spawn(code) for code in (1, 2)]
    waits = [asyncio.ensure_future(wait(pid)) for pid, _ in early]
    await asyncio.sleep(0)
    {installing(rules)}
    late = [spawn(code) for code in (3, 4)]
    waits += [asyncio.ensure_future(wait(pid)) for pid, _ in late]
    await asyncio.sleep(0)
    for _, write in early + late:
        os.close(write)
    print([(status.returncode, status.source) for status in await asyncio.gather(*waits)])
    child = await afork(signal.pause)
    child.terminate()
    print(type(child).__name__, await child.wait())
    for line in lines():
        print(line.partition(": ")[0])
asyncio.run(main())
"""
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + program], check=False, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "[(1, 'reaped'), (2, 'reaped'), (3, 'reaped'), (4, 'reaped')]",
        "PosixChildProcess -15",
        "watching children by pidfd",
        "watching children by sigchld",
    ]
