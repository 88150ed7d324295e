"""A short run of the stress test on every loop: nothing lost, nothing wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aiopidfd._kernel.syscalls import can_recover_exit

from ..conftest import BACKENDS, LOOPS
from ..helpers.seccomp import compile_c


def stress(*options: str, module: str = "tests.stress") -> subprocess.CompletedProcess[str]:
    """Run the stress test to its end."""
    compile_c("ender.c", "-O1", "-static")  # skips the test without a compiler
    return subprocess.run(
        [sys.executable, "-m", module, *options],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def figures(run: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """The figures of a run."""
    lines = [line.split() for line in run.stdout.splitlines()]
    return {words[0]: int(words[1]) for words in lines if words[0] in ("taken", "children", "recovered", "lost", "wrong")}


@pytest.mark.skipif("pidfd" not in BACKENDS, reason="pidfds are forbidden here")
@pytest.mark.skipif(not can_recover_exit(), reason="this kernel does not report the status of a child that others reaped")
@pytest.mark.parametrize("kind", LOOPS)
def test_nothing_is_lost_to_a_hostile_reaper(kind: str, full: bool) -> None:
    run = stress("--seconds", "3" if full else "1", "--loop", kind, "--hostile")
    assert run.returncode == 0, run.stdout + run.stderr
    counted = figures(run)
    assert counted["lost"] == counted["wrong"] == 0
    assert counted["taken"] == counted["recovered"] > 0
    assert counted["children"] >= 64


@pytest.mark.parametrize("kind", LOOPS)
def test_nothing_is_lost_by_sigchld(kind: str, full: bool) -> None:
    native = ["--native"] if kind == "uvloop" else []
    run = stress("--seconds", "3" if full else "1", "--loop", kind, "--backend", "sigchld", *native)
    assert run.returncode == 0, run.stdout + run.stderr
    counted = figures(run)
    assert counted["lost"] == counted["wrong"] == counted["recovered"] == 0
    assert counted["children"] >= 64


@pytest.mark.skipif("pidfd" not in BACKENDS, reason="pidfds are forbidden here")
def test_same_seed_gives_the_same_ends_and_the_number_is_kept() -> None:
    for _ in range(2):
        run = stress("--children", "100", "--seed", "5", "--no-hostile")
        assert run.returncode == 0, run.stdout + run.stderr
        assert run.stdout.splitlines()[:-1] == [
            "loop asyncio, backend pidfd, no reaper, seed 5",
            "children 100 (100 reaped)",
            "recovered 0",
            "lost 0",
            "wrong 0",
        ]


@pytest.mark.parametrize(
    "options", [["--hostile", "--backend", "sigchld"], ["--native"], ["--native", "--loop", "uvloop", "--hostile"]]
)
def test_what_cannot_be_promised_is_refused(options: list[str]) -> None:
    assert stress(*options).returncode == 2


@pytest.mark.skipif("pidfd" not in BACKENDS, reason="pidfds are forbidden here")
@pytest.mark.parametrize("kind", LOOPS)
def test_fork_server_loses_nothing_to_other_reapers_threads_and_its_own_death(kind: str, full: bool) -> None:
    run = stress("--workers", "200" if full else "60", "--deaths", "2", "--loop", kind, module="tests.stress.forkserver")
    assert run.returncode == 0, run.stdout + run.stderr
