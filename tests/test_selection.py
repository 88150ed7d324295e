"""What a run of the suite includes, and what it says about the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUITE = """
import pytest

on_all = lambda test: pytest.mark.parametrize("loop", ["asyncio", "uvloop"])(
    pytest.mark.parametrize("backend", ["pidfd", "sigchld"])(test)
)

def test_alone(): pass
@on_all
def test_a(loop, backend): pass
@on_all
def test_b(loop, backend): pass
@on_all
def test_c(loop, backend): pass
@on_all
def test_d(loop, backend): pass
@on_all
@pytest.mark.parametrize("word", ["one", "two"])
def test_e(loop, backend, word): pass
@pytest.mark.core
@on_all
def test_core(loop, backend): pass
@pytest.mark.long
def test_long(): pass
def test_short(full): pass
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p tests.helpers.selection --strict-markers\n", encoding="utf-8")
    (folder / "test_it.py").write_text(SUITE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def by_default(suite: Path) -> tuple[list[str], str]:
    return collect(suite)


def collect(suite: Path, *arguments: str) -> tuple[list[str], str]:
    """Return the names of the tests that are collected, and what else pytest says."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *arguments]
    ran = subprocess.run(command, cwd=suite, env=environment, check=False, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names = [line.partition("::")[2] for line in ran.stdout.splitlines() if line.startswith("test_it.py::")]
    return names, ran.stdout


def combinations_of(names: list[str], test: str) -> list[str]:
    return [name for name in names if name.partition("[")[0] == test]


def test_each_test_runs_once_and_the_core_on_everything(by_default: tuple[list[str], str]) -> None:
    names, said = by_default
    for test in "test_a", "test_b", "test_c", "test_d", "test_alone", "test_short":
        assert len(combinations_of(names, test)) == 1
    assert len(combinations_of(names, "test_e")) == 2
    assert len(combinations_of(names, "test_core")) == 4
    assert combinations_of(names, "test_long") == []
    assert "Left out of 31 tests: 18 further combinations of loop and backend, 1 that take long." in said
    assert "In a short form: 1 tests." in said


def test_combinations_take_turns(by_default: tuple[list[str], str]) -> None:
    names, _ = by_default
    turns = [combinations_of(names, f"test_{letter}")[0].partition("[")[2] for letter in "abcd"]
    assert len(set(turns)) == 4


def test_choice_is_the_same_whatever_else_is_collected(suite: Path, by_default: tuple[list[str], str]) -> None:
    names, _ = by_default
    assert collect(suite, "-k", "test_c")[0] == [name for name in names if "test_c" in name]
    on_uvloop, _ = collect(suite, "-k", "uvloop and not core")
    assert {name.partition("[")[0] for name in on_uvloop} == {"test_a", "test_b", "test_c", "test_d", "test_e"}


def test_full_runs_everything(suite: Path) -> None:
    names, said = collect(suite, "--full")
    assert len(names) == 31
    assert "--full does not include" in said
    assert "Left out" not in said


def test_test_that_is_named_is_never_left_out(suite: Path) -> None:
    given = ["test_a", "test_b[pidfd-uvloop]", "test_c[sigchld-asyncio]", "test_long"]
    names, _ = collect(suite, *[f"test_it.py::{name}" for name in given])
    assert [len(combinations_of(names, "test_a")), *names[4:]] == [4, *given[1:]]
