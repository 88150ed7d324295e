"""Short runs of the torture of subprocesses: no deadlock, no wrong status, no inherited descriptor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aiopidfd._kernel.syscalls import can_recover_exit

from ..conftest import BACKENDS, LOOPS
from ..helpers.seccomp import compile_c

pytestmark = pytest.mark.skipif("pidfd" not in BACKENDS, reason="pidfds are forbidden here, and so is a start in C")


def torture(*options: str) -> None:
    """Run the torture to its end. It must succeed."""
    compile_c("reporter.c", "-O1")  # skips the test without a compiler
    run = subprocess.run(
        [sys.executable, "-m", "tests.stress.torture", *options],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,  # in an emulated machine it takes 150
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "started in C" in run.stdout


@pytest.mark.parametrize("kind", LOOPS)
def test_threads_that_start_programs_beside_threads_in_malloc_and_fork(kind: str) -> None:
    torture("--programs", "100", "--loop", kind)


@pytest.mark.skipif(
    "pidfd" not in BACKENDS or not can_recover_exit(), reason="this kernel does not report a status that others took"
)
@pytest.mark.parametrize("kind", LOOPS)
def test_nothing_is_lost_to_a_hostile_reaper(kind: str) -> None:
    torture("--programs", "100", "--loop", kind, "--threads", "1", "--allocating", "0", "--forking", "0", "--hostile")
