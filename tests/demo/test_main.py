"""The command line: the table of features, and the demo from its first line to whatever ends it."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from aiopidfd.__main__ import main
from aiopidfd._backends.features import features
from aiopidfd._kernel import syscalls

from ..helpers.children import session_members, undebugged_environment

TIMEOUT_S = 60.0

ALL_SEEN = re.compile(r"exits: (\d+) seen of \1, 0 lost")
EXIT_LINE = re.compile(
    r" *\d+\.\d s +(?P<pid>\d+) +(?P<name>worker|clients) +(?P<end>.*?) +\d+\.\d ms +\d+\.\d MiB +\d+ us", re.MULTILINE
)


def ends(output: str, name: str) -> list[str]:
    """What ended the processes of that name, in order."""
    return [found["end"] for found in EXIT_LINE.finditer(output) if found["name"] == name]


@contextlib.contextmanager
def demo(*arguments: str, cwd: Path, program: tuple[str, ...] = ("-m", "aiopidfd")) -> Iterator[subprocess.Popen[str]]:
    """The demo, running in a session of its own, and so in a process group of its own; allowed to dump core."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    process = subprocess.Popen(
        [sys.executable, *program, "demo", *arguments],
        cwd=cwd,
        env=undebugged_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], pattern: str | re.Pattern[str]) -> str:
    """Read the demo's output up to a line that matches, and return it. What is printed later is for communicate()."""
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if re.match(pattern, line):
            return output
    pytest.fail(f"the demo ended without a line like {pattern!r}:\n{output}")


def test_table_shows_each_feature_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    title, _, header, *rows = capsys.readouterr().out.splitlines()
    found = features()
    assert title.startswith("aiopidfd ")
    assert f"Linux {found.kernel}" in title
    here, meaning = header.index("here"), header.index("used")
    assert {row[:here].strip(): row[here:meaning].strip() for row in rows} == {
        "pidfd_open": found.pidfd_open,
        "waitid(P_PIDFD)": found.waitid_pidfd,
        "pidfd_send_signal": found.pidfd_send_signal,
        "clone(CLONE_PIDFD)": found.clone_pidfd,
        "programs by": found.spawn,
        "PIDFD_INFO_EXIT": found.recover_exit,
        "SIGCHLD": found.sigchld,
        "/proc": found.proc,
        "RLIMIT_NOFILE": str(found.nofile),
        "backend": found.backend,
    }
    assert rows[-1][meaning:] == found.reason
    assert all(row[meaning - 1] == " " and row[meaning] != " " for row in rows)


def test_table_shows_the_backend_where_pidfds_are_forbidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(pid: int) -> int:
        raise PermissionError(errno.EPERM, "refused")

    monkeypatch.setattr(syscalls, "open_pidfd", refuse)
    assert main([]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[:2] == ["backend", "sigchld"]
    assert "pidfd_open answers EPERM" in last


@pytest.mark.parametrize("arguments", [["unknown"], ["demo", "--kills", "0"], ["demo", "--kills", "x"], ["--unknown"]])
def test_wrong_arguments_are_refused_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m aiopidfd")


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help_lists_the_exit_codes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "exit codes:" in capsys.readouterr().out


def test_output_that_nobody_reads_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "aiopidfd"], stdout=write, stderr=subprocess.PIPE, timeout=TIMEOUT_S, check=False
        )
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_demo_sees_every_way_to_end_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with demo("--kills", "4", cwd=tmp_path) as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert errors == ""
    assert process.returncode == 0, output
    assert ends(output, "worker") == ["SIGKILL", "SIGSEGV", "exit code 3", "SIGTERM", *["SIGTERM"] * 4]
    assert ends(output, "clients") == ["exit code 0"]
    requests, kills, last = output.splitlines()[-3:]
    served = re.match(r"requests: (\d+) served, \d+ failed", requests)
    assert served is not None
    assert int(served[1]) > 0
    assert kills == "kills: 4, the server answered after 4 of them"
    assert last == "exits: 9 seen of 9, 0 lost"
    assert "\r" not in output  # a progress line is for terminals
    assert list(tmp_path.iterdir()) == []  # no core dump
    assert session_members(process.pid) == []


def test_demo_runs_on_asyncio_where_uvloop_is_missing(tmp_path: Path) -> None:
    program = "import sys; sys.modules['uvloop'] = None; from aiopidfd.__main__ import main; sys.exit(main())"
    with demo("--kills", "1", cwd=tmp_path, program=("-c", program)) as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert errors == ""
    assert process.returncode == 0, output
    assert "uvloop is not installed" in output.splitlines()[0]
    assert ALL_SEEN.fullmatch(output.splitlines()[-1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_to_its_process_group_stops_the_demo_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with demo(cwd=tmp_path) as process:
        read_until(process, EXIT_LINE)  # the first is after all workers are up
        os.killpg(process.pid, number)  # what a terminal does for Ctrl-C: the workers get it, too
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert errors == ""
    assert process.returncode == 128 + number
    assert ALL_SEEN.fullmatch(output.splitlines()[-1])
    assert session_members(process.pid) == []


def test_signal_before_the_workers_are_up_stops_the_demo_cleanly(tmp_path: Path) -> None:
    with demo(cwd=tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert errors == ""
    assert process.returncode == 128 + signal.SIGINT
    assert ALL_SEEN.fullmatch(output.splitlines()[-1])
    assert session_members(process.pid) == []


@pytest.mark.skipif(features().pidfd_open != "yes", reason="pidfds are forbidden here")
def test_killed_demo_takes_its_children_with_it(tmp_path: Path) -> None:
    with demo(cwd=tmp_path) as process, contextlib.ExitStack() as pidfds:
        read_until(process, EXIT_LINE)
        members = []
        for pid in session_members(process.pid):
            members.append(syscalls.open_pidfd(pid))
            pidfds.callback(os.close, members[-1])
        assert len(members) >= 5  # at least the parent, the clients and three workers
        process.kill()
        for pidfd in members:
            readable, _, _ = select.select([pidfd], [], [], TIMEOUT_S)
            assert readable, "a child has outlived the demo"


def test_worker_killed_by_somebody_else_is_seen_too(tmp_path: Path) -> None:
    with demo(cwd=tmp_path) as process:
        url = re.search(r"http://[0-9.:]+/", read_until(process, EXIT_LINE))
        assert url is not None
        with urlopen(url[0], timeout=TIMEOUT_S) as answer:
            worker = int(answer.read().split()[-1])
        os.kill(worker, signal.SIGABRT)
        read_until(process, rf".* {worker} +worker +SIGABRT ")
        with urlopen(url[0], timeout=TIMEOUT_S) as answer:
            assert int(answer.read().split()[-1]) != worker
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert errors == ""
    assert ALL_SEEN.fullmatch(output.splitlines()[-1])


def test_demo_keeps_a_progress_line_on_a_terminal(tmp_path: Path) -> None:
    terminal, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "aiopidfd", "demo", "--kills", "1"],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=slave,
            start_new_session=True,
        )
    finally:
        os.close(slave)
    output = b""
    with process, contextlib.suppress(OSError):  # EIO: the last process that had the terminal has ended
        while data := os.read(terminal, 65536):
            output += data
    os.close(terminal)
    assert process.returncode == 0
    assert b"served, 0 failed; Ctrl-C stops\x1b[K" in output
    assert output.endswith(b"0 lost\r\n")
